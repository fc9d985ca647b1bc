"""Pushing an export: exactly its files reach the Hub, a stand-in of which runs on the loopback, or nothing does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmrl_dist import Recommender, add_items, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.checkpoint.export.reading import intact_files
from fmrl_dist.deploy.hub import push_to_hub
from fmrl_dist.model.export_config import CONFIG_FILE
from tests.fixtures.checkpoints import flip
from tests.fixtures.hub import TOKEN, HubServer, running_hub, used_here
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import contents, make_shop, refusal, run_here, train_here

constants = pytest.importorskip("huggingface_hub.constants")
ID = "somebody/demo"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    return train_here(make_shop(root), root / "run", "--train.max_steps", 1)


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    run_here(export.main, ["--checkpoint", run, "--output", run.parent / "export"])
    return run.parent / "export"


@pytest.fixture
def exported(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with running_hub() as server, used_here(server, tmp_path / "home"):
        yield server


def test_exactly_the_exports_files_are_uploaded(hub: HubServer, exported: Path) -> None:
    """Small files ride in the commit, large ones go by git LFS; what else lies in the folder stays here."""
    names = intact_files(exported)
    (exported / "evaluation.json").write_text("{}")
    (exported / "notes.txt").write_text("mine")
    url = push_to_hub(exported, ID)
    repository = hub.repositories[ID]
    assert url == f"{hub.url}/{ID}/commit/{repository.sha}"
    renamed = ("README.md", CONFIG_FILE)
    assert sorted(repository.files) == sorted(names)
    assert all(repository.files[name] == (exported / name).read_bytes() for name in names if name not in renamed)
    assert (repository.private, repository.commits) == (False, ["Export export"])
    assert 0 < len(hub.objects) < len(names)


def test_another_export_replaces_the_first(hub: HubServer, exported: Path, run: Path, tmp_path: Path) -> None:
    push_to_hub(exported, ID, private=True)
    assert hub.repositories[ID].private
    others = {"LICENSE": b"theirs", "users.npy": b"their array", "tagger.onnx": b"their graph"}
    hub.repositories[ID].files |= others
    run_here(export.main, ["--checkpoint", run, "--format", "onnx", "--output", tmp_path / "onnx"])
    push_to_hub(tmp_path / "onnx", ID, private=True, message="For phones")
    files = hub.repositories[ID].files
    assert files.keys() == (contents(tmp_path / "onnx") | others).keys()
    assert {name: files[name] for name in others} == others
    assert files["step.onnx"] == (tmp_path / "onnx" / "step.onnx").read_bytes()
    assert b'folder = Path(snapshot_download("somebody/demo"))' in files["README.md"]
    assert hub.repositories[ID].commits == ["Export export", "For phones"]


def test_the_card_on_the_hub_reads_the_repository(hub: HubServer, exported: Path, tmp_path: Path) -> None:
    """The folder's card reads the folder; both have the hash that stands beside them."""
    before = contents(exported)
    push_to_hub(exported, ID)
    assert contents(exported) == before and b'from_pretrained("export")' in before["README.md"]
    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.repositories[ID].files.items():
        (there / name).write_bytes(content)
    assert sorted(intact_files(there)) == sorted(before)
    assert 'Recommender.from_pretrained("somebody/demo")' in (there / "README.md").read_text()
    (tmp_path / "ids.txt").write_text(f"{Recommender.from_pretrained(there).item_ids[3]}\n")
    run_here(add_items.main, [there, "--remove", tmp_path / "ids.txt", "--output", tmp_path / "less"])
    assert 'Recommender.from_pretrained("less")' in (tmp_path / "less" / "README.md").read_text()
    assert "README.md" in intact_files(tmp_path / "less")


def test_what_was_pushed_recommends(hub: HubServer, exported: Path) -> None:
    push_to_hub(exported, ID)
    here, there = Recommender.from_pretrained(exported), Recommender.from_pretrained(ID, size=8)
    history = here.item_ids[3:6]
    assert there.recommend([history]) == here.recommend([history])


def test_what_is_private_does_not_become_public(hub: HubServer, exported: Path) -> None:
    push_to_hub(exported, ID)
    before = dict(hub.repositories[ID].files)
    with pytest.raises(UserError, match=f"^{ID} exists and is public; make it private on the Hub first, or push to"):
        push_to_hub(exported, ID, private=True)
    assert hub.repositories[ID].files == before and len(hub.repositories[ID].commits) == 1


@pytest.mark.parametrize("name", ["README.md", "vocab.parquet", "model.safetensors", CONFIG_FILE])
def test_a_damaged_export_is_not_uploaded(hub: HubServer, exported: Path, name: str) -> None:
    flip(exported / name, 100)
    with pytest.raises(UserError, match=f"^export {exported} is damaged"):
        push_to_hub(exported, ID)
    assert hub.requests == []


def test_no_other_file_is_uploaded(hub: HubServer, exported: Path) -> None:
    """Whatever the config of an export from elsewhere says."""
    (exported.parent / "secret").write_text("mine")
    config = json.loads((exported / CONFIG_FILE).read_text())
    del config["sha256"]
    config["sha256_of"]["../secret"] = file_sha256(exported.parent / "secret")
    (exported / CONFIG_FILE).write_text(json.dumps(config | {"sha256": json_sha256(config)}))
    with pytest.raises(UserError, match="config.json names files that an export does not have"):
        push_to_hub(exported, ID)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "mend"),
    [
        (401, "log in again with `hf auth login`"),
        (403, "use a token that may write to it"),
        (404, "check the id, and that the token may write to it"),
        (400, "try again later"),
    ],
)
def test_refusals_of_the_hub_are_one_line(hub: HubServer, exported: Path, status: int, mend: str) -> None:
    hub.refusal = status
    with pytest.raises(UserError) as caught:
        push_to_hub(exported, ID)
    line = str(caught.value)
    assert line.startswith(f"{exported} cannot be pushed to {ID} (") and mend in line and "\n" not in line
    assert TOKEN not in line
    assert hub.repositories == {}


def test_a_hub_that_is_not_there(hub: HubServer, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # where nothing listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot be pushed to \S+ \(.*; check the id and the connection$"):
            push_to_hub(exported, ID)


def test_without_a_token_nothing_is_asked_or_written(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(export.main, "--checkpoint", run, "--output", tmp_path / "new", "--push-to-hub", ID)
    assert hub.requests == [] and not (tmp_path / "new").exists()
    assert line == f"error: there is no token to push to {ID} with; log in with `hf auth login`, or set HF_TOKEN"


def test_the_command_exports_and_pushes(hub: HubServer, run: Path, tmp_path: Path) -> None:
    """In a process of its own, which finds the Hub by its environment."""
    command = [sys.executable, "-m", "fmrl_dist.export", "--checkpoint", str(run), "--output", str(tmp_path / "new")]
    command += ["--license", "apache-2.0", "--push-to-hub", ID, "--private"]
    environment = clean_environment() | hub.environment(tmp_path / "home")
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"pushed: {hub.url}/{ID}/commit/{hub.repositories[ID].sha}"
    assert hub.repositories[ID].files == contents(tmp_path / "new")
    card = hub.repositories[ID].files["README.md"]
    assert b'from_pretrained("somebody/demo")' in card and b"license: apache-2.0" in card


def test_senseless_options(run: Path) -> None:
    assert "--private is of --push-to-hub; give both" in refusal(export.main, "--checkpoint", run, "--private")
    line = refusal(export.main, "--checkpoint", run, "--push-to-hub", "not an/id/at all")
    assert "'not an/id/at all' is not the id of a repository on the Hub" in line
