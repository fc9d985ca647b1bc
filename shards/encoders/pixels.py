"""A pixel descriptor that needs no weights: an image's colours, layout and edges.

Three parts, each L2-normalised so that none outweighs another: an 8 x 8 thumbnail (192 values, centred), a histogram
over hue, saturation and value (8 x 4 x 4 = 128) and histograms of gradient orientation in a 4 x 4 grid (9 x 16 = 144;
Dalal and Triggs 2005, without block normalisation). The whole is L2-normalised.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import PixelsFeature
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_images import ImageTable, read_image
from shards.images.causes import ImageCounts, UnreadableImageError
from shards.images.decoding import decode_image
from shards.tables.item_ids import ItemIds

SIDE = 64  # pixels per side at which gradients are taken
THUMBNAIL = 8
HSV_BINS = (8, 4, 4)
GRID = 4
ORIENTATIONS = 9
DIM = 3 * THUMBNAIL**2 + HSV_BINS[0] * HSV_BINS[1] * HSV_BINS[2] + ORIENTATIONS * GRID**2
REVISION = "2"  # raise it when an image gives another descriptor
BATCH_IMAGES = 256


def encode_images(name: str, config: PixelsFeature, root: Path, ids: ItemIds) -> ItemFeature:
    """Descriptors of all items; an item's first readable image counts.

    Raises:
        UserError: missing file or column, or a column that holds no images.
    """
    table = ImageTable.open(config, root, ids)
    rows = np.zeros((len(ids.external), DIM), np.float16)
    present = np.zeros(len(rows), bool)
    num_tried, failed = 0, Counter[str]()
    progress = Progress("image", len(table.items), name=name)
    for batch in table.rows(BATCH_IMAGES):
        for item, image in zip(batch.items.tolist(), batch.images, strict=True):
            if item >= 0 and not present[item]:
                num_tried += 1
                try:
                    rows[item], present[item] = encode_image(read_image(table.folder, image)), True
                except UnreadableImageError as problem:
                    failed[problem.cause] += 1
        progress.advance(len(batch.images))
    progress.close()
    found = ImageCounts.of(num_tried, table.num_unknown, failed)
    return ItemFeature(
        name, rows, present, encoder="pixels", revision=REVISION, recipe={}, note=found.note(), images=found
    )


def encode_image(data: bytes) -> np.ndarray:
    """Descriptor float32 [464] of one encoded image, L2-normalised.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    small = decode_image(data, SIDE).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    parts = (_thumbnail(small), _colours(small), _orientations(small))
    return _normalise(np.concatenate([_normalise(part) for part in parts]))


def _normalise(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _thumbnail(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)
    return (pixels / 255 - 0.5).ravel()


def _colours(image: Image.Image) -> np.ndarray:
    hsv = np.asarray(image.convert("HSV")).reshape(-1, 3).astype(np.int64)
    hue, saturation, value = (hsv[:, i] * bins // 256 for i, bins in enumerate(HSV_BINS))
    index = (hue * HSV_BINS[1] + saturation) * HSV_BINS[2] + value
    # The square root damps a large plain background, as in RootSIFT.
    return np.sqrt(np.bincount(index, minlength=int(np.prod(HSV_BINS)))).astype(np.float32)


def _orientations(image: Image.Image) -> np.ndarray:
    """Unsigned gradient orientation, weighted by magnitude, per cell of the grid."""
    grey = np.asarray(image.convert("L"), np.float32)
    down, right = np.gradient(grey)
    angle = np.arctan2(down, right) % np.pi
    bins = np.minimum((angle / np.pi * ORIENTATIONS).astype(np.int64), ORIENTATIONS - 1)
    cell = np.arange(SIDE) * GRID // SIDE
    index = (cell[:, None] * GRID + cell[None, :]) * ORIENTATIONS + bins
    weights = np.hypot(down, right)
    return np.bincount(index.ravel(), weights.ravel(), minlength=ORIENTATIONS * GRID**2).astype(np.float32)
