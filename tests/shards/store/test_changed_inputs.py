"""Raw tables that change while a build reads them: one line says so, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from shards.encoders.item_images import ImageTable
from shards.store import raw_data
from shards.store.builder import build_store
from shards.tables.file_states import check_unchanged, file_states
from shards.tables.formats import item_rows
from tests.fixtures.stores import png, store_contents, tiny_config, write_histories, write_raw

Change = Callable[[Path], None]


def replaced(path: Path) -> None:
    """By a copy that keeps size and time, as some tools of backups make one."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def written_to(path: Path) -> None:
    """With what it held."""
    path.write_bytes(path.read_bytes())


def removed(path: Path) -> None:
    path.unlink()


def with_another_part(path: Path) -> None:
    write_histories(path.with_name("part-2.parquet"), {"new": ["a", "b", "c"]})


CHANGES: dict[str, tuple[str, Change, str]] = {
    "items": ("items.parquet", replaced, "items.parquet changed while it was read: it had "),
    "histories": ("parts/part-1.parquet", written_to, "part-1.parquet changed while it was read: it had "),
    "a new part": ("parts/part-1.parquet", with_another_part, "part-2.parquet has come since the table's other files"),
    "no part": ("parts/part-1.parquet", removed, "parts is a folder without .parquet"),
    "an array": ("vectors.npy", written_to, "vectors.npy changed while it was read: it had "),
    "images": ("images.parquet", replaced, "images.parquet changed while it was read: it had "),
}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    write_raw(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "sequences.parquet").rename(tmp_path / "parts" / "part-1.parquet")
    np.save(tmp_path / "vectors.npy", np.ones((6, 3), np.float16))
    pq.write_table(pa.table({"item_id": ["a"], "image": [png((200, 0, 0))]}), tmp_path / "images.parquet")
    features = {
        "vector": {"source": "npy", "path": "vectors.npy"},
        "image": {"source": "pixels", "path": "images.parquet"},
    }

    def of(**data: Any) -> Any:
        return tiny_config(tmp_path, tmp_path / "store", features=features, sequences={"path": "parts"}, **data)

    return of


@pytest.mark.parametrize("data", [{}, {"interactions": {"duplicates": "first"}}], ids=["as they are", "prepared"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_changes_once_it_is_hashed(
    name: str, data: dict[str, Any], config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store that is there stays; so do the results of other builds."""
    build_store(config())
    before = store_contents(tmp_path / "store")
    file, change, message = CHANGES[name]
    hashed = raw_data.input_files

    def and_changed(config: Any) -> dict[str, str]:
        files = hashed(config)
        change(tmp_path / file)
        return files

    monkeypatch.setattr(raw_data, "input_files", and_changed)
    with pytest.raises(UserError) as refused:
        build_store(config(**data), overwrite=True)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert store_contents(tmp_path / "store") == before
    assert not list((tmp_path / "store.build").glob("interactions/*")) or not data


def test_a_table_of_images_that_changes_after_the_events_were_prepared(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ImageTable.open

    def and_replaced(*arguments: Any) -> ImageTable:
        table = opened(*arguments)
        replaced(tmp_path / "images.parquet")
        return table

    monkeypatch.setattr(ImageTable, "open", and_replaced)
    with pytest.raises(UserError, match="images.parquet changed while it was read"):
        build_store(config(interactions={"duplicates": "first"}))
    assert not (tmp_path / "store").exists()


def test_items_as_published_that_change_make_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be found again by the hash of other files."""
    file = tmp_path / "meta.jsonl"
    file.write_text("x")
    source = item_rows.ItemSource(("item_id",), lambda path: iter([item_rows.ItemRow("a")]))
    hashed = item_rows.file_sha256

    def and_changed(path: Path) -> str:
        sha256 = hashed(path)
        written_to(path)
        return sha256

    monkeypatch.setattr(item_rows, "file_sha256", and_changed)
    with pytest.raises(UserError, match="meta.jsonl changed while it was read"):
        item_rows.plain_items("amazon2018", [file], source, tmp_path / "tables", 0.0)
    assert not list((tmp_path / "tables").iterdir())


def test_rights_and_links_are_no_change(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    before = file_states([file])
    file.chmod(0o444)
    os.link(file, tmp_path / "b")
    check_unchanged(before, file_states([file]))
