"""An export that is damaged, foreign or of another version is refused in one line by all readers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmrl_dist import evaluate, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.checkpoint.export.files import CARD_FILE, ITEMS_FILE
from fmrl_dist.checkpoint.export.reading import intact_files, read_export, read_export_vocabulary
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.model.export_config import CONFIG_FILE
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from tests.fixtures.checkpoints import flip, reseal_export
from tests.fixtures.training import contents, make_shop, refusal, run_here, train_here

Spoiler = Callable[[Path], object]


def edit(**changes: Any) -> Spoiler:
    """Replace keys of config.json."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))

    return spoil


def edit_model(**changes: Any) -> Spoiler:
    def spoil(folder: Path) -> None:
        edit(model=json.loads((folder / CONFIG_FILE).read_text())["model"] | changes)(folder)

    return spoil


def cut(name: str, size: int) -> Spoiler:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name: str, data: bytes) -> Spoiler:
    return lambda folder: (folder / name).write_bytes(data)


def halve(folder: Path) -> None:
    tensors = FMRLRec.from_pretrained(folder).half().state_dict()
    save_file(tensors, folder / MODEL_FILE)


DAMAGE: dict[str, Spoiler] = {
    "config is not JSON": write(CONFIG_FILE, b"{"),
    "config is not UTF-8": write(CONFIG_FILE, b'{"a": "\xff"}'),
    "config is a list": write(CONFIG_FILE, b"[1]"),
    "config without a model": write(CONFIG_FILE, b'{"format_version": 1}'),
    "model is a list": edit(model=[1]),
    "unknown argument": edit_model(activation="relu"),
    "no sizes": edit_model(sizes=[]),
    "sizes are words": edit_model(sizes=["8"]),
    "another width": edit_model(sizes=[4, 12]),
    "another depth": edit_model(depth=3),
    "absurd depth": edit_model(depth=10**7),
    "another feature dim": edit_model(feature_dims={"vector": 7, "colour": 4}),
    "impossible rate": edit_model(dropout=2),
    "no model": lambda folder: (folder / MODEL_FILE).unlink(),
    "model cut": cut(MODEL_FILE, -1),
    "model empty": cut(MODEL_FILE, 0),
    "model in half precision": halve,
    "model of others": lambda folder: save_file({"weight": torch.zeros(2)}, folder / MODEL_FILE),
}
ITEM_DAMAGE: dict[str, Spoiler] = {
    "another number of items": edit(num_items=41),
    "no number of items": lambda folder: edit_away(folder, "num_items"),
    "no origin": lambda folder: edit_away(folder, "origin"),
    "odd origin": edit(origin={"step": 1}),
    "odd max_length": edit(max_length="50"),
    "no history": edit(max_length=0),
    "odd predict_first": edit(predict_first=1),
    "odd normalize": edit(normalize="no"),
    "items cut": cut(ITEMS_FILE, -1),
    "no items": lambda folder: (folder / ITEMS_FILE).unlink(),
    "items in half precision": lambda folder: save_file(
        {"item_embeddings": torch.zeros(40, 8, dtype=torch.float16)}, folder / ITEMS_FILE
    ),
    "items of others": lambda folder: save_file({"weight": torch.zeros(40, 8)}, folder / ITEMS_FILE),
}


