"""Images of items, from a Parquet table of item ids and encoded bytes or file names.

Images come from strangers: only raster formats are opened, the size is checked before any pixel is decoded, a file name
may not leave the table's folder, and what cannot be read or decoded is no image rather than an error.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from fmrl_dist.errors import UserError
from fmrl_dist.feature_config import ImageFeature
from shards.tables import ItemIds, as_ids, open_parquet

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000  # of one image file


@dataclass(frozen=True)
class ImageRows:
    """Some rows of the table, in order."""

    items: np.ndarray  # int64 [n], internal ids; -1 where the item is not in the item table
    images: pa.Array  # [n], encoded bytes, or file names relative to ``folder``
    folder: Path

    def read(self, row: int) -> bytes | None:
        """Encoded bytes of one row; None where there are none."""
        value = self.images[row].as_py()
        return read_image_file(self.folder, value) if isinstance(value, str) else value


def image_rows(config: ImageFeature, root: Path, ids: ItemIds, rows_at_once: int) -> Iterator[ImageRows]:
    """The image table of a feature, ``rows_at_once`` rows at a time.

    Raises:
        UserError: missing file or column, or a column that holds neither bytes nor file names.
    """
    path = root / config.path
    with open_parquet(path, [config.id, config.image]) as table:
        kind = table.schema_arrow.field(config.image).type
        holds_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not (holds_bytes or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"column {config.image!r} of {path} is of type {kind}; expected encoded image bytes or file names"
            )
        for batch in table.iter_batches(rows_at_once, columns=[config.id, config.image]):
            items = ids.find(as_ids(batch[config.id], f"column {config.id!r} of {path}"))
            yield ImageRows(items, batch[config.image], path.parent)


def num_image_rows(config: ImageFeature, root: Path) -> int:
    """Rows of the image table of a feature."""
    with open_parquet(root / config.path, [config.id, config.image]) as table:
        return int(table.metadata.num_rows)


def read_image_file(folder: Path, name: str) -> bytes | None:
    """Bytes of a file below ``folder``; None where it is missing, elsewhere, or too large."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    try:
        return path.read_bytes()
    except OSError:
        return None


def decode_image(data: bytes | None, side: int) -> Image.Image | None:
    """An RGB image of encoded bytes; None where there is none that can be decoded.

    Args:
        data: a file's content.
        side: a JPEG may be decoded at a fraction of its size, if both sides remain at least this long.
    """
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below Pillow's own limit
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (side, side))
            return image.convert("RGB")
    except Exception:  # noqa: BLE001 - Pillow's decoders raise whatever a malformed file leads them to
        return None


def describe_unused(unreadable: int, unknown: int) -> str:
    """Note on images that were not used; "" if all were."""
    notes = [f"{unreadable} images unreadable"] * (unreadable > 0) + [f"{unknown} of unknown items"] * (unknown > 0)
    return ", ".join(notes)
