"""Files of a table: patterns, lists and URLs; folders of parts are in tests/shards/tables/test_parts.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.table_files import rooted, table_files


def files(root: Path, path: str | tuple[str, ...], downloads: Path | None = None) -> list[str]:
    return [str(file.relative_to(root)) for file in table_files(rooted(root, path), downloads=downloads)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ["p10.csv", "p2.csv", "p1.csv.gz", "a/x.csv", "a/b/y.csv", "t.parquet", "[1].csv", "_p3.csv", "r.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_patterns_and_lists(root: Path) -> None:
    """Numbers are compared as numbers; a file whose own name looks like a pattern is that file."""
    assert files(root, "p*.csv") == ["p2.csv", "p10.csv"]
    assert files(root, "p*.csv*") == ["p1.csv.gz", "p2.csv", "p10.csv"]
    assert files(root, "p?.csv") == ["p2.csv"]
    assert files(root, "p[12]*.csv") == ["p2.csv", "p10.csv"]
    assert files(root, "a/**/*.csv") == ["a/b/y.csv", "a/x.csv"]
    assert files(root, "[1].csv") == ["[1].csv"]
    assert files(root, ("p10.csv", "a/x.csv", "p2*")) == ["p10.csv", "a/x.csv", "p2.csv"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("q*.csv", r"no file matches .*q\*.csv; check data.root"),
        (("p*.csv", "p2.csv"), "names .*p2.csv twice; name each file once"),
        (("p2.csv", "t.parquet"), "holds p2.csv and t.parquet; expected one kind"),
        ("r*", r"ends in '.txt'; expected .parquet, .csv, .tsv, .jsonl or .json \(text also with .gz or .zst\)"),
        ((), "the list of a table's files is empty"),
        ("s3://bucket/x.csv", "is a URL; copy the file here first"),
    ],
)
def test_refusals(path: str | tuple[str, ...], message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        files(root, path)


def test_urls_are_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole or not at all, and anew when the original has changed."""
    memory = fsspec.filesystem("memory")
    for name, data in (("e1.csv", b"one"), ("e2.csv", b"two")):
        memory.pipe_file(f"/tables/{name}", data)
    for _ in range(2):
        found = table_files(["memory://tables/e*.csv"], downloads=tmp_path / "d")
        assert [file.read_bytes() for file in found] == [b"one", b"two"]
    assert capsys.readouterr().out.count("copying ") == 2
    memory.pipe_file("/tables/e1.csv", b"changed")
    found = table_files(["memory://tables/e1.csv"], downloads=tmp_path / "d")
    assert [file.read_bytes() for file in found] == [b"changed"]
    (tmp_path / "here.csv").write_text("x")
    [copy] = table_files([f"file://{tmp_path}/here.csv"], downloads=tmp_path / "d")
    assert copy.parent == tmp_path / "d" and copy.name.endswith("-here.csv")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/x.csv", r"memory://nowhere/x.csv cannot be read"),
        ("memory://nowhere/*.csv", "no file matches memory://nowhere/"),
        ("nothing://x/y.csv", "cannot be read: Protocol not known: nothing"),
        ("nothing://me:secret@x/y.csv", r"nothing://\*\*\*@x/y.csv cannot be read"),
    ],
)
def test_urls_that_cannot_be_read(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        table_files([url], downloads=tmp_path / "d")
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").iterdir())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of a plain web server, which knows no ranges, and of its folder ``web``."""
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_file_of_a_web_server(server: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 50_000
    (tmp_path / "web" / "e.csv.gz").write_bytes(data)
    [copy] = table_files([f"{server}/e.csv.gz?token=secret"], downloads=tmp_path / "d")
    assert copy.read_bytes() == data and copy.name.endswith("-e.csv.gz")
    with pytest.raises(UserError, match=rf"{server}/none.csv cannot be read"):
        table_files([f"{server}/none.csv"], downloads=tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == [copy]
