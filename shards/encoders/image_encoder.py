"""Image features from a pretrained encoder (paper section 5.3: SigLIP through open_clip), L2-normalised.

Worker processes prepare the images (``shards.encoders.image_loader``); the main process runs the model. The image
table's rows are encoded in blocks, each saved as soon as it is finished (``shards.encoders.encoded_blocks``).

``n`` images of a batch, ``dim`` the model's embedding width.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import OpenClipFeature
from shards.encoders import image_loader
from shards.encoders.compute import Compute, choose_compute
from shards.encoders.encoded_blocks import EncodedBlocks
from shards.encoders.item_feature import ItemFeature, versions_of
from shards.encoders.item_images import ImageTable
from shards.encoders.open_clip_model import ImageModel, find_image_model, load_tower
from shards.images.causes import CAUSES, ImageCounts
from shards.images.decoding import DECODING
from shards.tables.item_ids import ItemIds


@dataclass(frozen=True)
class ImageEncoder:
    """The image tower of a model, on its device."""

    tower: torch.nn.Module
    compute: Compute
    dim: int

    @classmethod
    def load(cls, model: ImageModel, compute: Compute) -> ImageEncoder:
        return cls(load_tower(model).to(compute.device), compute, model.dim)

    def encode(self, pixels: torch.Tensor) -> np.ndarray:
        """L2-normalised rows float16 [n, dim] of ``pixels`` float32 [n, 3, height, width]."""
        if not len(pixels):
            return np.empty((0, self.dim), np.float16)
        with torch.inference_mode():
            with self.compute.autocast():
                output = self.tower(pixels.to(self.compute.device))
            pooled = output[0] if isinstance(output, tuple) else output  # CoCa's tower returns its tokens too
            rows: np.ndarray = F.normalize(pooled.float(), dim=1).half().cpu().numpy()
        return rows


def encode_images(
    name: str, config: OpenClipFeature, root: Path, ids: ItemIds, encoding: Path, images: str
) -> ItemFeature:
    """Image embeddings of all items for feature ``name``; an item's first readable image counts.

    Finished blocks are kept in the folder ``encoding``; those of an earlier build with the same recipe are reused.

    Args:
        name: of the feature.
        config: its settings.
        root: folder of the raw tables.
        ids: the items' ids.
        encoding: folder of the finished blocks.
        images: sha256 of the images and their table.

    Raises:
        UserError: the table or the model cannot be read, a worker died, or the model's output is not finite.
    """
    table = ImageTable.open(config, root, ids)
    model = find_image_model(config.model, config.pretrained)
    compute = choose_compute(config.precision)
    revision = model.revision
    recipe = {
        "encoder": model.encoder,
        "revision": revision,
        "model": model.config,
        "preprocessing": model.preprocessing,
        "precision": compute.precision,
        "batch_images": config.batch_images,
        "block_rows": image_loader.BLOCK_ROWS,
        "images": images,
        "items": hashlib.sha256(table.items.tobytes()).hexdigest(),
        "decoding": DECODING,
        "made_with": versions_of(OpenClipFeature.source) | {"device": compute.device.type},
    }
    blocks = EncodedBlocks(encoding, name, recipe, num_blocks=image_loader.num_blocks(table))
    blocks.announce(f"{model.encoder}, {compute}")
    if blocks.missing():
        prepared = image_loader.PreparedImages(table.folder, model.preprocessing)
        batches = image_loader.prepared_batches(prepared, table, blocks.missing(), config.batch_images, config.workers)
        try:
            _encode_blocks(ImageEncoder.load(model, compute), table, batches, blocks)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not image_loader.is_dead_worker(error):
                raise
            image_loader.wait_for_notice(error)
            raise UserError(
                f"feature {name!r}: a process that decodes images died ({' '.join(str(error).split())}); finished "
                f"blocks are kept: build again, with fewer data.features.{name}.workers or batch_images if memory or "
                "shared memory ran out"
            ) from None
    rows, present = blocks.gather(len(ids.external), model.dim)
    failed = Counter(dict(zip(CAUSES, blocks.failed().tolist(), strict=True)))
    found = ImageCounts.of(len(table.items) - table.num_unknown, table.num_unknown, failed)
    return ItemFeature(
        name,
        rows,
        present,
        encoder=model.encoder,
        revision=revision,
        recipe={
            "architecture": json_sha256(model.config),
            "preprocessing": model.preprocessing,
            "precision": compute.precision,
        },
        device=compute.device.type,
        note=found.note(),
        images=found,
    )


def _encode_blocks(
    encoder: ImageEncoder, table: ImageTable, batches: Iterable[image_loader.PreparedBatch], blocks: EncodedBlocks
) -> None:
    """Encode and save the missing blocks, whose batches these are."""
    total = len(table.items)
    progress = Progress("image", total, total - image_loader.num_rows(table, blocks.missing()), name=blocks.feature)
    for block, batches_of_block in itertools.groupby(batches, key=lambda batch: batch.block):
        items, rows, failed = [], [], Counter[str]()
        for batch in batches_of_block:
            items.append(batch.items.numpy())
            rows.append(encoder.encode(batch.pixels))
            require(
                bool(np.isfinite(rows[-1]).all()),
                f"feature {blocks.feature!r}: the encoder's output is not finite; try precision: fp32",
            )
            failed.update(batch.failed)
            progress.advance(batch.num_rows)
        block_items, first = np.unique(np.concatenate(items), return_index=True)
        blocks.save(block, block_items, np.concatenate(rows)[first], [failed[cause] for cause in CAUSES])
    progress.close()
