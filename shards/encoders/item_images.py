"""Images of items, from a Parquet table of item ids and encoded bytes or file names.

Images are not trusted: only raster formats are opened, the size is checked before any pixel is decoded, and a file name
must not leave the table's folder. An image that cannot be read or decoded counts as missing; it is not an error.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256
from fmrl_dist.base.id_columns import IdKind, as_ids
from fmrl_dist.base.parquet import BATCH_SHARE, TOO_MUCH, memory_bytes
from fmrl_dist.config.features import ImageFeature
from shards.tables.column_kinds import is_text, require_ids
from shards.tables.item_ids import ItemIds
from shards.tables.raw_tables import BATCH_ROWS, read_batches, read_table, table_types

DECODING = 2  # raise it when decode_image gives other pixels: finished blocks of an encoding are then not reused
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000  # of one image file
FILES_AT_ONCE = 8  # that are hashed: on a network file system, opening one takes longer than reading it
MAX_ASPECT = 100  # long side to short side: resized to a short side of hundreds, a line would fill the memory


@dataclass(frozen=True)
class ImageRows:
    """Some rows of the table, in order."""

    items: np.ndarray  # int64 [n], internal ids; -1 where the item is not in the item table
    images: list[bytes | str | None]  # [n], encoded bytes, or file names relative to the table's folder


@dataclass(frozen=True)
class ImageTable:
    """The image table of a feature."""

    path: Path
    column: str  # of the images
    items: np.ndarray  # int64 [rows], internal ids; -1 where the item is not in the item table

    @classmethod
    def open(cls, config: ImageFeature, root: Path, ids: ItemIds) -> ImageTable:
        """Check the table's columns, and read its ids.

        Raises:
            UserError: missing file or column, or a column that holds neither bytes nor file names.
        """
        path = root / config.path
        check_image_table(config, root)
        external = read_table(path, [config.id], ids=[config.id])[config.id]
        kind: IdKind = "text" if is_text(ids.external.type) else "integer"
        return cls(path, config.image, ids.find(as_ids(external, f"column {config.id!r} of {path}", kind)))

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def num_unknown(self) -> int:
        """Rows of items that are not in the item table."""
        return int((self.items < 0).sum())

    def rows(self, rows_at_once: int) -> Iterator[ImageRows]:
        """All rows, ``rows_at_once`` at a time; the last piece may be smaller.

        Raises:
            UserError: the table cannot be read, or so many images do not fit into the memory.
        """
        low, images = 0, list[bytes | str | None]()
        for batch in read_batches(self.path, [self.column], rows_at_once=rows_at_once).batches:
            images += batch[self.column].to_pylist()  # batches end with their row group, pieces do not
            num_bytes = sum(map(len, filter(None, images)))
            require(
                num_bytes <= BATCH_SHARE * memory_bytes(),
                f"table {self.path}: images of {num_bytes:,} bytes in {len(images)} rows; {TOO_MUCH}",
            )
            while len(images) >= rows_at_once:
                yield ImageRows(self.items[low : low + rows_at_once], images[:rows_at_once])
                low, images = low + rows_at_once, images[rows_at_once:]
        if images:
            yield ImageRows(self.items[low:], images)


def images_sha256(config: ImageFeature, root: Path) -> str:
    """Digest of a table of images: of its file, and of every image file that it names.

    Raises:
        UserError: as :func:`check_image_table`.
    """
    holds_names, path, column = check_image_table(config, root), root / config.path, config.image
    digest = hashlib.sha256(bytes.fromhex(file_sha256(path)))
    if not holds_names:
        return digest.hexdigest()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for batch in read_batches(path, [column], rows_at_once=BATCH_ROWS).batches:
            names = batch[column].to_pylist()
            for one in pool.map(partial(_image_file_sha256, path.parent), names):
                digest.update(one)
    return digest.hexdigest()


def _image_file_sha256(folder: Path, name: str | None) -> bytes:
    """As the encoders see it: a file that is missing or too large is as good as an empty one."""
    return hashlib.sha256((name and read_image_file(folder, name)) or b"").digest()


def check_image_table(config: ImageFeature, root: Path) -> bool:
    """Whether the table of a feature holds file names; otherwise it holds bytes.

    Raises:
        UserError: missing file or column, not one Parquet file, ids of another type, or neither names nor bytes.
    """
    path = root / config.path
    require(not path.is_dir(), f"table {path} is a folder; expected one Parquet file of images")
    types = table_types(path, [config.id, config.image])
    require(bool(types), f"table {path} is not Parquet; expected Parquet")
    require_ids(types[config.id], f"column {config.id!r} of {path}")
    kind = types[config.image]
    if not (is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"column {config.image!r} of {path} is of type {kind}; expected encoded image bytes or file names"
        )
    return is_text(kind)


def read_image(folder: Path, image: bytes | str | None) -> bytes | None:
    """Encoded bytes of an image, which is given as bytes or by its file name; None where there are none."""
    return read_image_file(folder, image) if isinstance(image, str) else image


def read_image_file(folder: Path, name: str) -> bytes | None:
    """Bytes of a file below ``folder``; None where it is missing, elsewhere, or too large."""
    path = _file_below(folder, name)
    try:
        return path.read_bytes() if path and path.stat().st_size <= MAX_BYTES else None
    except OSError:
        return None


def _file_below(folder: Path, name: str) -> Path | None:
    """The file that a name leads to, with links followed; None where it is missing or elsewhere."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # the name is too long or holds a zero byte, or links form a circle
        return None


def decode_image(data: bytes | None, side: int | None = None) -> Image.Image | None:
    """An RGB image from encoded bytes, upright, on white; None where they cannot be decoded.

    Its EXIF orientation is applied, so that it is as people see it. What is transparent shows a white page, as in a
    shop; the colour that a file happens to hold under full transparency does not count. Of an animation it is the
    first frame.

    Args:
        data: a file's content.
        side: a JPEG may be decoded at a fraction of its size if both sides remain at least this long; None: never.
    """
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below Pillow's own limit
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if not 0 < image.width * image.height <= MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
                return None
            if side is not None:
                image.draft("RGB", (side, side))
            image = _upright(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return _on_white(image).convert("RGB")
    except Exception:  # noqa: BLE001 - a malformed file can make Pillow's decoders raise anything
        return None


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; as it is where its EXIF data are damaged."""
    image.load()  # a file whose pixels cannot be decoded raises here
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - malformed EXIF data can make Pillow's parser raise anything
        return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page


def describe_unused(unreadable: int, unknown: int) -> str:
    """A note on images that were not used; "" if all were."""
    notes = [f"{unreadable} images unreadable"] * (unreadable > 0) + [f"{unknown} of unknown items"] * (unknown > 0)
    return ", ".join(notes)
