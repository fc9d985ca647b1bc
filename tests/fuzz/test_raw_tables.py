"""Nasty raw tables: refused in one line, or a store of exactly the ids, histories and times that were written.

The model is what a plain reading of the cells gives: an id is the text that stands there.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.parsing import build as build_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from tests.fixtures.stores import read_columns, read_split
from tests.fuzz.seeds import FACTOR

EXAMPLES = max(1, round(25 * FACTOR))
NASTY = """0 -0 00 0042 42 042 +42 4_2 42.0 42. .5 1e5 1E5 1e400 0x1A 0b1 0o7 NaN nan inf -inf Infinity NULL null None
    NA N/A #N/A true TRUE False 2020-01-01 2020-01-01T00:00:00Z 12:30 9223372036854775807 9223372036854775808
    -9223372036854775808 -9223372036854775809 123456789012345678901234567890 \u0663 é e\u0301 ß ẞ \ufb01 a,b a;b a|b [1]
    {"a":1} =1+1 @x \\ \\n ' '' `""".split()
NASTY += [
    "",
    " ",
    "42 ",
    " 42",
    "a b",
    "a\tb",
    "a\nb",
    "a\r\nb",
    "a\rb",
    '"',
    'a"b',
    '""',
    "a\x00b",
    "\ufeffa",
    "a\u200b",
]
NASTY += ["\x85", "\u2028"]
text_ids = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
times = st.sampled_from(
    ["0", "-1", "1", "007", "1e5", "0x10", "9223372036854775807", "9223372036854775808", "", "nan", " 5"]
)
times |= st.integers(-5, 5).map(str)
REPEATABLE = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)


def store_of(folder: Path, **data: Any) -> Store | None:
    """The store of a folder's raw tables; None if it is refused, in one line that names a file."""
    values = {
        "data": {"root": str(folder), "features": {}, **data},
        "store": {"path": str(folder / "store"), "users_per_block": 2, "items_per_block": 2, "blocks_per_shard": 2},
    }
    config: Config = build_config(Config, values, "")
    try:
        return build_store(config)[0]
    except UserError as error:
        assert str(folder) in str(error) and len(str(error)) < 2000, error
        assert not (folder / "store").exists()
        return None


def check(store: Store, items: list[str], histories: dict[str, list[tuple[str, int | None]]]) -> None:
    """The store holds exactly these items, and the histories of 2 events or more."""
    assert list(map(str, read_columns(store, "vocab.parquet")["external_id"])) == items
    kept = {user: events for user, events in histories.items() if len(events) >= 2}
    users = list(map(str, read_columns(store, "users.parquet")["external_id"]))
    assert users == list(kept)
    slices, stored_times = read_split(store, "test"), None
    slices |= {user: found for user, found in read_split(store, "train").items() if user not in slices}
    if any(time is not None for events in kept.values() for _, time in events):
        stored_times = read_split(store, "test", "times")
        stored_times |= {u: found for u, found in read_split(store, "train", "times").items() if u not in stored_times}
    for number, (user, events) in enumerate(kept.items()):
        assert [items[row] for row in slices[number]] == [item for item, _ in events], user
        assert stored_times is None or stored_times[number] == [time for _, time in events], user


def csv_bytes(rows: list[list[str]], quoting: Any, line_end: str, bom: bool) -> bytes:
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator=line_end).writerows(rows)
    return b"\xef\xbb\xbf" * bom + text.getvalue().encode()


csv_styles = st.tuples(
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["\n", "\r\n"]), st.booleans()
)
interactions = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), times), min_size=2, max_size=12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    folder = tmp_path_factory.mktemp("tables") / "raw"

    def empty() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    return empty


def by_user(events: list[tuple[str, str, str]], timed: bool) -> dict[str, list[tuple[str, int | None]]]:
    """Histories in the order of the users' ids; events of one time keep the table's order."""
    histories: dict[str, list[tuple[str, int | None]]] = {}
    whole = all(re.fullmatch(r"\s*[+-]?[0-9]+\s*", time) for _, _, time in events)
    for user, item, time in events:
        seconds = (int(time) if whole else int(float(time))) if timed else None
        histories.setdefault(user, []).append((item, seconds))
    if timed:
        histories = {user: sorted(found, key=lambda event: event[1] or 0) for user, found in histories.items()}
    return dict(sorted(histories.items()))


@REPEATABLE
@given(
    items=st.lists(text_ids, min_size=1, max_size=6),
    users=st.lists(text_ids, min_size=1, max_size=4),
    events=interactions,
    style=csv_styles,
    timed=st.booleans(),
    noise=st.sampled_from([b"", b"", b"", b"", b"\xff", b"\x00", b'"']),
)
def test_csv_interactions(
    place: Callable[[], Path], items: list[str], users: list[str], events: list[tuple[int, int, str]],
    style: tuple[int, str, bool], timed: bool, noise: bytes,
) -> None:  # fmt: skip
    folder = place()
    written = [(users[u % len(users)], items[i % len(items)], time) for u, i, time in events]
    (folder / "items.csv").write_bytes(csv_bytes([["item_id", "x"], *([item, "1"] for item in items)], *style) + noise)
    (folder / "events.csv").write_bytes(csv_bytes([["user_id", "item_id", "time"], *map(list, written)], *style))
    sequences = {"path": "events.csv", "layout": "interactions", "items": "item_id", "times": "time" if timed else ""}
    if timed:
        sequences["time_unit"] = "s"
    ties = {"ties": "table"}
    store = store_of(folder, items={"path": "items.csv"}, sequences=sequences, interactions=ties)
    if store is not None:
        assert noise in (b"", b"\x00"), "what is no row was read"
        check(store, items, by_user(written, timed))


