"""Small pictures of some items, from the raw image table that a config names."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import open_parquet
from fmrl_dist.base.progress import Progress
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.features import ImageFeature
from shards.encoders.item_images import ImageTable, read_image
from shards.images.causes import UnreadableImageError
from shards.images.decoding import decode_image
from shards.tables.item_ids import ItemIds
from shards.tables.parquet_files import column_batches

SIDE = 112  # pixels, twice what a page shows
MOST_BYTES = 4096
QUALITIES = (80, 60, 40, 20)
ROWS_AT_ONCE = 256


def item_thumbnails(data: DataConfig, ids: pa.Array, wanted: Collection[int]) -> dict[int, bytes]:
    """JPEG files of those of the ``wanted`` items whose image can be found and decoded, at most ``MOST_BYTES`` each.

    Args:
        data: the config's section; its first feature that is made of images names the table.
        ids: external ids of a store's items, in the order of their rows.
        wanted: rows of items.

    Raises:
        UserError: no feature is made of images, or the table cannot be read.
    """
    features = [feature for feature in data.features.values() if isinstance(feature, ImageFeature)]
    require(
        bool(features),
        "the config has no feature that is made of images; name the config of a store that has, or leave it out",
    )
    table = ImageTable.open(features[0], Path(data.root), ItemIds(ids))
    is_wanted = np.isin(table.items, list(wanted))
    found: dict[int, bytes] = {}
    progress = Progress("row", len(table.items), name="pictures")
    try:
        with open_parquet(table.path, f"table {table.path}") as file:
            start = 0
            for group, num_rows in enumerate(file.group_rows):
                row, start = start, start + num_rows
                if is_wanted[row:start].any():
                    for batch in column_batches(file, [table.column], ROWS_AT_ONCE, groups=[group]):
                        for place in np.flatnonzero(is_wanted[row : row + len(batch)]).tolist():
                            _add(found, int(table.items[row + place]), table.folder, batch[table.column][place].as_py())
                        row += len(batch)
                        progress.update(row)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"table {table.path} cannot be read ({' '.join(str(error).split())[:200]})") from None
    progress.close()
    return found


def _add(found: dict[int, bytes], item: int, folder: Path, image: bytes | str | None) -> None:
    """An item's first image that can be decoded counts, as for the encoders."""
    if item not in found:
        try:
            found[item] = thumbnail(decode_image(read_image(folder, image), SIDE))
        except UnreadableImageError:
            return


def thumbnail(image: Image.Image) -> bytes:
    """An RGB image as a JPEG of at most ``MOST_BYTES`` and ``SIDE`` pixels a side."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    data = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= MOST_BYTES:
            break
    return data
