"""Image features through open_clip: a small real model with seeded random weights, saved and loaded by path."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

if importlib.util.find_spec("open_clip") is None and not os.environ.get("CI"):
    pytest.skip("open_clip is not installed (make images)", allow_module_level=True)

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import OpenClipFeature
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.encoders import image_encoder, image_loader
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_images import MAX_PIXELS
from shards.encoders.open_clip_model import find_image_model, open_clip
from shards.random_image_encoder import main as random_encoder_main
from shards.random_image_encoder import write_random_encoder
from shards.store.builder import build_store
from shards.tables.item_ids import ItemIds
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import tiny_config, tiny_values, write_histories, write_items

MODEL = REPOSITORY / "configs" / "clip-random-small.json"
DIM = 256
HALF = 6e-4  # float16 rounds a component of a unit vector by at most 2.5e-4; twice that, and a little


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    write_random_encoder(str(MODEL), 0, path)
    return path


def photo(seed: int, mode: str = "RGB", size: tuple[int, int] = (90, 70), kind: str = "PNG", **options: Any) -> bytes:
    """A smooth random image, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def feature(weights: Path, **keys: Any) -> OpenClipFeature:
    values: dict[str, Any] = {"model": str(MODEL), "pretrained": str(weights), "workers": 0, "precision": "fp32"}
    return OpenClipFeature(path="images.parquet", **(values | keys))


def encode(root: Path, images: list[Any], config: OpenClipFeature, items: list[int] | None = None) -> ItemFeature:
    """Write an image table of ``images``, of the items 0, 1, … or of ``items``, and encode it."""
    items = list(range(len(images))) if items is None else items
    pq.write_table(pa.table({"item_id": items, "image": images}), root / "images.parquet")
    ids = ItemIds(pa.array(range(len(images)), pa.int64()))
    return image_encoder.encode_images("image", config, root, ids, root / "encoding")