@REPEATABLE
@given(
    items=st.lists(text_ids, min_size=1, max_size=6),
    users=st.lists(text_ids, min_size=1, max_size=4),
    lists=st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4),
    style=csv_styles,
)
def test_csv_sequences(
    place: Callable[[], Path], items: list[str], users: list[str], lists: list[list[int]], style: tuple[int, str, bool]
) -> None:
    """Ids separated by spaces: an id with a blank in it becomes two, which the item table must have, or is refused."""
    folder = place()
    words = {user: [items[i % len(items)] for i in rows] for user, rows in zip(users, lists, strict=False)}
    (folder / "items.csv").write_bytes(csv_bytes([["item_id"], *([item] for item in items)], *style))
    rows = [[user, " ".join(found)] for user, found in words.items()]
    (folder / "sequences.csv").write_bytes(csv_bytes([["user_id", "item_ids"], *rows], *style))
    store = store_of(folder, items={"path": "items.csv"}, sequences={"path": "sequences.csv"})
    if store is not None:
        split = {user: [word for found_word in found for word in found_word.split()] for user, found in words.items()}
        check(store, items, {user: [(item, None) for item in found] for user, found in split.items()})


COLUMNS: dict[str, Callable[[list[int]], pa.Array]] = {
    "int8": lambda rows: pa.array(rows, pa.int8()),
    "int64": lambda rows: pa.array([2**63 - 1 - row for row in rows], pa.int64()),
    "uint64": lambda rows: pa.array(rows, pa.uint64()),
    "huge": lambda rows: pa.array([2**64 - 1 - row for row in rows], pa.uint64()),
    "float": lambda rows: pa.array([float(row) for row in rows]),
    "nan": lambda rows: pa.array([float("nan")] * len(rows)),
    "bool": lambda rows: pa.array([row % 2 == 0 for row in rows]),
    "null": lambda rows: pa.array([None] * len(rows), pa.string()),
    "some null": lambda rows: pa.array([None if row == 1 else str(row) for row in rows]),
    "binary": lambda rows: pa.array([b"\xff%d" % row for row in rows]),
    "not UTF-8": lambda rows: pa.array([b"\xff%d" % row for row in rows]).view(pa.string()),
    "date": lambda rows: pa.array(rows, pa.int32()).cast(pa.date32()),
    "timestamp": lambda rows: pa.array(rows, pa.timestamp("ns")),
    "decimal": lambda rows: pa.array(rows, pa.int64()).cast(pa.decimal128(25, 2)),
    "dictionary": lambda rows: pa.array([f"i{row}" for row in rows]).dictionary_encode(),
    "large string": lambda rows: pa.array([f"{row:03d}" for row in rows], pa.large_string()),
    "string view": lambda rows: pa.array([f"{row:03d}" for row in rows], pa.string_view()),
    "list": lambda rows: pa.array([[row] for row in rows]),
    "struct": lambda rows: pa.array([{"a": row} for row in rows]),
}


@settings(REPEATABLE, max_examples=EXAMPLES * 2)
@given(
    item_kind=st.sampled_from(sorted(COLUMNS)),
    event_kind=st.sampled_from(sorted(COLUMNS)),
    user_kind=st.sampled_from(sorted(COLUMNS)),
    same=st.booleans(),
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=2, max_size=12),
)
def test_parquet_interactions(
    place: Callable[[], Path],
    item_kind: str,
    event_kind: str,
    user_kind: str,
    same: bool,
    events: list[tuple[int, int]],
) -> None:
    folder = place()
    event_kind = item_kind if same else event_kind
    items, users, rows = COLUMNS[item_kind](list(range(6))), [u for u, _ in events], [i for _, i in events]
    columns = {"user_id": COLUMNS[user_kind](users), "item_id": COLUMNS[event_kind](rows)}
    try:
        pq.write_table(pa.table({"item_id": items}), folder / "items.parquet")
        pq.write_table(pa.table(columns), folder / "events.parquet")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return  # what cannot be written cannot be read
    sequences = {"path": "events.parquet", "layout": "interactions", "items": "item_id"}
    store = store_of(folder, sequences=sequences)
    if store is None:
        return
    texts = [list(map(str, column.to_pylist())) for column in (items, columns["user_id"], columns["item_id"])]
    written = [(user, item, "") for user, item in zip(texts[1], texts[2], strict=True)]
    check(store, texts[0], by_user(written, timed=False))


def test_plain_tables_are_read(place: Callable[[], Path]) -> None:
    """The fuzzers above do not only see refusals."""
    folder = place()
    (folder / "items.csv").write_text("item_id\n0042\n0x1A\nNaN\n")
    (folder / "events.csv").write_text("user_id,item_id,time\nu,NaN,3\nu,0042,-1\nv,0x1A,1\n")
    sequences = {"path": "events.csv", "layout": "interactions", "items": "item_id", "times": "time"}
    store = store_of(folder, items={"path": "items.csv"}, sequences=sequences)
    assert store is not None
    check(store, ["0042", "0x1A", "NaN"], {"u": [("0042", -1), ("NaN", 3)], "v": [("0x1A", 1)]})
