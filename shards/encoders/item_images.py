"""Images of items, from a Parquet table of item ids and encoded bytes or file names.

Images are not trusted: a file name must not leave the table's folder. An item whose image cannot be read or decoded
lacks it, which is counted by its cause and is no error, up to ``data.dirt.max_bad_images``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256
from fmrl_dist.base.id_columns import IdKind, as_ids
from fmrl_dist.base.parquet import BATCH_SHARE, TOO_MUCH, memory_bytes
from fmrl_dist.config.features import ImageFeature
from shards.images.causes import UnreadableImageError
from shards.tables.column_kinds import is_text, require_ids
from shards.tables.item_ids import ItemIds
from shards.tables.raw_tables import BATCH_ROWS, read_batches, read_table, table_types

MAX_BYTES = 64_000_000  # of one image file
FILES_AT_ONCE = 8  # that are hashed: on a network file system, opening one takes longer than reading it


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
    try:
        data = read_image(folder, name)
    except UnreadableImageError:
        data = b""
    return hashlib.sha256(data).digest()


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


def read_image(folder: Path, image: bytes | str | None) -> bytes:
    """Encoded bytes of an image, which is given as bytes or by its file name.

    Raises:
        UnreadableImageError: empty, missing or too large.
    """
    if not image:
        raise UnreadableImageError("empty")
    return read_image_file(folder, image) if isinstance(image, str) else image


def read_image_file(folder: Path, name: str) -> bytes:
    """Bytes of a file below ``folder``.

    Raises:
        UnreadableImageError: missing, which is also a file elsewhere or one that cannot be read, or too large.
    """
    path = _file_below(folder, name)
    if path is None:
        raise UnreadableImageError("missing")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnreadableImageError("too large")
        return path.read_bytes()
    except OSError:
        raise UnreadableImageError("missing") from None


def _file_below(folder: Path, name: str) -> Path | None:
    """The file that a name leads to, with links followed; None where it is missing or elsewhere."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # the name is too long or holds a zero byte, or links form a circle
        return None
