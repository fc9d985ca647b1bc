"""``shards.inspect``: one screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.inspect import main
from shards.store.builder import build_store
from tests.fixtures.stores import tiny_config, write_raw


def test_inspect_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    main([str(store.path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert any(line.split()[:3] == ["train", "1", "2"] for line in lines)
