"""The pixel descriptor distinguishes images, and an image that cannot be decoded is missing."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import PixelsFeature
from shards.encoders.item_images import MAX_PIXELS, ImageTable, decode_image
from shards.encoders.pixels import DIM, encode_image
from shards.store.builder import build_store
from shards.tables.item_ids import ItemIds
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


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image is not None and image.mode == "RGB"
    return np.asarray(image)


FLIP, MIRROR, TURN = np.flipud, np.fliplr, partial(np.rot90, k=-1)  # a turn by 90 degrees clockwise


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, []),
        (2, [MIRROR]),
        (3, [FLIP, MIRROR]),
        (4, [FLIP]),
        (5, [TURN, MIRROR]),
        (6, [TURN]),
        (7, [TURN, FLIP]),
        (8, [TURN, FLIP, MIRROR]),
    ],
)
def test_an_image_is_upright(orientation: int, undo: list[Callable[[np.ndarray], np.ndarray]]) -> None:
    """As the EXIF standard words the eight orientations: where the stored first row and column belong."""
    stored = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    upright = stored
    for step in undo:
        upright = step(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels_of(encoded(Image.fromarray(stored), exif=exif)), upright)


def test_damaged_exif_costs_no_image() -> None:
    upright = Image.new("RGB", (5, 4), "red")
    assert np.array_equal(pixels_of(encoded(upright, exif=b"Exif\0\0no TIFF header")), np.asarray(upright))


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255)])
def test_what_is_transparent_is_white(hidden: tuple[int, int, int]) -> None:
    """Whatever colour the file holds there; half transparency mixes."""
    image = Image.new("RGBA", (4, 1), (*hidden, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    found = pixels_of(encoded(image))[0].tolist()
    assert found == [[255, 255, 255], [10, 20, 30], [127, 127, 127], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*hidden, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert pixels_of(encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_a_decompression_bomb_is_not_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    assert encode_image(buffer.getvalue()) is None


def test_pieces_of_a_table_do_not_end_with_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [None if row == 4 else bytes([row]) * 1000 for row in range(10)]
    pq.write_table(pa.table({"item_id": range(10), "image": images}), tmp_path / "images.parquet", row_group_size=3)
    table = ImageTable.open(PixelsFeature(path="images.parquet"), tmp_path, ItemIds(pa.array(range(10))))
    pieces = list(table.rows(4))
    assert [len(piece.images) for piece in pieces] == [4, 4, 2]
    assert [image for piece in pieces for image in piece.images] == images
    assert np.concatenate([piece.items for piece in pieces]).tolist() == list(range(10))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    with pytest.raises(UserError, match=r"images of 3,000 bytes in \d rows; this machine's memory cannot hold that"):
        list(table.rows(4))
