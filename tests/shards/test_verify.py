"""``shards.verify``: one line for a sound store, one for each problem of a damaged store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from shards.verify import main
from tests.fixtures.stores import tiny_config, write_raw


def test_a_sound_store_is_accepted(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main([str(store.path)])
    progress, ok = capsys.readouterr().out.splitlines()
    assert progress.startswith("verify: 9 of 9 blocks, ")
    assert ok == f"ok: {store.path}: 5 shards, 9 blocks, 4 users, 6 items, 15 events"


def cut_tar(store: Path) -> None:
    shard = store / "items-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-20])


def flip_byte(store: Path) -> None:
    data = bytearray((store / "train-000000.tar").read_bytes())
    data[700] ^= 4
    (store / "train-000000.tar").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(cut_tar, "items-000000.tar: "), (flip_byte, "train block 0 (train-000000.tar at byte 0)")],
)
def test_damage_is_reported(
    damage: Callable[[Path], None], problem: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(store.path)
    with pytest.raises(UserError, match="problems; build it again"):
        main([str(store.path)])
    assert any(line.startswith(f"problem: {problem}") for line in capsys.readouterr().out.splitlines())


def test_each_problem_is_reported(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    (store.path / "items-000001.tar").unlink()
    (store.path / "train-000099.tar").write_bytes(b"stray")
    (store.path / "users.parquet").write_bytes((store.path / "vocab.parquet").read_bytes())
    with pytest.raises(UserError, match=r"has \d+ problems"):
        main([str(store.path)])
    lines = capsys.readouterr().out.splitlines()
    for words in ("items-000001.tar: missing", "train-000099.tar: not in the manifest", "users.parquet: its rows"):
        assert any(words in line for line in lines), lines


def test_foreign_files_are_noted_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    config = tiny_config(tmp_path / "raw", tmp_path / "store")
    build_store(config)
    (tmp_path / "store" / "README.md").write_text("mine")
    capsys.readouterr()
    main([str(tmp_path / "store")])
    note, _, ok = capsys.readouterr().out.splitlines()
    assert note == "note: README.md: not a file of a store, and not read"
    assert ok.startswith("ok: ")
    with pytest.raises(UserError, match="holds README.md, which a store does not have"):
        build_store(config, overwrite=True)
    (tmp_path / "store" / "README.md").unlink()
    (tmp_path / "store" / "train-000007.tar").mkdir()
    with pytest.raises(UserError, match="holds train-000007.tar, which a store does not have"):
        build_store(config, overwrite=True)
