"""Raw tables of every kind give the same store: CSV and Parquet, sequences and interactions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import DataConfig
from shards.encoders.item_text import item_texts
from shards.store.builder import build_store
from shards.store.inputs import check_built_from
from shards.store.raw_data import RawData
from tests.fixtures.stores import (
    HISTORIES,
    read_columns,
    read_split,
    rows_of,
    tiny_config,
    write_histories,
    write_items,
    write_raw,
)


def test_csv_equals_parquet(tmp_path: Path) -> None:
    write_raw(tmp_path)
    text = ["{title}", "{price}", "{brand}"]
    features = {"words": {"source": "tfidf", "dim": 3, "text": text}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    items = pq.read_table(tmp_path / "items.parquet").drop_columns(["categories"])
    pyarrow.csv.write_csv(items, tmp_path / "items.csv")
    for name, cells in (("spaces", " ".join), ("json", lambda items: str(items).replace("'", '"'))):
        table = {"user_id": list(HISTORIES), "item_ids": [cells(items) for items in HISTORIES.values()]}
        pyarrow.csv.write_csv(pa.table(table), tmp_path / f"{name}.csv")
        tables = {"items": {"path": "items.csv", "title": "title"}, "sequences": {"path": f"{name}.csv"}}
        again, _ = build_store(tiny_config(tmp_path, tmp_path / name, features=features, **tables))
        assert again.manifest.sha256 == store.manifest.sha256


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_interactions_equal_sequences(tmp_path: Path, ending: str, timestamps: bool) -> None:
    """Integer ids; events of one time keep the table's order, if asked to; users come in order of their ids."""
    histories = {1: [40, 30], 3: [20], 7: [30, 10, 20], 19: [10, 10, 30, 20]}
    times = {1: [0, 9], 3: [1], 7: [5, 5, 8], 19: [2, 4, 4, 4]}
    write_items(tmp_path / "items.parquet", [10, 20, 30, 40])
    write_histories(tmp_path / "sequences.parquet", histories, times)
    sequences = {"times": "times"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "one", features={}, ids="integer", sequences=sequences))
    events = [(user, item, time) for user in histories for item, time in zip(histories[user], times[user], strict=True)]
    late = [event for event in events if event[2] >= 5 and event[0] != 7]  # interleaved: these come last
    events = [event for event in events if event not in late] + late
    columns = dict(zip(("who", "what", "when"), map(list, zip(*events, strict=True)), strict=True))
    table = pa.table(columns)
    if timestamps:
        table = table.set_column(2, "when", pa.array(columns["when"], pa.timestamp("s")).cast(pa.timestamp("ms")))
    path = tmp_path / f"events.{ending}"
    pq.write_table(table, path) if ending == "parquet" else pyarrow.csv.write_csv(table, path)
    sequences = {"path": path.name, "layout": "interactions", "user": "who", "items": "what", "times": "when"}
    data = {"sequences": sequences, "interactions": {"ties": "table"}, "ids": "integer"}
    again, _ = build_store(tiny_config(tmp_path, tmp_path / "two", features={}, **data))
    assert again.manifest.sha256 == store.manifest.sha256
    assert read_split(again, "test", "times")[2] == [2, 4, 4, 4]


def test_shuffled_interactions_are_ordered_by_time(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet")
    events = {"user": [1, 2, 1, 2, 1], "item": ["c", "f", "a", "e", "b"], "t": [30, 2, 10, 1, 20]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    sequences = {"path": "events.parquet", "layout": "interactions", "user": "user", "items": "item", "times": "t"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "timed", features={}, sequences=sequences))
    assert read_split(store, "test") == {0: rows_of(["a", "b", "c"])}
    assert read_split(store, "train")[1] == rows_of(["e", "f"])
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "as-is", features={}, sequences=sequences | {"times": ""}))
    assert read_split(store, "test") == {0: rows_of(["c", "a", "b"])}


