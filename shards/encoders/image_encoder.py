"""Image features of a pretrained encoder (paper section 5.3: SigLIP through open_clip), L2-normalised.

The main process reads the image table and runs the model; worker processes decode and prepare the images. The table's
rows are encoded in blocks, each kept when it is done (``shards.encoders.encoding``). A batch ends where its block does:
a build that goes on after an interruption forms the same batches, and so the same bits, as one that was never stopped.

``n`` good images of a batch, ``dim`` the model's embedding width.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import OpenClipFeature
from shards.encoders.compute import Compute, choose_compute
from shards.encoders.encoding import Encoded, EncodedBlocks
from shards.encoders.images import ImageTable, decode_image, describe_unused, read_image
from shards.encoders.open_clip_model import ImageModel, find_model, load_tower, make_transform
from shards.tables.tables import ItemIds

PR_SET_PDEATHSIG = 1  # linux/prctl.h
BLOCK_ROWS = 512  # a few minutes of SigLIP ViT-L on a CPU are lost at most; a GPU writes a file a second


class RawBatch(NamedTuple):
    """Rows of the image table, on their way to a worker."""

    block: int
    num_rows: int
    items: list[int]  # of the rows whose item is known
    images: list[bytes | str | None]  # likewise


class PreparedBatch(NamedTuple):
    """What a worker makes of them."""

    block: int
    num_rows: int
    num_failed: int  # images that could not be read or decoded
    items: torch.Tensor  # int64 [n]
    pixels: torch.Tensor  # float32 [n, 3, height, width]


class PreparedImages(Dataset[PreparedBatch]):
    """Decodes and prepares images; an index is a whole :class:`RawBatch`, so only the main process reads the table."""

    def __init__(self, folder: Path, preprocessing: dict[str, Any]) -> None:
        self.folder = folder
        self.preprocessing = preprocessing

    @cached_property
    def transform(self) -> Any:
        """Made where it is used: a worker is sent its settings only."""
        return make_transform(self.preprocessing)

    def __getitem__(self, batch: RawBatch) -> PreparedBatch:
        items, pixels = [], []
        for item, image in zip(batch.items, batch.images, strict=True):
            decoded = decode_image(read_image(self.folder, image))
            if decoded is not None:
                items.append(item)
                pixels.append(self.transform(decoded))
        stacked = torch.stack(pixels) if pixels else torch.empty(0)
        return PreparedBatch(
            batch.block, batch.num_rows, len(batch.items) - len(items), torch.tensor(items, dtype=torch.int64), stacked
        )


def encode_images(name: str, config: OpenClipFeature, root: Path, ids: ItemIds, encoding: Path) -> Encoded:
    """Image embeddings of all items for feature ``name``; an item's first good image counts.

    Finished blocks are kept in the folder ``encoding``; those of an earlier build of the same recipe are taken over.

    Raises:
        UserError: the table or the model cannot be read, a worker died, or the model's output is not finite.
    """
    table = ImageTable.open(config, root, ids)
    model = find_model(config.model, config.pretrained)
    compute = choose_compute(config.precision)
    revision = model.revision
    recipe = {
        "encoder": model.encoder,
        "revision": revision,
        "model": model.config,
        "preprocessing": model.preprocessing,
        "precision": compute.precision,
        "batch_images": config.batch_images,
        "block_rows": BLOCK_ROWS,
        "images": table.sha256(),
    }
    num_rows = len(table.items)
    blocks = EncodedBlocks(encoding, name, recipe, num_blocks=-(-num_rows // BLOCK_ROWS))
    missing = blocks.missing()
    print(f"feature {name!r}: {model.encoder}, {compute.precision} on {compute.device}", flush=True)
    if len(missing) < blocks.num_blocks:
        num_done = blocks.num_blocks - len(missing)
        print(f"feature {name!r}: {num_done} of {blocks.num_blocks} blocks were done before", flush=True)
    if missing:
        try:
            _encode_blocks(name, config, table, model, compute, blocks, missing)
        except (
            RuntimeError,
            ConnectionError,
            EOFError,
        ) as error:  # the latter two: it died while it handed over a batch
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"feature {name!r}: a process that decodes images died ({' '.join(str(error).split())}); finished "
                f"blocks are kept: build again, with fewer data.features.{name}.workers or batch_images if memory or "
                "shared memory ran out"
            ) from None
    rows, present = blocks.gather(len(ids.external), model.dim)
    note = describe_unused(blocks.num_failed(), table.num_unknown)
    return Encoded(rows, present, model.encoder, revision, note)


def _encode_blocks(
    name: str,
    config: OpenClipFeature,
    table: ImageTable,
    model: ImageModel,
    compute: Compute,
    blocks: EncodedBlocks,
    missing: Collection[int],
) -> None:
    tower = load_tower(model).to(compute.device)
    num_rows = len(table.items)
    num_left = sum(min(BLOCK_ROWS, num_rows - block * BLOCK_ROWS) for block in missing)
    loader: Iterable[PreparedBatch] = DataLoader(
        PreparedImages(table.folder, model.preprocessing),
        sampler=_raw_batches(table, set(missing), config.batch_images),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=config.workers,
        # A fork would copy the locks of torch's threads; forkserver's children outlive a build that is killed.
        multiprocessing_context="spawn" if config.workers else None,
        worker_init_fn=partial(_end_with_parent, os.getpid()),
    )
    progress = Progress("image", num_rows, num_rows - num_left, name=name)
    for block, batches in itertools.groupby(loader, key=lambda batch: batch.block):
        items, rows, num_failed = [], [], 0
        for batch in batches:
            items.append(batch.items.numpy())
            rows.append(_encode(name, tower, compute, batch.pixels, model.dim))
            num_failed += batch.num_failed
            progress.advance(batch.num_rows)
        block_items, first = np.unique(np.concatenate(items), return_index=True)
        blocks.save(block, block_items, np.concatenate(rows)[first], num_failed)
    progress.close()


def _end_with_parent(parent: int, _worker: int) -> None:
    """Have the kernel end this worker with a build that is killed: amid a message, it would wait for the rest."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os.kill(os.getpid(), signal.SIGKILL)


def _raw_batches(table: ImageTable, missing: Collection[int], batch_images: int) -> Iterator[RawBatch]:
    """The rows of the missing blocks; a block whose items are all unknown still gives its batches."""
    for block, rows in enumerate(table.rows(BLOCK_ROWS)):
        if block in missing:
            for low in range(0, len(rows.items), batch_images):
                items = rows.items[low : low + batch_images].tolist()
                known = [i for i, item in enumerate(items) if item >= 0]
                images = [rows.images[low + i] for i in known]
                yield RawBatch(block, len(items), [items[i] for i in known], images)


def _unchanged(batch: Any) -> Any:
    return batch


def _encode(name: str, tower: torch.nn.Module, compute: Compute, pixels: torch.Tensor, dim: int) -> np.ndarray:
    """L2-normalised rows float16 [n, dim] of ``pixels``."""
    if not len(pixels):
        return np.empty((0, dim), np.float16)
    with torch.inference_mode():
        with compute.autocast():
            output = tower(pixels.to(compute.device))
        pooled = output[0] if isinstance(output, tuple) else output  # CoCa's tower gives its tokens too
        rows: np.ndarray = F.normalize(pooled.float(), dim=1).half().cpu().numpy()
    require(bool(np.isfinite(rows).all()), f"feature {name!r}: the encoder's output is not finite; try precision: fp32")
    return rows
