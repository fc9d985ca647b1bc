"""The folder of the demo data: the same bytes for the same arguments, written once, and what is refused."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fmrl_dist.base.errors import EXIT_USER_ERROR, UserError
from fmrl_dist.config.features import PixelsFeature
from fmrl_dist.config.loading import DEMO_CONFIG, load_config
from shards.demo import folder
from shards.demo.folder import FILES, write_demo
from tests.fixtures.commands import run_main
from tests.fixtures.demo import ITEMS, SEED, USERS


def test_config_fits_the_generator() -> None:
    data = load_config(DEMO_CONFIG).data
    image = data.features["image"]
    assert data.demo is not None and isinstance(image, PixelsFeature)
    assert (data.demo.users, data.demo.items, data.demo.seed) == (USERS, ITEMS, SEED)
    assert (data.sequences.path, data.items.path, image.path) == tuple(f"demo/{f}" for f in FILES)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_demo(tmp_path / name, users=60, items=100, seed=seed)
    for file in FILES:
        one, two, other = ((tmp_path / name / "demo" / file).read_bytes() for name in ("one", "two", "other"))
        assert one == two, file
        assert one != other, file


def test_command_writes_once_and_refuses_another_seed(tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path), "--users", "30", "--items", "40")
    ended = run_main("shards.demo", *arguments)
    assert (ended.code, ended.stdout) == (0, f"{tmp_path / 'demo'}: 30 users, 40 items, seed 0\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == sorted(FILES)
    before = (tmp_path / "demo" / FILES[0]).stat().st_mtime_ns
    assert run_main("shards.demo", *arguments).code == 0
    other = run_main("shards.demo", *arguments, "--seed", "1")
    assert other.code == EXIT_USER_ERROR
    assert other.stderr.count("\n") == 1
    assert "'seed': 0" in other.stderr
    assert (tmp_path / "demo" / FILES[0]).stat().st_mtime_ns == before


def test_what_another_process_writes_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the lock; and a folder of a process with the same id, as on another machine."""
    theirs = tmp_path / f".demo-{os.getpid()}"
    theirs.mkdir()
    original = folder.only_writer

    def write_first(target: Path) -> AbstractContextManager[bool]:
        monkeypatch.setattr(folder, "only_writer", original)
        write_demo(tmp_path, users=30, items=40, seed=1)
        return original(target)

    monkeypatch.setattr(folder, "only_writer", write_first)
    with pytest.raises(UserError, match="'seed': 1}; expected .*'seed': 0}"):
        write_demo(tmp_path, users=30, items=40, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [theirs.name, "demo"]


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "sequences.parquet").write_text("mine")
    with pytest.raises(UserError, match="no demo data of ours"):
        write_demo(tmp_path, users=30, items=40, seed=0)
    assert (tmp_path / "demo" / "sequences.parquet").read_text() == "mine"


def test_folder_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_demo(tmp_path, users=30, items=40, seed=0)
    (tmp_path / "demo" / "images.parquet").unlink()
    with pytest.raises(UserError, match="images.parquet holds no demo data"):
        write_demo(tmp_path, users=30, items=40, seed=0)


@pytest.mark.parametrize(("users", "items", "seed"), [(0, 40, 0), (30, 9, 0), (30, 40, -1)])
def test_impossible_numbers(tmp_path: Path, users: int, items: int, seed: int) -> None:
    with pytest.raises(UserError, match="expected at least"):
        write_demo(tmp_path, users, items, seed)
    assert list(tmp_path.iterdir()) == []


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_demo(tmp_path / "root", users=30, items=40, seed=0)
