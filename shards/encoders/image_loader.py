"""Images on their way to a model: worker processes that decode and prepare them, batch by batch.

The main process reads the image table, unit by unit (``shards.images.image_keys``). Only rows whose content nobody
has encoded go to a worker.

``n`` images of a batch, of which ``g`` are good.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fmrl_dist.base.parent_process import end_with_parent
from shards.encoders.item_images import ImageTable, read_image
from shards.encoders.open_clip_model import make_transform
from shards.encodings.content_keys import content_key
from shards.images import image_keys
from shards.images.causes import CAUSES, UnreadableImageError
from shards.images.decoding import decode_image

NOTICE_S = 1.0  # within which the kernel tells of a child that has closed its connections


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
    for unit, rows in image_keys.rows_by_unit(table, units):
        chosen = to_do(unit).tolist()
        for low in range(0, len(chosen), batch_images):
            batch = chosen[low : low + batch_images]
            images = [rows.images[row - unit * image_keys.UNIT_ROWS] for row in batch]
            yield RawBatch(unit, batch, [keys[row].tobytes() for row in batch], images)


def _unchanged(batch: Any) -> Any:
    return batch


def _end_with_parent(parent: int, _worker: int) -> None:
    end_with_parent(parent)
