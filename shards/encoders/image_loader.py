"""Images on their way to the encoder: worker processes decode and prepare them, batch by batch.

The main process reads the image table, whose rows form blocks of :data:`BLOCK_ROWS`. A batch ends where its block does:
a build that resumes after an interruption forms the same batches, and so the same bits, as one that never stopped.

``n`` good images of a batch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from fmrl_dist.base.parent_process import end_with_parent
from shards.encoders.item_images import ImageTable, read_image
from shards.encoders.open_clip_model import make_transform
from shards.images.causes import UnreadableImageError
from shards.images.decoding import decode_image

NOTICE_S = 1.0  # within which the kernel tells of a child that has closed its connections
BLOCK_ROWS = 512  # at most a few minutes of SigLIP ViT-L on a CPU are lost; a GPU writes a file a second


class RawBatch(NamedTuple):
    """Rows of the image table that go to a worker."""

    block: int
    num_rows: int
    items: list[int]  # of the rows whose item is known
    images: list[bytes | str | None]  # likewise


class PreparedBatch(NamedTuple):
    """What a worker makes of them."""

    block: int
    num_rows: int
    failed: list[str]  # causes of the images that could not be read or decoded
    items: torch.Tensor  # int64 [n]
    pixels: torch.Tensor  # float32 [n, 3, height, width]


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
        items, pixels, failed = [], [], []
        for item, image in zip(batch.items, batch.images, strict=True):
            try:
                decoded = decode_image(read_image(self.folder, image))
            except UnreadableImageError as problem:
                failed.append(problem.cause)
                continue
            items.append(item)
            pixels.append(self.transform(decoded))
        return PreparedBatch(
            block=batch.block,
            num_rows=batch.num_rows,
            failed=failed,
            items=torch.tensor(items, dtype=torch.int64),
            pixels=torch.stack(pixels) if pixels else torch.empty(0),
        )


def num_blocks(table: ImageTable) -> int:
    return -(-len(table.items) // BLOCK_ROWS)


def num_rows(table: ImageTable, blocks: Collection[int]) -> int:
    """Rows of the table in ``blocks``."""
    return sum(min(BLOCK_ROWS, len(table.items) - block * BLOCK_ROWS) for block in blocks)


def prepared_batches(
    images: PreparedImages, table: ImageTable, blocks: Collection[int], batch_images: int, workers: int
) -> Iterable[PreparedBatch]:
    """The rows of ``blocks`` in order, at most ``batch_images`` at a time, prepared by ``workers`` processes (0: here).

    Raises:
        RuntimeError, ConnectionError, EOFError: a worker died; see :func:`is_dead_worker`.
    """
    return DataLoader(
        images,
        sampler=_raw_batches(table, set(blocks), batch_images),
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


def _raw_batches(table: ImageTable, blocks: Collection[int], batch_images: int) -> Iterator[RawBatch]:
    """The rows of ``blocks``. A block whose items are all unknown still has its batches."""
    for block, rows in enumerate(table.rows(BLOCK_ROWS)):
        if block in blocks:
            for low in range(0, len(rows.items), batch_images):
                items = rows.items[low : low + batch_images].tolist()
                known = [i for i, item in enumerate(items) if item >= 0]
                images = [rows.images[low + i] for i in known]
                yield RawBatch(block, len(items), [items[i] for i in known], images)


def _unchanged(batch: Any) -> Any:
    return batch


def _end_with_parent(parent: int, _worker: int) -> None:
    end_with_parent(parent)
