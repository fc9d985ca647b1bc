"""A pixel descriptor that needs no weights: what an image looks like in colour, layout and edges.

Three parts, each L2-normalised so that none drowns another: an 8 x 8 thumbnail (192 values, centred), a histogram over
hue, saturation and value (8 x 4 x 4 = 128) and histograms of gradient orientation in a 4 x 4 grid (9 x 16 = 144; Dalal
and Triggs 2005, without block normalisation). The whole is L2-normalised.

Images come from strangers: only raster formats are opened, the size is checked before any pixel is decoded, and an
image that cannot be decoded makes its item's feature absent.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from fmrl_dist.errors import UserError
from shards.tables import ItemIds, as_ids, open_parquet

SIDE = 64  # pixels per side at which gradients are taken
THUMBNAIL = 8
HSV_BINS = (8, 4, 4)
GRID = 4
ORIENTATIONS = 9
DIM = 3 * THUMBNAIL**2 + HSV_BINS[0] * HSV_BINS[1] * HSV_BINS[2] + ORIENTATIONS * GRID**2
ENCODER = "pixels"
REVISION = "1"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
BATCH_IMAGES = 256


def encode_images(path: Path, id_column: str, image_column: str, ids: ItemIds) -> tuple[np.ndarray, np.ndarray, str]:
    """Descriptors of all items from a Parquet table of item ids and encoded images; an item's first good image counts.

    Returns:
        float16 [V, 464], bool [V] (true = present), and a note on images that were not used ("" if none).

    Raises:
        UserError: missing file or column, or a column that does not hold bytes.
    """
    rows = np.zeros((len(ids.external), DIM), np.float16)
    present = np.zeros(len(rows), bool)
    unreadable = unknown = 0
    with open_parquet(path, [id_column, image_column]) as table:
        kind = table.schema_arrow.field(image_column).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"column {image_column!r} of {path} is of type {kind}; expected the images' encoded bytes")
        progress = tqdm(total=table.metadata.num_rows, desc="images", unit="image", disable=None)
        for batch in table.iter_batches(BATCH_IMAGES, columns=[id_column, image_column]):
            items = ids.find(as_ids(batch[id_column], f"column {id_column!r} of {path}"))
            for item, data in zip(items.tolist(), batch[image_column], strict=True):
                progress.update()
                if item < 0:
                    unknown += 1
                elif not present[item]:
                    vector = encode_image(data.as_py())
                    if vector is None:
                        unreadable += 1
                    else:
                        rows[item], present[item] = vector, True
        progress.close()
    notes = [f"{unreadable} images unreadable"] * (unreadable > 0) + [f"{unknown} of unknown items"] * (unknown > 0)
    return rows, present, ", ".join(notes)


def encode_image(data: bytes | None) -> np.ndarray | None:
    """Descriptor float32 [464] of one encoded image, L2-normalised; None where there is none that can be decoded."""
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below Pillow's own limit
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded near the size wanted
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except Exception:  # noqa: BLE001 - Pillow's decoders raise whatever a malformed file leads them to
        return None
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
    # The root tames a large plain background, as in RootSIFT.
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
