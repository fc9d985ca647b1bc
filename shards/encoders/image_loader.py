"""Images on their way to the encoder: their keys, and worker processes that decode and prepare them, batch by batch.

The main process reads the image table, whose rows form units of :data:`UNIT_ROWS`. Only rows whose content nobody has
encoded go to a worker.

``n`` images of a batch, of which ``g`` are good.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fmrl_dist.base.parent_process import end_with_parent
from fmrl_dist.base.progress import Progress
from shards.encoders.item_images import FILES_AT_ONCE, ImageRows, ImageTable, read_image
from shards.encoders.open_clip_model import make_transform
from shards.encodings.content_keys import KEY, content_key
from shards.images.causes import CAUSES, UnreadableImageError
from shards.images.decoding import decode_image

NOTICE_S = 1.0  # within which the kernel tells of a child that has closed its connections
UNIT_ROWS = 512  # at most a few minutes of SigLIP ViT-L on a CPU are lost; a GPU writes a file a second


class RawBatch(NamedTuple):
    """Rows of the image table that go to a worker."""

    unit: int
    rows: list[int]  # [n], of the table
    keys: list[bytes]  # [n], sha256 of the images when they were looked up
    images: list[bytes | str | None]  # [n]


class PreparedBatch(NamedTuple):
    """What a worker makes of them."""

    unit: int
    rows: torch.Tensor  # int64 [g], of the table
    failed: torch.Tensor  # int64 [n - g], rows whose image could not be decoded
    causes: torch.Tensor  # uint8 [n - g], why: positions in CAUSES
    pixels: torch.Tensor  # float32 [g, 3, height, width]
    changed: str  # the file name of an image that is not what it was when it was looked up; "": none


class PreparedImages(Dataset[PreparedBatch]):
    """Decodes and prepares images. An index is a whole :class:`RawBatch`: only the main process reads the table."""

    def __init__(self, folder: Path, preprocessing: dict[str, Any]) -> None:
        self.folder = folder
        self.preprocessing = preprocessing

    @cached_property
    def transform(self) -> Any:
        """Made where it is used: a worker receives only its settings."""
        return make_transform(self.preprocessing)

    def __getitem__(self, batch: RawBatch) -> PreparedBatch:
        good, failed, causes, pixels, changed = [], [], [], [], ""
        for row, key, image in zip(batch.rows, batch.keys, batch.images, strict=True):
            data = b""
            try:
                data = read_image(self.folder, image)
                decoded = decode_image(data)
            except UnreadableImageError as problem:
                failed.append(row)
                causes.append(CAUSES.index(problem.cause))
            else:
                good.append(row)
                pixels.append(self.transform(decoded))
            if content_key(data) != key:
                changed = str(image)
        return PreparedBatch(
            unit=batch.unit,
            rows=torch.tensor(good, dtype=torch.int64),
            failed=torch.tensor(failed, dtype=torch.int64),
            causes=torch.tensor(causes, dtype=torch.uint8),
            pixels=torch.stack(pixels) if pixels else torch.empty(0),
            changed=changed,
        )


@dataclass(frozen=True)
class ImageKeys:
    """What the images of some rows of a table are found by; the others have none."""

    keys: np.ndarray  # KEY [rows]
    given: np.ndarray  # bool [rows]: the row's item is known, and its image has bytes
    first: np.ndarray  # bool [rows]: likewise, and no earlier row has the same image
    causes: Counter[str]  # why rows of known items have none

    @classmethod
    def read(cls, name: str, table: ImageTable, units: Collection[int]) -> ImageKeys:
        """Read the images of all rows of ``units``, for feature ``name``: at the speed of the disk.

        Raises:
            UserError: the table cannot be read.
        """
        num_rows, causes = len(table.items), Counter[str]()
        keys, given, first = np.zeros(num_rows, KEY), np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_)
        progress = Progress("image", sum(len(rows_of(table, unit)) for unit in units), name=f"{name}, looked up")
        read = partial(_key_of_image, table.folder)
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for unit, rows in _units(table, units):
                low = unit * UNIT_ROWS
                known = np.flatnonzero(rows.items >= 0)
                for i, key in zip(known, pool.map(read, [rows.images[i] for i in known]), strict=True):
                    if isinstance(key, bytes):
                        keys[low + i], given[low + i] = key, True
                    else:
                        causes[key] += 1
                progress.advance(len(rows.items))
        progress.close()
        rows_given = np.flatnonzero(given)
        first[rows_given[np.unique(keys[rows_given], return_index=True)[1]]] = True
        return cls(keys, given, first, causes)


def _key_of_image(folder: Path, image: bytes | str | None) -> bytes | str:
    """The key of an image, or the cause why it has no bytes."""
    try:
        return content_key(read_image(folder, image))
    except UnreadableImageError as problem:
        return problem.cause


def num_units(table: ImageTable) -> int:
    return -(-len(table.items) // UNIT_ROWS)


def rows_of(table: ImageTable, unit: int) -> np.ndarray:
    """The table's rows that form a unit, int64 [n]."""
    return np.arange(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, len(table.items)))