def test_lists_are_ordered_by_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest first, or no order at all; events of one time keep theirs, and the users are counted."""
    write_items(tmp_path / "items.parquet")
    histories = {1: ["c", "b", "a"], 2: ["a", "b", "c"], 3: ["d", "e", "f", "a"], 4: ["a", "b"], 5: ["f", "e"]}
    times = {1: [30, 20, 10], 2: [1, 2, 3], 3: [7, 5, 7, 5], 4: [99, 99], 5: [1, 2]}
    write_histories(tmp_path / "sequences.parquet", histories, times)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, sequences={"times": "times"}))
    assert [*read_split(store, "test").values()] == [
        rows_of(items) for items in (["a", "b", "c"], ["a", "b", "c"], ["e", "a", "d", "f"])
    ]
    assert read_split(store, "test", "times")[2] == [5, 5, 7, 7]
    assert "histories: 2 users' events were out of order: sorted by 'times'" in capsys.readouterr().out
    write_histories(tmp_path / "sequences.parquet", histories)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "as-is", features={}))
    assert read_split(store, "test")[0] == rows_of(["c", "b", "a"])
    assert "out of order" not in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["sequences", "interactions"])
def test_events_that_stand_twice_are_kept_and_counted(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another event of that time stands between them; an item that is bought again later is none."""
    write_items(tmp_path / "items.parquet")
    histories = {1: ["a", "b", "a", "a", "c"], 2: ["a", "a", "b", "c"], 3: ["b", "b", "d"]}
    times = {1: [1, 1, 1, 1, 2], 2: [1, 2, 3, 3], 3: [5, 5, 6]}
    write_histories(tmp_path / "sequences.parquet", histories, times)
    flat = [(user, item, time) for user in histories for item, time in zip(histories[user], times[user], strict=True)]
    events = dict(zip(("user_id", "item_ids", "times"), map(list, zip(*flat[::-1], strict=True)), strict=True))
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    path = "sequences.parquet" if layout == "sequences" else "events.parquet"
    sequences = {"path": path, "layout": layout, "times": "times"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, sequences=sequences))
    assert store.manifest.num_events == 12
    said = "3 events stand twice (same user, item and time): kept as they are"
    assert said in capsys.readouterr().out
    build_store(tiny_config(tmp_path, tmp_path / "as-is", features={}, sequences=sequences | {"times": ""}))
    assert "stand twice" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [{}, {"interactions": {"duplicates": "event"}}, {"split": {"by": "time"}}])
@pytest.mark.parametrize("again", [["a", "b", "c"], ["c"], []])
def test_a_user_of_two_rows_is_refused_on_every_path(again: list[str], data: dict[str, Any], tmp_path: Path) -> None:
    """Also where one of the two would be dropped."""
    write_items(tmp_path / "items.parquet")
    lists = [list("abc"), ["c"], ["c"], again, list("def")]
    times = [list(range(len(one))) for one in lists]
    table = pa.table({"user_id": ["u", "v", "v", "u", "w"], "item_ids": lists, "times": times})
    pq.write_table(table, tmp_path / "s.parquet")
    sequences = {"path": "s.parquet", "times": "times"}
    problem = (
        r"^column 'user_id' of \S+s.parquet holds 2 ids more than once, the first is 'u'; expected one row for each"
    )
    with pytest.raises(UserError, match=problem):
        build_store(tiny_config(tmp_path, tmp_path / "store", features={}, sequences=sequences, **data))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("keep", "joined"), [("first", ["b", "c", "a", "d"]), ("last", ["c", "a", "b", "d"])], ids=["first", "last"]
)
def test_lists_of_a_user_are_joined_where_an_item_counts_once(
    keep: str, joined: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_items(tmp_path / "items.parquet")
    lists = [["b", "c"], ["d", "e", "f"], ["b", "c", "a"], ["b", "d"]]
    pq.write_table(pa.table({"user_id": ["u", "w", "u", "u"], "item_ids": lists}), tmp_path / "s.parquet")
    values: dict[str, Any] = {"sequences": {"path": "s.parquet"}, "interactions": {"duplicates": keep}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, **values))
    assert read_split(store, "test") == {0: rows_of(joined), 1: rows_of(["d", "e", "f"])}
    assert "1 users have several rows: their lists are joined in order" in capsys.readouterr().out.splitlines()


def test_a_user_may_have_a_row_in_each_table_of_a_given_split(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet")
    for name, items, times in (("train", ["a", "b"], [1, 2]), ("valid", ["c"], [2]), ("test", ["d"], [3])):
        write_histories(tmp_path / f"{name}.parquet", {"u": items}, {"u": times})
    split = {"by": "given", "valid": "valid.parquet", "test": "test.parquet"}
    sequences = {"path": "train.parquet", "times": "times"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, sequences=sequences, split=split))
    assert read_split(store, "test") == {0: rows_of(["a", "b", "c", "d"])}


def write_csvs(folder: Path, items: list[str], events: list[tuple[str, str]]) -> dict[str, dict[str, str]]:
    (folder / "items.csv").write_text("\n".join(["item_id", *items]) + "\n")
    (folder / "events.csv").write_text("\n".join(["who,what", *map(",".join, events)]) + "\n")
    sequences = {"path": "events.csv", "layout": "interactions", "user": "who", "items": "what", "times": ""}
    return {"items": {"path": "items.csv", "title": ""}, "sequences": sequences}


