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
from safetensors.torch import save_file

from fmrl_dist import evaluate, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export_folder import ITEMS_FILE, read_export, read_export_vocabulary
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


def test_every_byte_is_checked(whole: Path, tmp_path: Path) -> None:
    """A damaged weight is a number like any other: only its hash tells."""
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
    for name, read in {
        CONFIG_FILE: FMRLRec.from_pretrained,
        MODEL_FILE: FMRLRec.from_pretrained,
        ITEMS_FILE: read_export,
        VOCAB_FILE: read_export_vocabulary,
    }.items():
        size = (folder / name).stat().st_size
        for position in range(3, size, size // 12):
            flip(folder / name, position)
            with pytest.raises(UserError, match=r"is damaged|has format_version \d; expected 2"):
                read(folder)
            flip(folder / name, position)
        read(folder)


def test_an_export_without_hashes_is_read(whole: Path, tmp_path: Path) -> None:
    """Version 1 had none; but version 1 with hashes is version 2, damaged."""
    folder = tmp_path / "export"
    shutil.copytree(whole, folder)
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


def test_a_foreign_folder_and_another_version(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an export: it has no config.json; make one with"):
        FMRLRec.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="config.json has format_version None; expected 2$"):
        FMRLRec.from_pretrained(tmp_path)
    shutil.copytree(whole, tmp_path / "export")
    edit(format_version=3)(tmp_path / "export")
    with pytest.raises(UserError, match="config.json has format_version 3; expected 2$"):
        read_export(tmp_path / "export")
