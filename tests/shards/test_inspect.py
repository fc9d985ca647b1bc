"""``shards.inspect``: one screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.inspect import main
from shards.store.build_report import BUILD_REPORT_FILE
from shards.store.builder import build_store
from tests.fixtures.browser import serve
from tests.fixtures.stores import tiny_config, write_raw
from tests.fixtures.training import refusal


def test_inspect_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    main([str(store.path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 100
    assert any("users with fewer than 2 events" in line for line in lines)
    assert any(line.split()[:3] == ["train", "1", "2"] for line in lines)


def test_a_store_without_a_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    (store.path / BUILD_REPORT_FILE).unlink()
    main([str(store.path)])
    assert "(no build-report.json: an older version built the store, or" in capsys.readouterr().out
    (store.path / BUILD_REPORT_FILE).write_text("{}")
    assert "build-report.json is of version 'None', expected 1" in refusal(main, store.path)


def test_a_store_at_a_url_has_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    server = serve(store.path)
    try:
        main([server.url])
        assert "users with fewer than 2 events" in capsys.readouterr().out
        (store.path / BUILD_REPORT_FILE).unlink()
        main([server.url])
        assert "(no build-report.json" in capsys.readouterr().out
    finally:
        server.stop()


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    assert "is not a folder; make it" in refusal(main, store.path, "--html", tmp_path / "no" / "page.html")
    assert "is a folder; expected a file" in refusal(main, store.path, "--html", tmp_path)
    assert "--config goes with --html FILE" in refusal(main, store.path, "--config", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("data: {root: nowhere}")
    assert "no feature that is made of images" in refusal(
        main, store.path, "--html", tmp_path / "page.html", "--config", tmp_path / "c.yaml"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "raw", "store"]
