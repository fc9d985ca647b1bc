"""The pixel descriptor distinguishes images, and an image that cannot be decoded is missing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shards.encoders.item_images import MAX_PIXELS
from shards.encoders.pixels import DIM, encode_image
from shards.store.builder import build_store
from tests.fixtures.stores import png, read_items, tiny_config, write_raw


def test_pixels_skip_what_cannot_be_decoded(tmp_path: Path) -> None:
    write_raw(tmp_path)
    red = png((200, 0, 0))
    images = {"a": red, "b": png((0, 0, 200)), "c": red[: len(red) // 2], "d": None, "e": b"no image", "zz": red}
    pq.write_table(pa.table({"item_id": list(images), "image": list(images.values())}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    store, rows = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    assert rows[0].note == "3 images unreadable, 1 of unknown items"
    assert read_items(store, "image.mask").tolist() == [True, True, False, False, False, False]
    assert read_items(store, "image").shape == (6, DIM)
    assert not read_items(store, "image")[2:].any()


def test_pixel_descriptor_distinguishes_images() -> None:
    red, also_red, blue = (encode_image(png(colour)) for colour in ((200, 0, 0), (190, 10, 5), (0, 0, 200)))
    assert red is not None and also_red is not None and blue is not None
    assert red.shape == (DIM,) and abs(np.linalg.norm(red) - 1) < 1e-5
    assert red @ also_red > red @ blue + 0.2
    for mode in ("L", "P", "RGBA", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 5)).save(buffer, "PNG")
        assert np.isfinite(encode_image(buffer.getvalue())).all()  # type: ignore[arg-type]


def test_a_decompression_bomb_is_not_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    assert encode_image(buffer.getvalue()) is None
