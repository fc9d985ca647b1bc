"""Image features through open_clip: a small real model with seeded random weights, saved and loaded by path."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parts import Part
from shards.build import main as build_main
from shards.encoders import image_encoder
from shards.encoders.open_clip_model import open_clip
from shards.images import image_keys
from shards.random_image_encoder import main as random_encoder_main
from shards.store.builder import build_store
from shards.tables.item_ids import ItemIds
from tests.fixtures.image_model import DIM, HALF, MODEL, encode, feature, write_image_shop, write_images
from tests.fixtures.images import BAD, CAUSE_OF, GOOD, grey_16_bit, photo
from tests.fixtures.stores import tiny_config
from tests.fixtures.training import refusal


def plain_rows(images: list[bytes], weights: Path) -> np.ndarray:
    """One image after the other, with open_clip's own functions."""
    open_clip.add_model_config(MODEL)
    model, transform = open_clip.create_model_from_pretrained(MODEL.stem, str(weights))
    rows = []
    for data in images:
        with torch.inference_mode():
            row = model.encode_image(transform(Image.open(io.BytesIO(data)).convert("RGB")).unsqueeze(0))
        rows.append((row / row.norm()).squeeze(0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("batch_images", [1, 3, 64])
def test_rows_equal_a_plain_loop(batch_images: int, weights: Path, tmp_path: Path) -> None:
    images = [photo(i, size=(60 + 9 * i, 120 - 5 * i), kind="JPEG" if i % 2 else "PNG") for i in range(10)]
    encoded = encode(tmp_path, images, feature(weights, batch_images=batch_images))
    assert encoded.rows.dtype == np.float16 and encoded.present.all() and encoded.note == ""
    np.testing.assert_allclose(encoded.rows.astype(np.float32), plain_rows(images, weights), rtol=0, atol=HALF)
    distances = np.linalg.norm(encoded.rows[1:] - encoded.rows[:-1], axis=1)
    assert distances.min() > 50 * HALF, "images that all look alike would prove nothing"


def test_what_cannot_be_decoded_is_a_missing_feature(weights: Path, tmp_path: Path) -> None:
    zoo = GOOD | BAD
    encoded = encode(tmp_path, list(zoo.values()), feature(weights, batch_images=4))
    assert {name for name, present in zip(zoo, encoded.present, strict=True) if present} == set(GOOD)
    causes = Counter(CAUSE_OF.values())
    assert encoded.images is not None and encoded.images.num_empty == causes.pop("empty")
    assert encoded.images.bad == causes and encoded.images.num_given == len(zoo) - encoded.images.num_empty
    rows = encoded.rows.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), encoded.present, atol=2e-3)
    same = {name: row for name, row in zip(zoo, rows, strict=True) if "JPEG" in name or name == "WebP"}
    assert same["JPEG"] @ same["progressive JPEG"] > 0.999 and same["JPEG"] @ same["WebP"] > 0.99


def test_sixteen_bits_are_scaled(weights: Path, tmp_path: Path) -> None:
    eight = io.BytesIO()
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) // 16).astype(np.uint8)).save(eight, "PNG")
    rows = encode(tmp_path, [grey_16_bit(), eight.getvalue()], feature(weights)).rows.astype(np.float32)
    np.testing.assert_allclose(rows[0], rows[1], atol=HALF)


def test_an_items_first_good_image_counts(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_keys, "UNIT_ROWS", 3)
    images = [b"bad", photo(1), photo(2), photo(3), photo(4), photo(5), photo(6), b"bad"]
    items = [
        0,
        0,
        0,
        1,
        99,
        0,
        1,
        2,
    ]  # items 0 and 1 have good images in two units; 99 is unknown
    encoded = encode(tmp_path, images, feature(weights, batch_images=2), items)
    assert encoded.present[:3].tolist() == [True, True, False] and not encoded.present[3:].any()
    assert encoded.note == "2 images unreadable: 2 not an image; 1 of unknown items"
    expected = plain_rows([images[1], images[3]], weights)
    np.testing.assert_allclose(encoded.rows[:2].astype(np.float32), expected, rtol=0, atol=HALF)


