"""The page about a store: what it says, what it escapes, and that it needs no times, features, titles or report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store
from shards.inspect import main
from shards.store.build_report import BUILD_REPORT_FILE
from shards.store.builder import build_store
from shards.store_page.page import write_store_page
from shards.store_page.words import shown_time
from tests.fixtures.store_pages import HOSTILE, write_page_shop
from tests.fixtures.stores import tiny_config, write_histories, write_raw

VOID = {"meta", "link", "img", "br", "col"}


class Reader(HTMLParser):
    """Every element and text of a page; complains of tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_page_shop(tmp_path_factory.mktemp("page") / "raw")


@pytest.fixture(scope="module")
def store(config: Config) -> Store:
    return build_store(config)[0]


def test_the_page_is_one_file_that_asks_for_nothing(store: Store, config: Config, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    output = tmp_path / "store.html"
    main([str(store.path), "--html", str(output), "--config", str(tmp_path / "c.yaml")])
    page = Reader(output.read_text(encoding="utf-8"))
    assert not page.tags() & {"script", "iframe", "object", "form", "base"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
        assert re.match(r"#|data:,$", attributes.get("href") or "#")
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) >= 20 and all(attributes["alt"] for attributes in pictures)
    assert max(len(attributes["src"] or "") for attributes in pictures) < 6000
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(names)) == len(names)


def test_hostile_titles_are_text(store: Store, tmp_path: Path) -> None:
    write_store_page(store, tmp_path / "store.html")
    text = (tmp_path / "store.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "\u202e" not in text
    assert HOSTILE.replace("\u202e", "\\u202e") in Reader(text).texts


def test_what_the_page_counts(store: Store, tmp_path: Path) -> None:
    write_store_page(store, tmp_path / "store.html")
    texts = Reader((tmp_path / "store.html").read_text(encoding="utf-8")).texts
    words = " ".join(" ".join(texts).split())
    manifest = store.manifest
    assert f"{manifest.num_users:,}" in texts and f"{manifest.num_events:,}" in texts
    assert "vector 40 of 40 45 10 25.0 %" in words, "ten equal rows are 45 pairs"
    assert "feature given not an image empty cells of unknown items image 40 8 0 0" in words
    assert "users with fewer than 2 events taken away" in words
    assert "date (UTC)" in words and "2014-05" in words


def test_the_same_store_gives_the_same_page(store: Store, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_store_page(store, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_bare_store_has_a_page(tmp_path: Path) -> None:
    """No times, titles, features, evaluated users or report: the page says so."""
    write_raw(tmp_path / "raw")
    write_histories(tmp_path / "raw" / "sequences.parquet", {"u1": ["a", "b"], "u2": ["f", "f"]})
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store", items={}, features={}))
    (store.path / BUILD_REPORT_FILE).unlink()
    write_store_page(store, tmp_path / "store.html")
    words = " ".join(Reader((tmp_path / "store.html").read_text(encoding="utf-8")).texts)
    for line in ("The store has no times", "This store has no build-report.json", "The store has no item features"):
        assert line in words
    assert "item f" in words


def test_an_inline_store_and_numbers_for_times(tmp_path: Path) -> None:
    config = write_page_shop(tmp_path / "raw")
    table = pq.read_table(tmp_path / "raw" / "sequences.parquet").to_pydict()
    write_histories(
        tmp_path / "raw" / "sequences.parquet",
        dict(zip(table["user_id"], table["item_ids"], strict=True)),
        {user: list(range(len(items))) for user, items in zip(table["user_id"], table["item_ids"], strict=True)},
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml().replace("feature_mode: table", "feature_mode: inline"))
    store, _ = build_store(load_config(tmp_path / "c.yaml"))
    write_store_page(store, tmp_path / "store.html")
    assert "time, as in the raw table" in Reader((tmp_path / "store.html").read_text(encoding="utf-8")).texts


def test_a_damaged_block_is_said(config: Config, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(config.to_yaml().replace("a-store-with-a-name", "another"))
    store, _ = build_store(load_config(tmp_path / "c.yaml"))
    shard = store.path / "test-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="test-000000.tar"):
        write_store_page(store, tmp_path / "store.html")
    assert not (tmp_path / "store.html").exists()


@pytest.mark.parametrize(
    ("time", "latest", "span", "shown"),
    [
        (1_400_000_000, 1_500_000_000, 86_400 * 900, "2014-05"),
        (1_400_000_000, 1_400_500_000, 86_400 * 5, "2014-05-13"),
        (1_400_000_000, 1_400_000_100, 100, "05-13 16:53"),
        (7, 9, 9, "7"),
        (-(2**62), 1_400_000_000, 2**62, f"{-(2**62):,}"),
    ],
)
def test_times_in_words(time: int, latest: int, span: int, shown: str) -> None:
    assert shown_time(time, latest, span) == shown
