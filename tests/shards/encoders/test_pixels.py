"""The pixel descriptor distinguishes images, and an image that cannot be decoded is missing."""

from __future__ import annotations

import io
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
from shards.build import main as build_main
from shards.encoders.item_images import ImageTable
from shards.encoders.pixels import DIM, encode_image
from shards.images import image_keys
from shards.store.builder import build_store
from shards.tables.item_ids import ItemIds
from tests.fixtures.stores import png, read_items, store_contents, tiny_config, write_raw


def test_pixels_skip_what_cannot_be_decoded(tmp_path: Path) -> None:
    write_raw(tmp_path)
    red = png((200, 0, 0))
    images = {"a": red, "b": png((0, 0, 200)), "c": red[: len(red) // 2], "d": None, "e": b"no image", "zz": red}
    pq.write_table(pa.table({"item_id": list(images), "image": list(images.values())}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    store, rows = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    assert rows[0].note == "2 images unreadable: 1 not an image, 1 truncated; 1 empty; 1 of unknown items"
    assert read_items(store, "image.mask").tolist() == [True, True, False, False, False, False]
    assert read_items(store, "image").shape == (6, DIM)
    assert not read_items(store, "image")[2:].any()


def test_too_many_bad_images_stop_the_build(tmp_path: Path) -> None:
    """Empty cells are no images: of three that were given, two are bad."""
    write_raw(tmp_path)
    images = {"a": png((200, 0, 0)), "b": b"<html>", "c": None, "d": None, "e": png((9, 9, 9), side=1)}
    pq.write_table(pa.table({"item_id": list(images), "image": list(images.values())}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    problem = (
        r"^feature 'image': 2 of 3 images cannot be used \(1 not an image, 1 too small\); "
        r"data.dirt.max_bad_images permits a share of 0.66: mend the images, or raise it$"
    )
    with pytest.raises(UserError, match=problem):
        build_store(tiny_config(tmp_path, tmp_path / "store", features=features, dirt={"max_bad_images": 0.66}))
    assert not (tmp_path / "store").exists()
    build_store(tiny_config(tmp_path, tmp_path / "store", features=features, dirt={"max_bad_images": 0.67}))


def write_images(root: Path, colours: list[int]) -> None:
    """A table of images, of which the last is one more that cannot be decoded; two are equal."""
    images = [*(png((colour, 0, 0)) for colour in colours), b"<html>"]
    items = [list("abcdef")[number % 6] for number in range(len(images))]
    pq.write_table(pa.table({"item_id": items, "image": images}), root / "images.parquet")


def test_rows_are_kept_and_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any number of parts give the store of one build; one new image is the only one that is encoded."""
    monkeypatch.setattr(image_keys, "UNIT_ROWS", 2)
    write_raw(tmp_path)
    features = {"image": {"source": "pixels", "path": "images.parquet"}}

    def words(store: str) -> list[str]:
        (tmp_path / f"{store}.yaml").write_text(tiny_config(tmp_path, tmp_path / store, features=features).to_yaml())
        return ["--config", str(tmp_path / f"{store}.yaml")]

    write_images(tmp_path, [200, 20, 90, 20, 140])
    build_main(words("whole"))
    assert "feature 'image': 5 images encoded, 0 were kept" in capsys.readouterr().out
    for number in (3, 1, 2):
        build_main([*words("parts"), "--part", f"{number}/3"])
        assert f"part {number}/3: encoded its share of image" in capsys.readouterr().out
    build_main(words("parts"))
    assert "feature 'image': 0 images encoded, 5 were kept" in capsys.readouterr().out
    assert store_contents(tmp_path / "parts") == store_contents(tmp_path / "whole")
    write_images(tmp_path, [1, 200, 20, 90, 20, 140])
    build_main([*words("parts"), "--overwrite"])
    out = capsys.readouterr().out
    assert "feature 'image': 1 images encoded, 5 were kept" in out and "1 bad: 1 not an image" in out
    build_main(words("fresh"))
    assert store_contents(tmp_path / "parts") == store_contents(tmp_path / "fresh")


def test_an_image_file_that_changes_while_it_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(tmp_path)
    (tmp_path / "a.png").write_bytes(png((200, 0, 0)))
    pq.write_table(pa.table({"item_id": ["a"], "image": ["a.png"]}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    missing = image_keys.ImageKeys.missing

    def and_replaced(*arguments: Any) -> np.ndarray:
        (tmp_path / "a.png").write_bytes(png((0, 0, 200)))
        return missing(*arguments)

    monkeypatch.setattr(image_keys.ImageKeys, "missing", and_replaced)
    with pytest.raises(UserError, match=r"feature 'image': image a.png changed while it was encoded; build again"):
        build_store(tiny_config(tmp_path, tmp_path / "store", features=features))


def test_pixel_descriptor_distinguishes_images() -> None:
    red, also_red, blue = (encode_image(png(colour)) for colour in ((200, 0, 0), (190, 10, 5), (0, 0, 200)))
    assert red.shape == (DIM,) and abs(np.linalg.norm(red) - 1) < 1e-5
    assert red @ also_red > red @ blue + 0.2
    for mode in ("L", "P", "RGBA", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 8)).save(buffer, "PNG")
        assert np.isfinite(encode_image(buffer.getvalue())).all()


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
