"""An export on the Hub is downloaded, file by file as needed; folders win; what cannot be found is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.download import export_at
from fmrl_dist.deploy.recommender import Recommender
from tests.fixtures.exports import write_random_export
from tests.fixtures.hub import HubRepository, HubServer, running_hub, used_here

NAME = "shop/model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub with an export, and files that nobody needs to recommend."""
    folder = write_random_export(tmp_path / "export")
    with running_hub() as server, used_here(server, tmp_path / "home"):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        others = {"fit-text.safetensors": b"fit", "model.bin": b"pickle", "run.py": b"code", "evaluation.json": b"{}"}
        server.repositories[NAME] = HubRepository(private=False, files=files | others)
        yield server


def test_a_repository_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    recommender = Recommender.from_pretrained(NAME, size=8, revision="v1")
    local = Recommender.from_pretrained(tmp_path / "export", size=8)
    assert recommender.recommend([["i3", "i14"], []]) == local.recommend([["i3", "i14"], []])
    asked = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    names = {"config.json", "model.safetensors", "item_embeddings.safetensors", "rotation.safetensors", "vocab.parquet"}
    assert asked == names
    assert any("/revision/v1" in request for request in hub.requests)
    assert not list(tmp_path.glob("home/**/run.py"))


def test_a_folder_wins(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "export").rename(tmp_path / "shop" / "model")
    monkeypatch.chdir(tmp_path)
    assert Recommender.from_pretrained(NAME).num_items == 30
    assert hub.requests == []


def test_what_was_downloaded_serves_without_a_connection(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    Recommender.from_pretrained(NAME)
    hub.refusal = 503
    assert Recommender.from_pretrained(NAME).num_items == 30


def test_a_damaged_download_is_refused(hub: HubServer) -> None:
    hub.repositories[NAME].files["item_embeddings.safetensors"] += b"\0"
    with pytest.raises(UserError, match=r"item_embeddings\.safetensors is not what its sha256 says"):
        Recommender.from_pretrained(NAME)


def test_what_is_no_export(hub: HubServer) -> None:
    hub.repositories["other/bert"] = HubRepository(False, {"config.json": b'{"model_type": "bert"}'})
    with pytest.raises(UserError, match="format_version None"):
        Recommender.from_pretrained("other/bert")


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "a/b/c", "../up", "", "https://hub/a/b"])
def test_neither_a_folder_nor_an_id(source: str) -> None:
    with pytest.raises(UserError, match="is neither a folder nor the id of a repository on the Hub, such as"):
        export_at(source)


def test_a_repository_that_there_is_not(hub: HubServer) -> None:
    with pytest.raises(UserError) as refused:
        export_at("shop/gone", "v2")
    line = str(refused.value)
    assert line.startswith("shop/gone is no folder here, and cannot be downloaded from the Hub at revision 'v2' (Repo")
    assert line.endswith("; check its name, your rights and the connection") and "\n" not in line


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'fmrl-dist\[hub\]'"):
        export_at("shop/model")
