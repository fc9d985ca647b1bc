"""Small pictures of the items that a page shows, and of no others."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmrl_dist.base.errors import UserError
from shards.images.thumbnails import MOST_BYTES, SIDE, item_thumbnails, thumbnail
from tests.fixtures.images import photo
from tests.fixtures.stores import tiny_config


def test_pictures_of_wanted_items(tmp_path: Path) -> None:
    """An item's first good image; row groups of others are not read."""
    images = [photo(0), b"bad", photo(2), photo(3), photo(4), None]
    table = pa.table({"item_id": ["a", "b", "b", "b", "c", "d"], "image": images})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=2)
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    data = tiny_config(tmp_path, tmp_path / "store", features=features).data
    found = item_thumbnails(data, pa.array(["z", "d", "b", "a"], pa.large_string()), {0, 1, 2})
    assert list(found) == [2]
    with Image.open(io.BytesIO(found[2])) as picture, Image.open(io.BytesIO(photo(2))) as whole:
        assert picture.format == "JPEG" and picture.size == whole.size
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(whole.convert("RGB"))).mean() < 8


def test_pictures_in_a_field_of_a_column(tmp_path: Path) -> None:
    """As the Hub's data sets have them: a struct of bytes and path."""
    images = [{"bytes": photo(0), "path": None}, {"bytes": photo(1), "path": "b.png"}]
    pq.write_table(pa.table({"item": [{"id": "a"}, {"id": "b"}], "image": images}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet", "id": "item.id", "image": "image.bytes"}}
    data = tiny_config(tmp_path, tmp_path / "store", features=features).data
    found = item_thumbnails(data, pa.array(["a", "b"], pa.large_string()), {1})
    with Image.open(io.BytesIO(found[1])) as picture, Image.open(io.BytesIO(photo(1))) as whole:
        assert list(found) == [1] and picture.size == whole.size


def test_a_picture_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    data = thumbnail(Image.fromarray(noise))
    assert len(data) <= MOST_BYTES
    with Image.open(io.BytesIO(data)) as picture:
        assert max(picture.size) == SIDE


def test_without_images_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the config has no feature that is made of images"):
        item_thumbnails(tiny_config(tmp_path, tmp_path / "store").data, pa.array(["a"]), {0})
