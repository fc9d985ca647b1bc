"""Small Parquet files that unpack to more than the memory: read in pieces that fit, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parquet import MAX_CELL_BYTES, bounded_table, open_parquet

MEMORY = 40_000_000
LONG = "x" * 1_000_000


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=MEMORY))


def write(path: Path, column: pa.Array) -> Path:
    pq.write_table(pa.table({"a": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < MEMORY / 100
    return path


def repeated(text: str | bytes, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def batches(path: Path, rows_at_once: int = 65_536) -> list[pa.Table]:
    with open_parquet(path, "the table") as file:
        return list(file.batches(["a"], rows_at_once))


def test_a_run_of_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.parquet", pa.array(np.zeros(3_000_000, np.int64)))
    with pytest.raises(UserError, match=r"^the table claims 3,000,000 rows; this machine's memory cannot hold that"):
        batches(path)


@pytest.mark.parametrize("value", [LONG, LONG.encode()])
def test_a_repeated_text_is_read_in_pieces_that_fit(value: str | bytes, tmp_path: Path) -> None:
    """As a batch it is bounded; whole, it is refused."""
    path = write(tmp_path / "repeated.parquet", repeated(value, 90))
    assert [batch.num_rows for batch in batches(path)] == [10] * 9
    assert batches(path)[8]["a"][9].as_py() == value
    with (
        open_parquet(path, "the table") as file,
        pytest.raises(UserError, match=r"^the table unpacks to more than 2\d,\d{3},\d{3} bytes; "),
    ):
        bounded_table(file.batches(["a"], 65_536), "the table")


@pytest.mark.parametrize("first", [[[]], [None] * 5000, [["a"]]])
def test_a_list_of_a_repeated_text_is_refused(first: list[list[str] | None], tmp_path: Path) -> None:
    """Whatever the first rows are: one row cannot be read in pieces."""
    path = write(tmp_path / "lists.parquet", pa.array([*first, [LONG] * 90], pa.list_(pa.string())))
    with pytest.raises(UserError, match=r"claims 5?,?0?9[01] values of 1,000,000 bytes in lists of 'a'; "):
        batches(path)


def test_long_lists_of_short_texts_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "lists.parquet", pa.array([["a", "b"], None, [], ["c"] * 1000]))
    assert pa.concat_tables(batches(path, 2)).to_pydict() == {"a": [["a", "b"], None, [], ["c"] * 1000]}


def test_too_long_a_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10**12))
    path = write(tmp_path / "long.parquet", repeated("x" * (MAX_CELL_BYTES + 1), 2))
    with pytest.raises(UserError, match="holds a value of 64,000,001 bytes; expected at most 64,000,000"):
        batches(path)


def test_views_and_uuids_are_text(tmp_path: Path) -> None:
    """At any depth, with nulls and in slices; what Arrow knows no functions for is given as what it does."""
    uuids = [UUID(int=number * 2**96 + 1) for number in range(4)]
    storage = pa.array([uuid.bytes for uuid in uuids], pa.uuid())
    with_null = pa.array([uuids[0].bytes, None, uuids[2].bytes], pa.uuid())
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 1, 4], pa.int32()), storage, mask=pa.array([False, True, False]))
    views = pa.list_(pa.list_(pa.string_view()))
    table = pa.table(
        {
            "uuid": with_null,
            "none": pa.array([None] * 3, pa.uuid()),
            "uuids": lists,
            "view": pa.array(["a", None, "b"], pa.string_view()),
            "views": pa.array([[["a"], None], None, [["b", None], []]], views),
            "nested": pa.array(
                [{"x": "a", "y": 1}, None, {"x": None, "y": 2}], pa.struct([("x", pa.string_view()), ("y", pa.int8())])
            ),
            "bytes": pa.array([b"a", b"", None], pa.binary_view()),
            "json": pa.array(["{}", None, "1"], pa.json_()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    expected = {
        "uuid": [str(uuids[0]), None, str(uuids[2])],
        "none": [None] * 3,
        "uuids": [[str(uuids[0])], None, list(map(str, uuids[1:]))],
        **{name: table[name].to_pylist() for name in ("view", "views", "nested", "bytes", "json")},
    }
    with open_parquet(tmp_path / "t.parquet", "the table") as file:
        for rows_at_once in (1, 2, 3):
            batches = list(file.batches(file.names, rows_at_once))
            assert pa.concat_tables(batches).to_pydict() == expected
            assert batches[0].schema.types == list(file.types.values())
    assert file.types["uuid"] == file.types["view"] == pa.large_string()
    assert file.types["views"] == pa.list_(pa.list_(pa.large_string()))