def edit_away(folder: Path, key: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config[key]
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    words = ("--model.sizes", "[4, 8, 16]", "--model.width", 16, "--eval.size", 16, "--train.max_steps", 1)
    run = train_here(make_shop(root), root / "run", *words)
    run_here(export.main, ["--checkpoint", run, "--size", 8, "--output", root / "export"])
    return root / "export"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_byte_is_checked(dtype: str, whole: Path, whole_int8: Path, tmp_path: Path) -> None:
    """A damaged weight is a number like any other: only its hash tells."""
    folder = tmp_path / "export"
    shutil.copytree(whole if dtype == "float32" else whole_int8, folder)
    for name, read in {
        CONFIG_FILE: FMRLRec.from_pretrained,
        MODEL_FILE: FMRLRec.from_pretrained,
        ITEMS_FILE: read_export,
        VOCAB_FILE: read_export_vocabulary,
    }.items():
        size = (folder / name).stat().st_size
        for position in range(3, size, size // 12):
            flip(folder / name, position)
            with pytest.raises(UserError, match=r"is damaged|has format_version \d; this fmrl_dist reads 1 to 5"):
                read(folder)
            flip(folder / name, position)
        read(folder)


@pytest.mark.parametrize("words", [("--dtype", "float16", "--vectors", 4), ("--format", "onnx", "--dtype", "int8")])
def test_a_damaged_file_of_any_kind_is_found(words: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    """Also those that only others read: graphs, arrays, vectors, the model card."""
    if "onnx" in words:
        pytest.importorskip("onnxruntime")
    folder = tmp_path / "export"
    run_here(export.main, ["--checkpoint", whole.parent / "run", "--output", folder, *words])
    assert sorted(intact_files(folder)) == sorted(path.name for path in folder.iterdir())
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        for position in range(1, size, max(size // 5, 1)):
            flip(path, position)
            with pytest.raises(UserError, match=r"is damaged|has format_version"):
                intact_files(folder)
            flip(path, position)
        path.rename(tmp_path / "gone")
        with pytest.raises(UserError, match=r"is damaged|is not an export"):
            intact_files(folder)
        (tmp_path / "gone").rename(path)
    intact_files(folder)


def test_older_exports_are_read(whole: Path, tmp_path: Path) -> None:
    """Version 2 had no dtype, and version 1 no hashes; but version 1 with hashes is version 2, damaged."""
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
    (folder / CARD_FILE).unlink()
    for key in ("format", "dtype", "quality"):
        edit_away(folder, key)
    config = json.loads((folder / CONFIG_FILE).read_text()) | {"format_version": 2}
    del config["sha256_of"][CARD_FILE], config["sha256"]
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"sha256": json_sha256(config)}))
    assert torch.equal(read_export(folder).items, read_export(whole).items)
    edit(format_version=1)(folder)
    with pytest.raises(UserError, match="is damaged"):
        read_export(folder)
    for key in ("sha256_of", "sha256"):
        edit_away(folder, key)
    assert torch.equal(read_export(folder).items, read_export(whole).items)


@pytest.mark.parametrize("name", [*DAMAGE, *ITEM_DAMAGE])
def test_damage_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
    (DAMAGE | ITEM_DAMAGE)[name](folder)
    reseal_export(folder)
    before = contents(folder)
    expected = f"export {re.escape(str(folder))} is damaged"
    for read in (FMRLRec.from_pretrained, read_export) if name in DAMAGE else (read_export,):
        with pytest.raises(UserError, match=expected) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    assert f"error: export {folder} is damaged" in refusal(evaluate.main, "--checkpoint", folder)
    assert contents(folder) == before


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoiler:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return spoil


B_SCALE = "blocks.0.lru.B.scale"
INT8_DAMAGE: dict[str, Spoiler] = {
    "no scales of items": edit_tensors(ITEMS_FILE, lambda t: t.pop("item_embeddings.scale")),
    "scales of fewer items": edit_tensors(
        ITEMS_FILE, lambda t: t.update({"item_embeddings.scale": t["item_embeddings.scale"][:-1].clone()})
    ),
    "a scale that is not a number": edit_tensors(ITEMS_FILE, lambda t: t["item_embeddings.scale"][3:].fill_(torch.nan)),
    "scales in half precision": edit_tensors(MODEL_FILE, lambda t: t.update({B_SCALE: t[B_SCALE].half()})),
    "scales of nothing": edit_tensors(MODEL_FILE, lambda t: t.update({"blocks.0.lru.c.scale": torch.ones(1)})),
    "an infinite scale": edit_tensors(MODEL_FILE, lambda t: t[B_SCALE].fill_(torch.inf)),
    "a matrix in float32": edit_tensors(
        MODEL_FILE, lambda t: t.update({"encoder.weight": t["encoder.weight"].float()})
    ),
    "a bias in int8": edit_tensors(MODEL_FILE, lambda t: t.update({"encoder.bias": t["encoder.bias"].to(torch.int8)})),
    "another dtype": edit(dtype="float16"),
    "an unknown dtype": edit(dtype="int4"),
    "no dtype": lambda folder: edit_away(folder, "dtype"),
    "an unknown format": edit(format="pickle"),
}


@pytest.fixture(scope="module")
def whole_int8(whole: Path) -> Path:
    words = ["--checkpoint", whole.parent / "run", "--size", 8, "--dtype", "int8"]
    run_here(export.main, [*words, "--output", whole.parent / "int8"])
    return whole.parent / "int8"


@pytest.mark.parametrize("name", INT8_DAMAGE)
def test_damaged_scales_are_refused(whole_int8: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(whole_int8, folder)
    read_export(folder)
    INT8_DAMAGE[name](folder)
    reseal_export(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=f"export {re.escape(str(folder))} is damaged") as caught:
        read_export(folder)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_foreign_folder_and_another_version(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an export: it has no config.json; make one with"):
        FMRLRec.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "bert"}')
    found = "config.json has format_version {}; this fmrl_dist reads 1 to 5"
    with pytest.raises(UserError, match=found.format(None) + "; expected an export: make one with fmrl_dist.export$"):
        FMRLRec.from_pretrained(tmp_path)
    shutil.copytree(whole, tmp_path / "export")
    for version in (6, 10**30):
        edit(format_version=version)(tmp_path / "export")
        with pytest.raises(UserError, match=found.format(version) + ": update fmrl_dist, or export the run again with"):
            read_export(tmp_path / "export")
    for odd in (0, True, "2", 2.0):
        edit(format_version=odd)(tmp_path / "export")
        with pytest.raises(UserError, match=found.format(repr(odd)) + "; expected an export"):
            read_export(tmp_path / "export")
