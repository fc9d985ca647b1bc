"""Image features from a pretrained encoder (paper section 5.3: SigLIP through open_clip), L2-normalised.

An image that an earlier build has encoded is not encoded again (``shards.encodings.kept_rows``). The image table's rows
form units, which parts of a build share out (``shards.images.image_keys``). Worker processes prepare a unit's missing
images (``shards.encoders.image_loader``), the main process runs the model, and the unit is saved as soon as it is
finished.

A row depends on its image alone: all forward passes have one shape, filled up with repeated images, since a product
rounds by its shape.

``n`` images of a batch, ``dim`` the model's embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import OpenClipFeature
from shards.encoders import image_loader
from shards.encoders.compute import Compute, choose_compute
from shards.encoders.item_feature import ItemFeature, packages_of
from shards.encoders.item_images import ImageTable
from shards.encoders.open_clip_model import ImageModel, find_image_model, load_tower
from shards.encodings.kept_rows import KeptRows
from shards.images import image_keys
from shards.images.decoding import DECODING
from shards.tables.item_ids import ItemIds

CPU_IMAGES = 8  # of one forward pass on a CPU: more are no faster, and a single new image is filled up to them


@dataclass(frozen=True)
class ImageEncoder:
    """The image tower of a model, on its device."""

    tower: torch.nn.Module
    compute: Compute
    dim: int
    batch_images: int  # of every forward pass

    @classmethod
    def load(cls, model: ImageModel, compute: Compute, batch_images: int) -> ImageEncoder:
        if compute.device.type == "cpu":
            batch_images = min(batch_images, CPU_IMAGES)
        return cls(load_tower(model).to(compute.device), compute, model.dim, batch_images)

    def encode(self, pixels: torch.Tensor) -> np.ndarray:
        """L2-normalised rows float16 [n, dim] of ``pixels`` float32 [n, 3, height, width]."""
        rows = np.empty((len(pixels), self.dim), np.float16)
        for low in range(0, len(pixels), self.batch_images):
            batch = pixels[low : low + self.batch_images]
            filled = batch[torch.arange(self.batch_images) % len(batch)]
            with torch.inference_mode():
                with self.compute.autocast():
                    output = self.tower(filled.to(self.compute.device))
                pooled = output[0] if isinstance(output, tuple) else output  # CoCa's tower returns its tokens too
                encoded = F.normalize(pooled.float(), dim=1).half().cpu().numpy()
            rows[low : low + len(batch)] = encoded[: len(batch)]
        return rows


@dataclass(frozen=True)
class ImageWork:
    """The images of a feature, their encoder, and what is kept of their rows."""

    name: str  # of the feature
    config: OpenClipFeature
    table: ImageTable
    model: ImageModel
    compute: Compute
    revision: str  # of the model's weights
    kept: KeptRows

    @classmethod
    def open(cls, name: str, config: OpenClipFeature, root: Path, ids: ItemIds, encodings: Path) -> ImageWork:
        """Find the model, and look up what is kept in ``encodings`` by its recipe.

        Raises:
            UserError: the table or the model cannot be read.
        """
        table = ImageTable.open(config, root, ids)
        model, compute = find_image_model(config.model, config.pretrained), choose_compute(config.precision)
        revision = model.revision
        recipe = {
            "source": config.source,
            "revision": revision,
            "model": model.config,
            "preprocessing": model.preprocessing,
            "precision": compute.precision,
            "decoding": DECODING,
            "made_with": packages_of(config.source) | {"device": compute.device.type},
        }
        return cls(name, config, table, model, compute, revision, KeptRows(encodings, name, recipe, model.dim))

    def encode(self, part: Part = WHOLE) -> image_keys.ImageKeys:
        """Encode the images of a part's units that nobody has encoded yet, and keep their rows.

        Returns:
            The keys of the part's images.

        Raises:
            UserError: a worker died, an image changed meanwhile, or the model's output is not finite.
        """
        print(f"feature {self.name!r}: {self.model.encoder}, {self.compute}", flush=True)
        units = part.share(image_keys.num_units(self.table))
        images = image_keys.ImageKeys.read(self.name, self.table, units)
        missing = [unit for unit in units if len(self._missing(images, unit))]
        num_encoded = 0
        if missing:
            try:
                num_encoded = self._encode_units(images, missing)
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not image_loader.is_dead_worker(error):
                    raise
                image_loader.wait_for_notice(error)
                raise UserError(
                    f"feature {self.name!r}: a process that decodes images died ({' '.join(str(error).split())}); "
                    f"finished units are kept: build again, with fewer data.features.{self.name}.workers or "
                    "batch_images if memory or shared memory ran out"
                ) from None
        total = int(images.first.sum())
        print(f"feature {self.name!r}: {num_encoded:,} images encoded, {total - num_encoded:,} were kept", flush=True)
        return images

    def _missing(self, images: image_keys.ImageKeys, unit: int) -> np.ndarray:
        return images.missing(self.kept, image_keys.rows_of(self.table, unit))

    def _encode_units(self, images: image_keys.ImageKeys, units: list[int]) -> int:
        """Encode and save what is missing in ``units``; returns the number of images."""

        def to_do(unit: int) -> np.ndarray:
            self.kept.refresh()
            return self._missing(images, unit)

        prepared = image_loader.PreparedImages(self.table.folder, self.model.preprocessing)
        batches = image_loader.prepared_batches(
            prepared, self.table, images.keys, to_do, units, self.config.batch_images, self.config.workers
        )
        encoder = ImageEncoder.load(self.model, self.compute, self.config.batch_images)
        progress = Progress("image", sum(len(self._missing(images, unit)) for unit in units), name=self.name)
        num_encoded = 0
        for _, batches_of_unit in itertools.groupby(batches, key=lambda batch: batch.unit):
            num_encoded += self._save_unit(encoder, images, batches_of_unit, progress)
        progress.close()
        return num_encoded

    def _save_unit(
        self,
        encoder: ImageEncoder,
        images: image_keys.ImageKeys,
        batches: Iterable[image_loader.PreparedBatch],
        progress: Progress,
    ) -> int:
        good, failed, causes, rows = [], [], [], []
        for batch in batches:
            require(
                not batch.changed,
                f"feature {self.name!r}: image {batch.changed} changed while it was encoded; build again",
            )
            good.append(batch.rows.numpy())
            failed.append(batch.failed.numpy())
            causes.append(batch.causes.numpy())
            rows.append(encoder.encode(batch.pixels))
            require(
                bool(np.isfinite(rows[-1]).all()),
                f"feature {self.name!r}: the encoder's output is not finite; try precision: fp32",
            )
            progress.advance(len(batch.rows) + len(batch.failed))
        good_rows, failed_rows = np.concatenate(good), np.concatenate(failed)
        self.kept.add(images.keys[good_rows], np.concatenate(rows), (images.keys[failed_rows], np.concatenate(causes)))
        return len(good_rows) + len(failed_rows)


def encode_part(name: str, config: OpenClipFeature, root: Path, ids: ItemIds, encodings: Path, part: Part) -> None:
    """Encode a part's share of the images of feature ``name`` into the folder ``encodings``.

    Raises:
        UserError: as :meth:`ImageWork.open` and :meth:`ImageWork.encode`.
    """
    ImageWork.open(name, config, root, ids, encodings).encode(part)


def encode_images(name: str, config: OpenClipFeature, root: Path, ids: ItemIds, encodings: Path) -> ItemFeature:
    """Image embeddings of all items for feature ``name``; an item's first readable image counts.

    Rows are kept in the folder ``encodings``, and taken from it where they are there.

    Args:
        name: of the feature.
        config: its settings.
        root: folder of the raw tables.
        ids: the items' ids.
        encodings: folder of what is kept.

    Raises:
        UserError: as :meth:`ImageWork.open` and :meth:`ImageWork.encode`.
    """
    work = ImageWork.open(name, config, root, ids, encodings)
    keys, present, counts = image_keys.usable_images(work.table, work.encode(), work.kept, len(ids.external))
    return ItemFeature(
        name,
        work.kept.gather(keys, present),
        present,
        encoder=work.model.encoder,
        revision=work.revision,
        recipe={
            "architecture": json_sha256(work.model.config),
            "preprocessing": work.model.preprocessing,
            "precision": work.compute.precision,
        },
        device=work.compute.device.type,
        note=counts.note(),
        images=counts,
    )
