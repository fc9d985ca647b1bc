"""A pixel descriptor that needs no weights: an image's colours, layout and edges.

Three parts, each L2-normalised so that none outweighs another: an 8 x 8 thumbnail (192 values, centred), a histogram
over hue, saturation and value (8 x 4 x 4 = 128) and histograms of gradient orientation in a 4 x 4 grid (9 x 16 = 144;
Dalal and Triggs 2005, without block normalisation). The whole is L2-normalised.

A row depends on its image alone, and is kept for later builds (``shards.encodings.kept_rows``); parts of a build share
the images out (``shards.images.image_keys``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.features import PixelsFeature
from shards.encoders.item_feature import ItemFeature, packages_of
from shards.encoders.item_images import ImageTable, read_image
from shards.encodings.content_keys import content_key
from shards.encodings.kept_rows import KeptRows
from shards.images import image_keys
from shards.images.causes import CAUSES, UnreadableImageError
from shards.images.decoding import DECODING, decode_image
from shards.tables.item_ids import ItemIds

SIDE = 64  # pixels per side at which gradients are taken
THUMBNAIL = 8
HSV_BINS = (8, 4, 4)
GRID = 4
ORIENTATIONS = 9
DIM = 3 * THUMBNAIL**2 + HSV_BINS[0] * HSV_BINS[1] * HSV_BINS[2] + ORIENTATIONS * GRID**2
REVISION = "2"  # raise it when an image gives another descriptor
NO_CAUSE = 255


def encode_part(name: str, config: PixelsFeature, root: Path, ids: ItemIds, encodings: Path, part: Part) -> None:
    """Encode a part's share of the images of feature ``name`` into the folder ``encodings``.

    Raises:
        UserError: as :func:`encode_images`.
    """
    _encode_missing(name, ImageTable.open(config, root, ids), _kept_rows(name, encodings), part)


def encode_images(name: str, config: PixelsFeature, root: Path, ids: ItemIds, encodings: Path) -> ItemFeature:
    """Descriptors of all items; an item's first readable image counts.

    Rows are kept in the folder ``encodings``, and taken from it where they are there.

    Raises:
        UserError: missing file or column, a column that holds no images, or an image that changes meanwhile.
    """
    table, kept = ImageTable.open(config, root, ids), _kept_rows(name, encodings)
    images = _encode_missing(name, table, kept, WHOLE)
    keys, present, counts = image_keys.usable_images(table, images, kept, len(ids.external))
    rows = kept.gather(keys, present)
    return ItemFeature(
        name, rows, present, encoder="pixels", revision=REVISION, recipe={}, note=counts.note(), images=counts
    )


def _kept_rows(name: str, encodings: Path) -> KeptRows:
    recipe = {"source": "pixels", "revision": REVISION, "decoding": DECODING, "made_with": packages_of("pixels")}
    return KeptRows(encodings, name, recipe, DIM)


def _encode_missing(name: str, table: ImageTable, kept: KeptRows, part: Part) -> image_keys.ImageKeys:
    """Encode the images of a part's units that nobody has encoded yet; returns the keys of the part's images."""
    units = part.share(image_keys.num_units(table))
    images = image_keys.ImageKeys.read(name, table, units)
    missing = {unit: images.missing(kept, image_keys.rows_of(table, unit)) for unit in units}
    total, num_encoded = int(images.first.sum()), 0
    progress = Progress("image", sum(map(len, missing.values())), name=name)
    for unit, rows in image_keys.rows_by_unit(table, [unit for unit in units if len(missing[unit])]):
        kept.refresh()
        chosen = images.missing(kept, missing[unit])
        first = unit * image_keys.UNIT_ROWS
        _keep(name, table, kept, images.keys[chosen], [rows.images[row - first] for row in chosen.tolist()])
        num_encoded += len(chosen)
        progress.advance(len(missing[unit]))
    progress.close()
    print(f"feature {name!r}: {num_encoded:,} images encoded, {total - num_encoded:,} were kept", flush=True)
    return images


def _keep(name: str, table: ImageTable, kept: KeptRows, keys: np.ndarray, images: list[bytes | str | None]) -> None:
    """Encode images, whose ``keys`` are KEY [n], and keep their rows in one segment."""
    rows, causes = np.zeros((len(images), DIM), np.float16), np.full(len(images), NO_CAUSE, np.uint8)
    for i, image in enumerate(images):
        data = b""
        try:
            data = read_image(table.folder, image)
            rows[i] = encode_image(data)
        except UnreadableImageError as problem:
            causes[i] = CAUSES.index(problem.cause)
        if content_key(data) != keys[i].tobytes():
            raise UserError(f"feature {name!r}: image {image!s:.200} changed while it was encoded; build again")
    good = causes == NO_CAUSE
    kept.add(keys[good], rows[good], (keys[~good], causes[~good]))


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