def test_ids_of_a_csv_stay_what_they_are(tmp_path: Path) -> None:
    """An id is an integer only if it is written like one: 0042 is not 42, and 0x1A is not 26, for items and users."""
    items = ["42", "0042", "0x1A", "26", "1E5", "100000"]
    events = [(user, item) for user in ("7", "007") for item in (items if user == "7" else items[::-1])]
    tables = write_csvs(tmp_path, items, events)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}, **tables))
    assert pq.read_table(tmp_path / "store" / "vocab.parquet")["external_id"].to_pylist() == items
    assert pq.read_table(tmp_path / "store" / "users.parquet")["external_id"].to_pylist() == ["007", "7"]
    assert read_split(store, "test") == {0: [5, 4, 3, 2, 1, 0], 1: [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_two_columns_of_one_name(ending: str, tmp_path: Path) -> None:
    write_raw(tmp_path)
    table = pa.Table.from_arrays(
        [pa.array(list("abcdef")), *[pa.array(list("123456"))] * 2], ["item_id", "title", "title"]
    )
    write = pq.write_table if ending == "parquet" else pyarrow.csv.write_csv
    write(table, tmp_path / f"items.{ending}")
    items = {"path": f"items.{ending}", "title": "title"}
    with pytest.raises(UserError, match=rf"items\.{ending} has several columns 'title'; give each its own name"):
        build_store(tiny_config(tmp_path, tmp_path / "store", features={}, items=items))


WRITTEN = ["007", "0x1A", "1.50", "true", "2021-01-01", "1E5"]


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_id_of_blanks_alone_is_missing(blank: str, tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet")
    for column, users, lists in (
        ("user_id", ["u", blank], [list("abc")] * 2),
        ("item_ids", ["u", "v"], [list("abc"), ["a", blank, "c"]]),
    ):
        pq.write_table(pa.table({"user_id": users, "item_ids": lists}), tmp_path / "s.parquet")
        config = tiny_config(tmp_path, tmp_path / "store", features={}, sequences={"path": "s.parquet"})
        with pytest.raises(UserError, match=f"column '{column}' of .* holds 1 null ids; remove or fill these rows"):
            build_store(config)


def test_texts_of_a_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    """Titles, and the columns of a template: each column alone would be taken for numbers, dates or truth values."""
    write_raw(tmp_path)
    names = [f"c{number}" for number in range(len(WRITTEN))]
    rows = [",".join([item, *WRITTEN]) for item in "abcdef"]
    (tmp_path / "items.csv").write_text("\n".join([",".join(["item_id", *names]), *rows]))
    for title, written in zip(names, WRITTEN, strict=True):
        items = {"path": "items.csv", "title": title}
        store, _ = build_store(tiny_config(tmp_path, tmp_path / title, features={}, items=items))
        assert read_columns(store, "vocab.parquet")["title"] == [written] * 6
    parts = [f"{{{name}}}" for name in names]
    features = {"words": {"source": "tfidf", "dim": 1, "text": parts}}
    raw = RawData.read(tiny_config(tmp_path, tmp_path / "store", items=items, features=features))
    assert item_texts(raw.items.table, parts, " ").texts == [" ".join(WRITTEN)] * 6


def test_a_number_of_a_csv_may_have_a_numbers_format(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "items.csv").write_text("item_id,title,price\na,007,7.5\nb,8,\n")
    items = {"path": "items.csv", "title": ""}
    features, text = {"words": {"source": "tfidf", "dim": 1}}, ["{title} costs {price:.2f}"]
    raw = RawData.read(tiny_config(tmp_path, tmp_path / "store", items=items, features=features, text=text))
    assert item_texts(raw.items.table, text, "").texts == ["007 costs 7.50", "Untitled Item"]


@pytest.mark.parametrize(
    ("cells", "spec", "bad"),
    [
        (["0.5", "N/A", "2"], ":.2f", "N/A"),
        (["N/A", "0.5", "2"], ":.2f", "N/A"),
        (["2014-01-02", "soon", "2014-01-03"], ":%Y", "soon"),
        (["a", "b", "c"], ":.2f", "a"),
    ],
)
def test_the_cell_that_is_no_number_is_named(cells: list[str], spec: str, bad: str, tmp_path: Path) -> None:
    write_raw(tmp_path)
    rows = "".join(f"{item},{cell}\n" for item, cell in zip("abc", cells, strict=True))
    (tmp_path / "items.csv").write_text("item_id,price\n" + rows)
    features, items = {"words": {"source": "tfidf", "dim": 1}}, {"path": "items.csv"}
    config = tiny_config(
        tmp_path, tmp_path / "store", items=items, features=features, text=[f"{{price{spec}}}"], on_unknown_item="drop"
    )
    with pytest.raises(UserError, match=f"column 'price' of .* holds '{bad}', and data.text formats it as a number"):
        RawData.read(config)


@pytest.mark.parametrize("word", ["0042", "42.0", "+42", "4e1"])
def test_what_is_not_written_like_an_integer_id_is_unknown(word: str, tmp_path: Path) -> None:
    items = ["42", "7", "-1", str(2**62)]
    tables = write_csvs(tmp_path, items, [("u", "42"), ("u", "7"), ("u", word)])
    with pytest.raises(UserError, match=re.escape(f"not in the item table, the first is {word!r}")):
        build_store(tiny_config(tmp_path, tmp_path / "store", features={}, **tables))
    tables = write_csvs(tmp_path, items, [("9", "42"), ("9", "7"), ("9", str(2**62))])
    build_store(tiny_config(tmp_path, tmp_path / "store", features={}, ids="integer", **tables))
    vocabulary = pq.read_table(tmp_path / "store" / "vocab.parquet")["external_id"]
    assert vocabulary.type == pa.int64() and vocabulary.to_pylist() == [42, 7, -1, 2**62]


@pytest.mark.parametrize("layout", ["sequences", "interactions"])
@pytest.mark.parametrize("integer", ["items", "users"])
def test_ids_of_items_and_users_of_different_kinds(integer: str, layout: str, tmp_path: Path) -> None:
    """On both paths; the record of a store names each kind, and one kind where both are the same."""
    items, users = [30, 10, 20], ["7", "007"] if integer == "items" else ["7", "12"]
    write_items(tmp_path / "items.parquet", items)
    if layout == "sequences":
        write_histories(tmp_path / "events.parquet", {user: [str(item) for item in items] for user in users})
    else:
        events = [(user, str(item), time) for time, user in enumerate(users) for item in items]
        columns = dict(zip(("user_id", "item_ids", "t"), map(list, zip(*events, strict=True)), strict=True))
        pq.write_table(pa.table(columns), tmp_path / "events.parquet")
    sequences = {"path": "events.parquet", "layout": layout}
    other = {"items": "users", "users": "items"}[integer]
    config = tiny_config(
        tmp_path, tmp_path / "store", features={}, ids={integer: "integer", other: "text"}, sequences=sequences
    )
    store, _ = build_store(config)
    ids = {"items": pq.read_table(store.path / "vocab.parquet"), "users": pq.read_table(store.path / "users.parquet")}
    kinds = {side: table["external_id"].type for side, table in ids.items()}
    assert kinds == {integer: pa.int64(), other: pa.large_string()}
    assert sorted(ids["items"]["external_id"].to_pylist(), key=int) == (
        [10, 20, 30] if integer == "items" else ["10", "20", "30"]
    )
    assert store.manifest.built_from is not None
    assert store.manifest.built_from.keys["data.ids"] == {"items": config.data.item_ids, "users": config.data.user_ids}
    assert check_built_from(store, config, "")
    both = tiny_config(tmp_path, tmp_path / "store", features={}, ids="text", sequences=sequences)
    with pytest.raises(UserError, match="data.ids is {.*}, the config's 'text'"):
        check_built_from(store, both, "")


def test_one_kind_for_both_may_be_written_either_way(tmp_path: Path) -> None:
    write_raw(tmp_path)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}))
    assert check_built_from(store, tiny_config(tmp_path, tmp_path / "store", features={}, ids={"users": "text"}), "")
    with pytest.raises(UserError, match="data.ids.items is 'number'; expected one of: text, integer"):
        tiny_config(tmp_path, tmp_path / "store", ids={"items": "number"})
    with pytest.raises(UserError, match="unknown config key 'data.ids.item'; did you mean 'data.ids.items'"):
        tiny_config(tmp_path, tmp_path / "store", ids={"item": "text"})
    with pytest.raises(UserError, match="data.ids is 'number'; expected text, integer or mapping"):
        tiny_config(tmp_path, tmp_path / "store", ids="number")
    with pytest.raises(UserError, match="data.ids is 'number'; expected text, integer or mapping"):
        DataConfig(ids="number")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["title", "item_id", "header"])
def test_a_csv_that_is_not_utf8_is_refused(where: str, tmp_path: Path) -> None:
    write_raw(tmp_path)
    names = {"title": "tea", "item_id": "a", "header": "brand"} | {where: "caf\xe9"}
    text = f"item_id,title,{names['header']}\n{names['item_id']},{names['title']},x\nb,Tea,y\n"
    (tmp_path / "items.csv").write_bytes(text.encode("latin-1"))
    features = {"words": {"source": "tfidf", "dim": 1, "text": ["{title}"]}}
    tables = {"items": {"path": "items.csv", "title": "title"}}
    with pytest.raises(
        UserError, match="not UTF-8 text.*; name its encoding, such as --data.sequences.csv.encoding"
    ) as refused:
        build_store(tiny_config(tmp_path, tmp_path / "store", features=features, **tables))
    assert "\n" not in str(refused.value)