def test_the_manifest_names_the_encoder_and_its_weights(weights: Path, tmp_path: Path) -> None:
    write_image_shop(tmp_path / "raw", pa.array([photo(i) for i in range(4)]), list(range(4)))
    keys = {"source": "open_clip", "path": "images.parquet", "model": str(MODEL), "pretrained": str(weights)}
    values = tiny_config(tmp_path / "raw", tmp_path / "store", items={}, features={"image": keys | {"workers": 0}})
    store, _ = build_store(values)
    info = store.manifest.features[0]
    assert info.encoder == "open_clip:clip-random-small random.safetensors"
    assert (info.dim, info.present, info.masked, len(info.revision)) == (DIM, 4, False, 64)


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / "encodings").iterdir()}


def test_another_recipe_takes_over_no_row(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    random_encoder_main(["--config", str(MODEL), "--seed", "1", "--output", str(other)])
    images = [photo(i) for i in range(3)]
    first = encode(tmp_path, images, feature(weights))
    assert len(folders(tmp_path)) == 1
    np.testing.assert_array_equal(encode(tmp_path, images, feature(weights)).rows, first.rows)
    assert len(folders(tmp_path)) == 1
    changed = [encode(tmp_path, images, feature(other)), encode(tmp_path, images, feature(weights, precision="bf16"))]
    assert len(folders(tmp_path)) == 3
    assert all(not np.array_equal(one.rows, first.rows) for one in changed)


def test_a_row_depends_on_its_image_alone(weights: Path, tmp_path: Path) -> None:
    """Bit for bit, on a CPU: alone, in another order, of another item."""
    images = [photo(i) for i in range(11)]
    rows = encode(tmp_path / "first", images, feature(weights)).rows
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = encode(tmp_path / "second", [images[i] for i in order], feature(weights, batch_images=32)).rows
    np.testing.assert_array_equal(shuffled, rows[order])
    np.testing.assert_array_equal(encode(tmp_path / "third", images[4:5], feature(weights)).rows[0], rows[4])


@pytest.mark.parametrize("size", [(200, 100), (64, 64)])
def test_a_file_of_other_pixels_is_another_recipe(size: tuple[int, int], weights: Path, tmp_path: Path) -> None:
    """Also one that has as many bytes as before."""
    (tmp_path / "a.bmp").write_bytes(photo(0, size=(64, 64), kind="BMP"))
    num_bytes = (tmp_path / "a.bmp").stat().st_size
    first = encode(tmp_path, ["a.bmp"], feature(weights)).rows.copy()
    (tmp_path / "a.bmp").write_bytes(photo(1, size=size, kind="BMP"))
    assert ((tmp_path / "a.bmp").stat().st_size == num_bytes) == (size == (64, 64))
    assert not np.array_equal(encode(tmp_path, ["a.bmp"], feature(weights)).rows, first)


def test_the_recipe_tells_preprocessing_and_precision(weights: Path, tmp_path: Path) -> None:
    """Two models of the same name and weights can still prepare images in different ways."""
    config = json.loads(MODEL.read_text())
    model = tmp_path / "other" / MODEL.name
    model.parent.mkdir()
    model.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    first, second, third = (
        encode(tmp_path, [photo(0)], feature(weights, **keys))
        for keys in ({}, {"model": str(model)}, {"precision": "bf16"})
    )
    assert (first.encoder, first.revision) == (second.encoder, second.revision) == (third.encoder, third.revision)
    assert not np.array_equal(first.rows, second.rows)
    differences = {key for key in first.recipe if first.recipe[key] != second.recipe[key]}
    assert differences == {"preprocessing"}
    assert (first.recipe["precision"], third.recipe["precision"]) == ("fp32", "bf16")


def test_a_store_is_kept_if_the_encoder_is_the_same(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Architecture and weights are what their files hold."""
    write_image_shop(tmp_path / "raw", pa.array([photo(i) for i in range(4)]), list(range(4)))
    keys = {"source": "open_clip", "path": "images.parquet", "model": str(MODEL), "pretrained": str(weights)}
    config = tiny_config(tmp_path / "raw", tmp_path / "store", items={}, features={"image": keys | {"workers": 0}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    keep = ["--config", str(tmp_path / "config.yaml"), "--keep"]
    build_main(keep)
    for name, source in (("model.json", MODEL), ("w.safetensors", weights)):
        shutil.copyfile(source, tmp_path / name)
    of_image = "--data.features.image"
    capsys.readouterr()
    same = [f"{of_image}.model", tmp_path / "model.json", f"{of_image}.pretrained", tmp_path / "w.safetensors"]
    build_main([*keep, *map(str, same), f"{of_image}.batch_images", "3"])
    assert capsys.readouterr().out.startswith("kept ")
    (tmp_path / "model.json").write_text(MODEL.read_text() + " ")
    random_encoder_main(["--config", str(MODEL), "--seed", "1", "--output", str(tmp_path / "other.safetensors")])
    for key, value in (("model", tmp_path / "model.json"), ("pretrained", tmp_path / "other.safetensors")):
        line = refusal(build_main, *keep, f"{of_image}.{key}", value)
        assert f"what data.features.image.{key} names has the sha256 " in line
    assert "data.features.image.pretrained" in refusal(build_main, *keep, f"{of_image}.pretrained", "webli")


def test_one_new_image_encodes_one_image(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither those that are kept nor those that failed are tried again; equal images are encoded once."""
    monkeypatch.setattr(image_keys, "UNIT_ROWS", 2)
    images = [photo(0), b"bad", photo(2), photo(3), b"worse", photo(2), None]
    first = encode(tmp_path, images, feature(weights))
    assert "5 images encoded, 0 were kept\n" in capsys.readouterr().out
    again = encode(tmp_path, [photo(9), *images[::-1]], feature(weights))
    assert "1 images encoded, 5 were kept\n" in capsys.readouterr().out
    assert again.note == first.note == "2 images unreadable: 2 not an image; 1 empty", (
        "those that are known to fail count too"
    )
    np.testing.assert_array_equal(again.rows[:0:-1], first.rows)
    np.testing.assert_array_equal(again.present[:0:-1], first.present)
    np.testing.assert_array_equal(first.rows[5], first.rows[2])
    assert again.rows[0].any()


def test_parts_share_out_the_images(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_keys, "UNIT_ROWS", 4)
    images = [photo(i) for i in range(10)] + [b"bad"]
    whole = encode(tmp_path / "whole", images, feature(weights))
    write_images(tmp_path / "parts", images)
    ids = ItemIds(pa.array(range(len(images)), pa.int64()))
    capsys.readouterr()
    for number in (2, 1):
        part, encodings = Part(number, 2), tmp_path / "parts" / "encodings"
        image_encoder.encode_part("image", feature(weights), tmp_path / "parts", ids, encodings, part)
    assert "4 images encoded, 0 were kept" in (out := capsys.readouterr().out) and "7 images encoded, 0" in out
    joined = encode(tmp_path / "parts", images, feature(weights))
    assert "0 images encoded, 11 were kept" in capsys.readouterr().out
    np.testing.assert_array_equal(joined.rows, whole.rows)
    np.testing.assert_array_equal(joined.present, whole.present)


def test_an_image_that_changes_while_it_is_encoded(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not get the row of another content."""
    (tmp_path / "a.png").write_bytes(photo(0))
    missing = image_encoder.ImageWork._missing

    def change_then_look(self: image_encoder.ImageWork, *arguments: Any) -> np.ndarray:
        (tmp_path / "a.png").write_bytes(photo(1))
        return missing(self, *arguments)

    monkeypatch.setattr(image_encoder.ImageWork, "_missing", change_then_look)
    with pytest.raises(UserError, match="image a.png changed while it was encoded; build again"):
        encode(tmp_path, ["a.png"], feature(weights))
    assert not list((tmp_path / "encodings").rglob("*.safetensors"))