def plain_rows(images: list[bytes], weights: Path) -> np.ndarray:
    """One image after the other, by open_clip's own means."""
    open_clip.add_model_config(MODEL)
    model, transform = open_clip.create_model_from_pretrained(MODEL.stem, str(weights))
    rows = []
    for data in images:
        with torch.inference_mode():
            row = model.encode_image(transform(Image.open(io.BytesIO(data)).convert("RGB")).unsqueeze(0))
        rows.append((row / row.norm()).squeeze(0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("workers", "batch_images"), [(0, 1), (0, 3), (0, 64), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_rows_equal_a_plain_loop(workers: int, batch_images: int, weights: Path, tmp_path: Path) -> None:
    images = [photo(i, size=(60 + 9 * i, 120 - 5 * i), kind="JPEG" if i % 2 else "PNG") for i in range(10)]
    config = feature(weights, workers=workers, batch_images=batch_images)
    encoded = encode(tmp_path, images, config)
    assert encoded.rows.dtype == np.float16 and encoded.present.all() and encoded.note == ""
    np.testing.assert_allclose(encoded.rows.astype(np.float32), plain_rows(images, weights), rtol=0, atol=HALF)
    distances = np.linalg.norm(encoded.rows[1:] - encoded.rows[:-1], axis=1)
    assert distances.min() > 50 * HALF, "images that all look alike would prove nothing"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.open(io.BytesIO(photo(seed))) for seed in (1, 2, 3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=40)
    return buffer.getvalue()


def grey_16_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def flat(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


GOOD: dict[str, bytes] = {
    "JPEG": photo(0, kind="JPEG"),
    "progressive JPEG": photo(0, kind="JPEG", progressive=True),
    "CMYK JPEG": photo(0, "CMYK", kind="JPEG"),
    "grey JPEG": photo(0, "L", kind="JPEG"),
    "WebP": photo(0, kind="WEBP"),
    "palette": photo(0, "P"),
    "palette, transparent": photo(0, "P", transparency=3),
    "RGBA": photo(0, "RGBA"),
    "grey with alpha": photo(0, "LA"),
    "one bit": photo(0, "1"),
    "16 bit": grey_16_bit(),
    "animation": animation(),
    "one pixel": photo(0, size=(1, 1)),
}
BAD: dict[str, bytes | None] = {
    "truncated JPEG": photo(0, kind="JPEG")[:-200],
    "truncated PNG": photo(0)[:300],
    "header only": photo(0, kind="JPEG")[:20],
    "text": b"<html>404 not found</html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "empty": b"",
    "null": None,
    "no width": png_of_size(0, 10),
    "no pixels": png_of_size(10, 10),
    "bomb": flat("1", (int(MAX_PIXELS**0.5) + 1, int(MAX_PIXELS**0.5) + 1)),
    "claims to be huge": png_of_size(2**31 - 1, 2**31 - 1),
    "a line": flat("RGB", (20_000, 1)),
}


def test_what_cannot_be_decoded_is_a_missing_feature(weights: Path, tmp_path: Path) -> None:
    zoo = GOOD | BAD
    encoded = encode(tmp_path, list(zoo.values()), feature(weights, batch_images=4))
    assert {name for name, present in zip(zoo, encoded.present, strict=True) if present} == set(GOOD)
    assert encoded.note == f"{len(BAD)} images unreadable"
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
    monkeypatch.setattr(image_loader, "BLOCK_ROWS", 3)
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
    ]  # items 0 and 1 have good images in two blocks; 99 is unknown
    encoded = encode(tmp_path, images, feature(weights, batch_images=2), items)
    assert encoded.present[:3].tolist() == [True, True, False] and not encoded.present[3:].any()
    assert encoded.note == "2 images unreadable, 1 of unknown items"
    expected = plain_rows([images[1], images[3]], weights)
    np.testing.assert_allclose(encoded.rows[:2].astype(np.float32), expected, rtol=0, atol=HALF)


def write_raw(root: Path, images: pa.Array, items: list[int]) -> None:
    root.mkdir(exist_ok=True)
    write_items(root / "items.parquet", sorted(set(items)))
    write_histories(root / "sequences.parquet", {"u": items[:3], "v": items[:2]})
    pq.write_table(pa.table({"item_id": items, "image": images}), root / "images.parquet")


@pytest.mark.parametrize("source", ["pixels", "open_clip"])
def test_a_file_name_may_not_leave_the_folder(source: str, weights: Path, tmp_path: Path) -> None:
    """Every name leads to a good image, or to nothing; only those below the table's folder are read."""
    root, outside = tmp_path / "raw", tmp_path / "outside.png"
    (root / "deep").mkdir(parents=True)
    outside.write_bytes(photo(0))
    for inside in ("a.png", "deep/b.png"):
        (root / inside).write_bytes(photo(1))
    (root / "link-out.png").symlink_to(outside)
    (root / "link-in.png").symlink_to(root / "a.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "up").symlink_to(tmp_path)
    (root / "text.jpg").write_text("no image")
    good = ["a.png", "deep/b.png", "deep/../a.png", "link-in.png", str(root / "a.png")]
    bad = ["../outside.png", str(outside), "link-out.png", "up/outside.png", "deep/../../outside.png", "circle.png"]
    bad += ["text.jpg", "missing.png", "deep", "", ".", "a\0b.png", "x" * 5000, "/etc/passwd", "/dev/zero"]
    names = [*good, *bad, None]
    write_raw(root, pa.array(names, pa.string()), list(range(len(names))))
    keys: dict[str, Any] = {"source": source, "path": "images.parquet"}
    if source == "open_clip":
        keys |= {"model": str(MODEL), "pretrained": str(weights), "workers": 0}
    store, features = build_store(tiny_config(root, tmp_path / "store", items={}, features={"image": keys}))
    present = {name for name, present in zip(names, features[0].present, strict=True) if present}
    assert present == set(good)
    assert features[0].note == f"{len(bad) + 1} images unreadable"
    assert store.manifest.features[0].present == len(good)


def test_the_manifest_names_the_encoder_and_its_weights(weights: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", pa.array([photo(i) for i in range(4)]), list(range(4)))
    keys = {"source": "open_clip", "path": "images.parquet", "model": str(MODEL), "pretrained": str(weights)}
    values = tiny_config(tmp_path / "raw", tmp_path / "store", items={}, features={"image": keys | {"workers": 0}})
    store, _ = build_store(values)
    info = store.manifest.features[0]
    assert info.encoder == "open_clip:clip-random-small random.safetensors"
    assert (info.dim, info.present, info.masked, len(info.revision)) == (DIM, 4, False, 64)
    assert not (tmp_path / "store.encoding").exists()


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / "encoding").iterdir()}


def test_another_recipe_takes_over_no_block(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    random_encoder_main(["--config", str(MODEL), "--seed", "1", "--output", str(other)])
    images = [photo(i) for i in range(3)]
    first = encode(tmp_path, images, feature(weights))
    assert len(folders(tmp_path)) == 1
    np.testing.assert_array_equal(encode(tmp_path, images, feature(weights)).rows, first.rows)
    assert len(folders(tmp_path)) == 1
    changed = [
        encode(tmp_path, images, feature(other)),
        encode(tmp_path, images, feature(weights, precision="bf16")),
        encode(tmp_path, images[::-1], feature(weights)),
    ]
    assert len(folders(tmp_path)) == 4
    assert all(not np.array_equal(one.rows, first.rows) for one in changed)


def test_a_file_that_grew_is_another_recipe(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(0))
    first = encode(tmp_path, ["a.png"], feature(weights)).rows.copy()
    (tmp_path / "a.png").write_bytes(photo(1, size=(200, 100)))
    assert not np.array_equal(encode(tmp_path, ["a.png"], feature(weights)).rows, first)


def test_finished_blocks_are_not_encoded_again(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_loader, "BLOCK_ROWS", 2)
    images = [photo(0), b"bad", photo(2), photo(3), b"bad"]
    first = encode(tmp_path, images, feature(weights))
    rows, present = np.array(first.rows), first.present
    (folder,) = (tmp_path / "encoding").iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert len(times) == 3
    (folder / "000001.npz").unlink()
    capsys.readouterr()
    again = encode(tmp_path, images, feature(weights))
    assert "2 of 3 blocks were done before" in capsys.readouterr().out
    assert again.note == "2 images unreadable", "those of finished blocks count too"
    np.testing.assert_array_equal(again.rows, rows)
    np.testing.assert_array_equal(again.present, present)
    changed = {path.name for path in folder.glob("*.npz") if times[path.name] != path.stat().st_mtime_ns}
    assert changed == {"000001.npz"}
    (folder / "000002.npz").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(UserError, match="000002.npz is damaged .* remove it and build again"):
        encode(tmp_path, images, feature(weights))


def pickled(path: Path) -> Path:
    torch.save({"visual.proj": torch.zeros(2)}, path)
    return path


def nan_weights(path: Path, weights: Path) -> Path:
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}, path)
    return path


def other_model(path: Path, weights: Path) -> Path:
    save_file({name: value for name, value in load_file(weights).items() if "resblocks.3" not in name}, path)
    return path


Refusal = tuple[Callable[[Path, Path], dict[str, Any]], str]
REFUSALS: dict[str, Refusal] = {
    "pickle": (lambda p, w: {"pretrained": str(pickled(p / "m.bin"))}, "end in '.bin'; expected .safetensors"),
    "missing pickle": (lambda p, w: {"pretrained": str(p / "m.pt")}, "m.pt do not exist; expected a .safetensors"),
    "pickle in disguise": (
        lambda p, w: {"pretrained": str(pickled(p / "m.safetensors"))},
        "cannot be loaded from .*m.safetensors",
    ),
    "missing weights": (lambda p, w: {"pretrained": str(p / "m.safetensors")}, "m.safetensors do not exist"),
    "weights of another model": (
        lambda p, w: {"pretrained": str(other_model(p / "m.safetensors", w))},
        "cannot be loaded from .*[Mm]issing key",
    ),
    "unknown model": (lambda p, w: {"model": "ViT-L-16-SigLIP-265"}, "did you mean 'ViT-L-16-SigLIP-256'"),
    "a model on a hub": (lambda p, w: {"model": "hf-hub:timm/x"}, "open_clip knows no image model 'hf-hub:timm/x'"),
    "unknown tag": (
        lambda p, w: {"model": "ViT-L-16-SigLIP-256", "pretrained": "webly"},
        "'webly' are no tag .*; expected one of: webli; or a .safetensors file",
    ),
    "tag of a file": (lambda p, w: {"pretrained": "webli"}, "is a file but its weights 'webli' are none"),
    "missing model file": (lambda p, w: {"model": str(p / "m.json")}, "m.json does not exist"),
    "model file of another kind": (
        lambda p, w: {"model": str(p / "m.json"), "x": (p / "m.json").write_text('{"embed_dim": 8}')},
        "no open_clip model config; expected the keys embed_dim, vision_cfg, text_cfg",
    ),
    "model file that is no JSON": (
        lambda p, w: {"model": str(p / "m.json"), "x": (p / "m.json").write_text("embed_dim: 8")},
        "m.json is not JSON",
    ),
    "impossible model": (
        lambda p, w: {
            "model": str(p / "m.json"),
            "x": (p / "m.json").write_text('{"embed_dim": 8, "vision_cfg": {"widht": 8}, "text_cfg": {}}'),
        },
        "cannot be loaded from .*widht",
    ),
    "other activation": (
        lambda p, w: {"model": "ViT-B-32", "pretrained": "openai"},
        "trained with QuickGELU; name the model ViT-B-32-quickgelu",
    ),
    "preprocessing unknown": (lambda p, w: {"model": "ViT-L-14"}, "name the open_clip_config.json"),
    "not a number": (lambda p, w: {"pretrained": str(nan_weights(p / "m.safetensors", w))}, "output is not finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, weights: Path, tmp_path: Path) -> None:
    spoil, message = REFUSALS[name]
    keys = spoil(tmp_path, weights)
    keys.pop("x", None)
    with pytest.raises(UserError, match=message) as caught:
        encode(tmp_path, [photo(0)], feature(weights, **keys))
    assert "\n" not in str(caught.value)


def test_only_safetensors_are_taken_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache holds the default model's weights as a pickle, and then as safetensors; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--ViT-L-16-SigLIP-256"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    pickled(snapshot / "open_clip_pytorch_model.bin")
    default = OpenClipFeature()
    with pytest.raises(UserError, match="'webli' of image model 'ViT-L-16-SigLIP-256' cannot be fetched") as caught:
        find_image_model(default.model, default.pretrained)
    assert "\n" not in str(caught.value)
    (snapshot / "open_clip_model.safetensors").write_bytes(b"weights")
    model = find_image_model(default.model, default.pretrained)
    assert model.weights == snapshot / "open_clip_model.safetensors"
    assert model.encoder == "open_clip:ViT-L-16-SigLIP-256 webli"
    assert model.preprocessing["size"] == 256 and tuple(model.preprocessing["mean"]) == (0.5, 0.5, 0.5)


def test_weights_in_a_file_keep_the_models_preprocessing(weights: Path, tmp_path: Path) -> None:
    """Of SigLIP's published weights, or of the config that stands beside the file; open_clip alone would guess."""
    assert tuple(find_image_model("ViT-L-16-SigLIP-256", str(weights)).preprocessing["mean"]) == (0.5, 0.5, 0.5)
    assert find_image_model("ViT-L-16-SigLIP-256", str(weights)).preprocessing["resize_mode"] == "squash"
    published = tmp_path / "open_clip_config.json"
    published.write_text(f'{{"model_cfg": {MODEL.read_text()}, "preprocess_cfg": {{"resize_mode": "longest"}}}}')
    model = find_image_model(str(published), str(weights))
    assert (model.preprocessing["resize_mode"], model.preprocessing["size"]) == ("longest", 64)
    wide = photo(0, size=(120, 40))
    squashed, cropped = (
        encode(tmp_path, [wide], feature(weights, model=path)).rows[0].astype(np.float32)
        for path in (str(published), str(MODEL))
    )
    assert squashed @ cropped < 0.999


def test_random_weights_are_a_function_of_the_seed(weights: Path, tmp_path: Path) -> None:
    write_random_encoder(str(MODEL), 0, tmp_path / "again.safetensors")
    write_random_encoder(str(MODEL), 1, tmp_path / "other.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()
    assert (tmp_path / "other.safetensors").read_bytes() != weights.read_bytes()
    with pytest.raises(UserError, match="exists; remove it"):
        write_random_encoder(str(MODEL), 0, weights)
    with pytest.raises(UserError, match="ends in '.bin'; expected .safetensors"):
        write_random_encoder(str(MODEL), 0, tmp_path / "weights.bin")


def num_blocks_done(store: Path) -> int:
    return len(list(store.with_name(f"{store.name}.encoding").rglob("0*.npz")))


@contextlib.contextmanager
def running_build(config: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "shards.build", "--config", str(config)]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def write_build(tmp_path: Path, weights: Path, name: str, num_images: int) -> Path:
    """A config of a build with two workers; the images are slow enough to decode for it to be caught at work."""
    photos = [photo(i, size=(640, 480), kind="JPEG") for i in range(20)]
    images: list[bytes] = [photos[i % len(photos)] for i in range(num_images)]
    images[5] = b"bad"
    write_raw(tmp_path / "raw", pa.array(images), list(range(num_images)))
    values = tiny_values(tmp_path / "raw", tmp_path / name)
    keys = {"source": "open_clip", "path": "images.parquet", "model": str(MODEL), "pretrained": str(weights)}
    values["data"]["features"] = {"image": keys | {"workers": 2, "batch_images": 32}}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_build_killed_at_work_goes_on_to_the_same_store(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed with two workers; gone on with, and compared with a whole one, in this process."""
    config = write_build(tmp_path, weights, "store", 1400)
    with running_build(config) as process:
        wait_for(lambda: num_blocks_done(tmp_path / "store") >= 1, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "store").exists()
    assert 1 <= num_blocks_done(tmp_path / "store") < 3
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive, "decoding processes outlive the build"
    capsys.readouterr()
    build_store(load_config(config, ["--data.features.image.workers", "0"]))
    assert "of 3 blocks were done before" in capsys.readouterr().out
    whole = write_build(tmp_path, weights, "whole", 1400)
    _, (rows,) = build_store(load_config(whole, ["--data.features.image.workers", "0"]))
    assert rows.note == "1 images unreadable"
    assert "done before" not in capsys.readouterr().out
    first, second = Store.open(tmp_path / "store"), Store.open(tmp_path / "whole")
    assert first.manifest.sha256 == second.manifest.sha256
    for path in first.path.iterdir():
        assert path.read_bytes() == (second.path / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_build(weights: Path, tmp_path: Path) -> None:
    config = write_build(tmp_path, weights, "store", 3000)
    with running_build(config) as process:
        wait_for(lambda: num_blocks_done(tmp_path / "store") >= 1, process)
        children = psutil.Process(process.pid).children()
        (worker, *_) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)
        killed = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - killed < 30
    assert process.returncode == 2, stderr
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "feature 'image': a process that decodes images died" in line and "build again" in line
    assert not (tmp_path / "store").exists()


def test_open_clip_can_be_imported(tmp_path: Path) -> None:
    """In a fresh process: torchvision's operators are declared where they cannot be loaded, and only there."""
    code = """
import torch
from shards.encoders.torchvision_import import make_torchvision_importable
if {exists}:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    assert make_torchvision_importable() is None
else:
    make_torchvision_importable()
    import torchvision.transforms
assert hasattr(torch.ops.torchvision, "nms")
"""
    for exists in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", code.format(exists=exists)], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