def prepared_batches(
    images: PreparedImages,
    table: ImageTable,
    keys: np.ndarray,
    to_do: Callable[[int], np.ndarray],
    units: Collection[int],
    batch_images: int,
    workers: int,
) -> Iterable[PreparedBatch]:
    """Rows of ``units`` in order, at most ``batch_images`` at a time, prepared by ``workers`` processes (0: here).

    Args:
        images: what the workers do.
        table: of the images.
        keys: KEY [rows], of the table's rows.
        to_do: called when a unit's turn comes; gives the rows to prepare, int64 [n].
        units: numbers of the units.
        batch_images: images of a batch.
        workers: number of processes.

    Raises:
        RuntimeError, ConnectionError, EOFError: a worker died; see :func:`is_dead_worker`.
    """
    return DataLoader(
        images,
        sampler=_raw_batches(table, keys, to_do, units, batch_images),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        # A fork would copy the locks of torch's threads; a forkserver's children outlive a build that is killed.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=partial(_end_with_parent, os.getpid()),
    )


def is_dead_worker(error: Exception) -> bool:
    """Whether ``error`` means that a worker died: the loader noticed, or the worker died while it sent a batch."""
    return isinstance(error, ConnectionError | EOFError) or (
        isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    )


def wait_for_notice(error: Exception) -> None:
    """Let the loader say that a worker died where a broken connection has said so first.

    Its handler of SIGCHLD raises once, wherever this process then is: without this, amid what deals with ``error``.
    """
    if not isinstance(error, RuntimeError):
        with contextlib.suppress(RuntimeError):
            time.sleep(NOTICE_S)


def _raw_batches(
    table: ImageTable,
    keys: np.ndarray,
    to_do: Callable[[int], np.ndarray],
    units: Collection[int],
    batch_images: int,
) -> Iterator[RawBatch]:
    for unit, rows in _units(table, units):
        chosen = to_do(unit).tolist()
        for low in range(0, len(chosen), batch_images):
            batch = chosen[low : low + batch_images]
            images = [rows.images[row - unit * UNIT_ROWS] for row in batch]
            yield RawBatch(unit, batch, [keys[row].tobytes() for row in batch], images)


def _units(table: ImageTable, units: Collection[int]) -> Iterator[tuple[int, ImageRows]]:
    """The rows of ``units``, in order; the table is read no further than the last of them."""
    last = max(units, default=-1)
    for unit, rows in enumerate(table.rows(UNIT_ROWS) if units else ()):
        if unit in units:
            yield unit, rows
        if unit == last:
            return


def _unchanged(batch: Any) -> Any:
    return batch


def _end_with_parent(parent: int, _worker: int) -> None:
    end_with_parent(parent)
