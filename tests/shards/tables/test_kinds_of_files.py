"""The same rows give the same item table and the same histories, whatever the kind of file and however it is parted."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from shards.encoders.item_text import item_texts
from shards.store.builder import build_store
from shards.store.raw_items import check_raw_items, items_of_ids, read_raw_items
from shards.tables.raw_tables import RawTable, read_batches, read_table, table_columns
from tests.fixtures.stores import read_columns, tiny_config
from tests.fixtures.tables import KINDS, Columns, data_config, write_columns

ITEMS: Columns = {
    "item_id": ["0042", "0x1A", "1E5", "NA", 'é,\t"', "[x]"],
    "title": ["One", None, "3.50", "true", "2021-01-01", "NaN"],
    "price": [9.5, None, 3.25, 4.125, 0.5, 7.75],
    "year": [1999, 2001, None, 7, 8, 9],
}
TYPES = {"item_id": pa.string(), "title": pa.string(), "price": pa.float64(), "year": pa.int64()}
HISTORIES: Columns = {
    "user_id": ["7", "007"],
    "item_ids": [["0x1A", "0042", "NA"], ["1E5", "[x]"]],
    "t": [[3, 1, 2], [5, 5]],
}
TEXT = ["{title}", "costs {price:.2f}", "{year:d}"]


def parts(folder: Path, name: str, columns: Columns, kind: str, types: dict[str, pa.DataType] | None = None) -> None:
    """A row in each part."""
    folder.mkdir()
    for row in range(len(next(iter(columns.values())))):
        part = {key: [values[row]] for key, values in columns.items()}
        write_columns(folder / f"{name}.{row}{kind}", part, types)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_store(kind: str, tmp_path: Path) -> None:
    write_columns(tmp_path / "items.parquet", ITEMS, TYPES)
    write_columns(tmp_path / "sequences.parquet", HISTORIES)
    features = {"words": {"source": "tfidf", "dim": 2, "text": TEXT}}
    timed = {"times": "t"}
    expected, _ = build_store(tiny_config(tmp_path, tmp_path / "one", features=features, sequences=timed))
    parts(tmp_path / "i", "items", ITEMS, kind, TYPES)
    parts(tmp_path / "h", "part", HISTORIES, kind)
    tables: dict[str, Any] = {"items": {"path": "i/*", "title": "title"}, "sequences": {"path": "h"} | timed}
    config = tiny_config(tmp_path, tmp_path / "two", features=features, **tables)
    store, _ = build_store(config)
    assert store.manifest.sha256 == expected.manifest.sha256
    assert read_columns(store, "vocab.parquet")["external_id"] == ITEMS["item_id"]
    raw = read_raw_items(config.data)
    texts = item_texts(raw.table, TEXT, "|").texts
    assert texts[:3] == ["One|costs 9.50|1999", "2001", "3.50|costs 3.25"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_lists_and_fields_of_items(kind: str, tmp_path: Path) -> None:
    """A title of words is joined; of paths the first counts; fields of nested columns have dotted names."""
    columns: Columns = {
        "id": ["a", "b"],
        "names": [["Tea", "pot"], None],
        "paths": [[["Home", "Tea"], ["Sale"]], [["Garden"]]],
        "meta": [{"brand": "Acme", "n": {"m": 1}}, {"brand": None, "n": {"m": 2}}],
    }
    write_columns(tmp_path / f"items{kind}", columns)
    features = {"words": {"source": "tfidf", "dim": 1, "text": ["{names}", "{paths}", "{meta.brand}", "{meta.n.m}"]}}
    items = {"path": f"items{kind}", "id": "id", "title": "names"}
    data = data_config(tmp_path, items=items, features=features)
    check_raw_items(data)
    raw = read_raw_items(data)
    assert raw.titles is not None and raw.titles.to_pylist() == ["Tea, pot", None]
    assert item_texts(raw.table, features["words"]["text"], "|").texts == ["Tea, pot|Home, Tea|Acme|1", "Garden|2"]  # type: ignore[arg-type]
    assert {"meta", "meta.brand", "meta.n.m"} <= set(table_columns(tmp_path / f"items{kind}"))


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_values_are_written_alike(kind: str, tmp_path: Path) -> None:
    """As Python prints numbers; truth as JSON has it. A CSV is as it was written, here by Python."""
    numbers = [1.0, 2.5, None, 1e16, 1e-5, 123456789.0]
    columns: Columns = {
        "id": list("abcdef"),
        "title": numbers,
        "b": [True, False, None, True, True, False],
        "x": numbers,
        "xs": [[1.0, 1e16], [], None, [1e-5], [2.5], [4.0]],
    }
    if kind == ".csv":
        columns |= {"b": ["true", "false", None, "true", "true", "false"], "xs": [None] * 6}  # type: ignore[operator]
    write_columns(tmp_path / f"items{kind}", columns)
    text = ["{b} {x}", "{xs}"]
    features = {"words": {"source": "tfidf", "dim": 1, "text": text}}
    items = {"path": f"items{kind}", "id": "id", "title": "title"}
    raw = read_raw_items(data_config(tmp_path, items=items, features=features))
    assert raw.titles is not None
    assert raw.titles.to_pylist() == ["1.0", "2.5", None, "1e+16", "1e-05", "123456789.0"]
    texts = [text.split("|") for text in item_texts(raw.table, text, "|").texts]
    assert [text[0] for text in texts] == [
        *("true 1.0", "false 2.5", "Untitled Item", "true 1e+16", "true 1e-05", "false 123456789.0")
    ]
    if kind != ".csv":
        assert [text[1:] for text in texts] == [["1.0, 1e+16"], [], [], ["1e-05"], ["2.5"], ["4.0"]]


def test_a_title_that_is_no_number_is_none(tmp_path: Path) -> None:
    write_columns(tmp_path / "items.parquet", {"item_id": ["a", "b"], "title": [float("nan"), 3.0]})
    raw = read_raw_items(data_config(tmp_path, items={"path": "items.parquet", "title": "title"}))
    assert raw.titles is not None and raw.titles.to_pylist() == [None, "3.0"]


def test_json_lines_may_mix_texts_and_lists(tmp_path: Path) -> None:
    lines = ['{"id": 1, "x": ["a", 2, true]}', '{"id": "2", "x": "b"}', '{"id": 3, "x": null}', '{"id": 4}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    table = read_table(tmp_path / "t.jsonl", ["id", "x"], text=["x"], ids=["id"])
    assert table.to_pydict() == {"id": ["1", "2", "3", "4"], "x": [["a", "2", "true"], ["b"], None, None]}


def test_json_lines_may_lack_a_column_in_one_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "1.jsonl").write_text('{"id": "a"}')
    (tmp_path / "t" / "2.jsonl").write_text('{"id": "b", "meta": {"x": 5}}')
    table = read_table(tmp_path / "t", ["id", "meta.x"], ids=["id"])
    assert table.to_pydict() == {"id": ["a", "b"], "meta.x": [None, 5]}
    with pytest.raises(UserError, match="has no column 'y'; it has: id, meta, meta.x"):
        read_table(tmp_path / "t", ["y"])


def test_rows_of_items_that_cannot_be_used(tmp_path: Path) -> None:
    lines = ['{"item_id": "a"}', "{", '{"title": "no id"}', '{"item_id": " "}', '{"item_id": "b"}']
    (tmp_path / "i.jsonl").write_text("\n".join(lines))
    data = data_config(tmp_path, items={"path": "i.jsonl"}, dirt={"max_bad_rows": 0.6})
    raw = read_raw_items(data)
    assert raw.ids.external.to_pylist() == ["a", "b"] and len(raw.table) == 2
    assert raw.bad == {"no id": 2, "unreadable line": 1}
    with pytest.raises(UserError, match=r"i.jsonl: 3 of 5 rows cannot be used \(no id: 2, unreadable line: 1\)"):
        read_raw_items(data_config(tmp_path, items={"path": "i.jsonl"}))


def test_items_without_a_table(tmp_path: Path) -> None:
    raw = items_of_ids(pa.array(["a", "b"], pa.large_string()), data_config(tmp_path, items={"path": ""}))
    assert raw.table.to_pydict() == {"item_id": ["a", "b"]} and raw.titles is None and raw.bad == {}


def test_lines_that_are_refused_where_none_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user_id,item_ids\na,x y\nb\n")
    with pytest.raises(UserError, match="h.csv holds 1 lines that cannot be read"):
        read_table(tmp_path / "h.csv", ["user_id"])
    (tmp_path / "array.json").write_text('[{"a": 1}]')
    with pytest.raises(UserError, match="is one JSON array; expected JSON Lines"):
        read_table(tmp_path / "array.json", ["a"])
    (tmp_path / "o.jsonl").write_text('{"a": {"b": 1}}')
    with pytest.raises(UserError, match=r"column 'a' of .* holds objects; name one of their fields, such as a\.b"):
        read_table(tmp_path / "o.jsonl", ["a"])


def test_a_csv_is_read_in_batches(tmp_path: Path) -> None:
    """However large the file is; each batch has the types of all."""
    rows = 600_000
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{row},some more text {row}\n" for row in range(rows)))
    batches = list(read_batches(RawTable((str(tmp_path / "t.csv"),)), ["b", "a"]).batches)
    assert len(batches) > 1 and sum(map(len, batches)) == rows
    assert {tuple(batch.schema.types) for batch in batches} == {(pa.large_string(), pa.large_string())}
    assert batches[-1]["a"][-1].as_py() == str(rows - 1)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("times", "stored"),
    [
        ([[3.75, 3.25, 1.0], [5.0, 5.0]], [1, 3, 3]),
        ([[1_400_000_000_002, 1_400_000_000_001, 7], [1, 2]], [0, 1_400_000_000, 1_400_000_000]),
        (
            [["2014-07-23T00:00:00.5Z", "2014-07-23", "1970-01-01"], ["2014-07-23"] * 2],
            [0, 1_406_073_600, 1_406_073_600],
        ),
    ],
)
def test_times_of_histories(kind: str, times: list[list[Any]], stored: list[int], tmp_path: Path) -> None:
    """Sorted at their full resolution, stored as seconds."""
    write_columns(tmp_path / "items.parquet", {"item_id": ["a", "b", "c"]})
    columns: Columns = {"user_id": ["u", "v"], "item_ids": [["c", "b", "a"], ["a", "b"]], "t": times}
    write_columns(tmp_path / f"h{kind}", columns)
    tables: dict[str, Any] = {"items": {"path": "items.parquet"}, "sequences": {"path": f"h{kind}", "times": "t"}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, **tables))
    [block] = store.manifest.splits["test"]
    arrays = store.read_block(block)
    assert arrays["items"].tolist() == [0, 1, 2] and arrays["times"].tolist() == stored


def test_gzip_of_several_members_and_line_ends_of_windows(tmp_path: Path) -> None:
    """As ``cat a.gz b.gz`` and parallel packers write it."""
    data = gzip.compress(b"a,b\r\n1,x\r\n") + gzip.compress(b'2,"y\r\nz"\r\n') + gzip.compress(b"3,w")
    (tmp_path / "t.csv.gz").write_bytes(data)
    table = read_table(tmp_path / "t.csv.gz", ["a", "b"], text=["a", "b"])
    assert table.to_pydict() == {"a": ["1", "2", "3"], "b": ["x", "y\r\nz", "w"]}


@pytest.mark.parametrize("start", [b"", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf\n\n"])
def test_blank_lines_are_no_rows(start: bytes, tmp_path: Path) -> None:
    """Before the header, too: it is not a row itself."""
    (tmp_path / "t.csv").write_bytes(start + b'"a\nb",c\n\n1,x\n\n\n2,y\n\n')
    table = read_table(tmp_path / "t.csv", ["a\nb", "c"], text=["c"])
    assert table.to_pydict() == {"a\nb": [1, 2], "c": ["x", "y"]}


@pytest.mark.parametrize("kind", [".csv.gz", ".jsonl.gz", ".csv.zst", ".jsonl.zst"])
def test_compressed_files_that_are_cut(kind: str, tmp_path: Path) -> None:
    """Nothing of them is taken for the whole."""
    path = write_columns(tmp_path / f"t{kind}", {"a": [f"{row * 7919 % 100_003}" for row in range(100_000)]})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path, ["a"])
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="cannot be read"):
        read_table(path, ["a"])


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("ids", "expected"), [("text", ["42", "7"]), ("integer", [42, 7])])
def test_columns_of_integers_are_what_the_config_says(
    kind: str, ids: str, expected: list[object], tmp_path: Path
) -> None:
    write_columns(tmp_path / f"items{kind}", {"item_id": [42, 7]})
    write_columns(tmp_path / f"h{kind}", {"user_id": [5], "item_ids": [[7, 42, 7]]})
    tables: dict[str, Any] = {"items": {"path": f"items{kind}"}, "sequences": {"path": f"h{kind}"}, "ids": ids}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, **tables))
    assert read_columns(store, "vocab.parquet")["external_id"] == expected
    assert store.manifest.num_events == 3
