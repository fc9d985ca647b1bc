"""Raw tables in a folder of parts give the store that one file gives, or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from shards.store.builder import build_store
from shards.tables.raw_tables import read_table
from tests.fixtures.stores import tiny_config, write_raw


def split(path: Path, names: list[str], folder: Path) -> Path:
    """The rows of a table in parts of these names, in their order, a few rows each."""
    table = pq.read_table(path)
    step = -(-table.num_rows // len(names))
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(number * step, step), folder / name)
    return folder


def drop_n(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["n"]), path)


def part_without_its_partition(folder: Path) -> None:
    split(folder / "a.parquet", ["n=3/b.parquet"], folder)
    drop_n(folder / "n=3" / "b.parquet")


NAMES = {
    "Spark": [f"part-{number:05d}-0a1b.c000.snappy.parquet" for number in range(4)],
    "Dask": [f"part.{number}.parquet" for number in (0, 1, 2, 10)],
    "Hive": ["year=9/month=2/a.parquet", "year=9/month=10/a.parquet", "year=10/a.parquet", "year=10/b.parquet"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_parts_give_the_same_store(names: list[str], tmp_path: Path) -> None:
    write_raw(tmp_path)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "one"))
    tables = {}
    for name in ("items", "sequences"):
        folder = split(tmp_path / f"{name}.parquet", names, tmp_path / f"{name}.parts")
        (folder / "_SUCCESS").touch()
        (folder / f".{names[0].rpartition('/')[2]}.crc").write_bytes(b"crc")
        tables[name] = {"path": folder.name}
    tables["items"]["title"] = "title"
    again, _ = build_store(tiny_config(tmp_path, tmp_path / "parts", **tables))
    assert again.manifest.sha256 == store.manifest.sha256


def test_parts_of_csv(tmp_path: Path) -> None:
    """A number may be whole in one part, and a price in words makes all of them text; an id is text in any case."""
    for number, (ids, prices) in enumerate([(["1", "2"], [5, 6]), (["03"], [2.5]), ([], [])]):
        table = pa.table({"id": pa.array(ids, pa.string()), "price": pa.array(prices)})
        pyarrow.csv.write_csv(table, (tmp_path / f"part-{number}.csv"), pyarrow.csv.WriteOptions(quoting_style="none"))
    table = read_table(tmp_path, ["id", "price"], ids=["id"])
    assert table.to_pydict() == {"id": ["1", "2", "03"], "price": [5.0, 6.0, 2.5]}
    (tmp_path / "part-3.csv").write_text("id,price\n4,cheap\n")
    assert read_table(tmp_path, ["price"]).to_pydict() == {"price": ["5", "6", "2.5", "cheap"]}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: (folder / "a.parquet").unlink(), "a folder without .parquet, .csv, .tsv, .jsonl or .json"),
    "unfinished": (lambda folder: (folder / "_temporary").mkdir(), "holds _temporary: its writer has not finished"),
    "Delta": (lambda folder: (folder / "_delta_log").mkdir(), "holds _delta_log: it is a Delta table"),
    "another file": (
        lambda folder: (folder / "README.md").touch(),
        "holds README.md; expected only .parquet, .csv, .tsv, .jsonl or .json",
    ),
    "another folder": (
        lambda folder: (folder / "data").mkdir(),
        "holds data; expected only .parquet, .csv, .tsv, .jsonl or .json",
    ),
    "two kinds": (lambda folder: (folder / "b.csv").touch(), "holds a.parquet and b.csv; expected one kind"),
    "not Parquet": (lambda folder: (folder / "b.parquet").write_bytes(b"no"), "b.parquet cannot be read"),
    "other columns": (
        lambda folder: pq.write_table(pa.table({"id": [1]}), folder / "b.parquet"),
        "b.parquet has no column 'n'; it has: id",
    ),
    "other types": (
        lambda folder: pq.write_table(pa.table({"id": ["1"], "n": [2]}), folder / "b.parquet"),
        "column 'id' is string in b.parquet, int64 in a.parquet",
    ),
    "a partition's key": (
        part_without_its_partition,
        "has 'n' only in the names of its folders; write it into the files",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plainly_a_table_is_refused(name: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[name]
    folder = tmp_path / "table"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1, 2], "n": [3, 4]}), folder / "a.parquet")
    assert read_table(folder, ["id", "n"]).to_pydict() == {"id": [1, 2], "n": [3, 4]}
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_table(folder, ["id", "n"])
    assert "\n" not in str(caught.value)
