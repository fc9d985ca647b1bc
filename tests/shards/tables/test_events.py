"""Events of every kind of file become one table of the engine; what cannot be used is counted."""

from __future__ import annotations

import datetime
import itertools
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from shards.tables.engine import private_engine
from shards.tables.events import load_events
from tests.fixtures.tables import KINDS, Columns, csv_text, data_config, interactions, read_events, write_columns

NASTY = [
    "0042",
    "42",
    "0x1A",
    "1E5",
    "NA",
    "null",
    "NaN",
    "-1",
    "é",
    "a,b",
    'say "no"',
    "a\tb",
    "x::y",
    "7 8",
    "[",
    "{",
]
IDS = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=4)
FOLDERS = itertools.count()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(st.tuples(IDS, IDS, st.integers(0, 2 * 10**9)), min_size=1, max_size=12),
    kind=st.sampled_from(KINDS),
    cuts=st.sets(st.integers(1, 11), max_size=3),
)
def test_every_kind_of_file_in_any_parts_gives_the_same_events(
    tmp_path: Path, events: list[tuple[str, str, int]], kind: str, cuts: set[int]
) -> None:
    folder = tmp_path / str(next(FOLDERS))
    (folder / "parts").mkdir(parents=True)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(events)), len(events)]
    for part, (low, high) in enumerate(itertools.pairwise(bounds)):
        columns = dict(zip("uit", zip(*events[low:high], strict=True), strict=True))
        write_columns(folder / "parts" / f"part.{part}{kind}", columns)
    rows, counts = read_events(data_config(folder, sequences=interactions("parts")))
    expected = [(u, i, t * 10**6, None, None, None, row) for row, (u, i, t) in enumerate(events)]
    assert rows == expected
    assert (counts.rows, counts.bad, counts.time_unit, counts.sorted_users) == (len(events), {}, "s", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_every_kind(kind: str, tmp_path: Path) -> None:
    """Flattened in order; users whose list is out of order are counted, empty lists give nothing."""
    columns: Columns = {
        "u": ["a", "0042", "c"],
        "i": [["x", "0x1A", "x"], ["1E5", "y"], []],
        "t": [[3, 5, 4], [1, 1], []],
    }
    write_columns(tmp_path / f"histories{kind}", columns)
    sequences = {"path": f"histories{kind}", "user": "u", "items": "i", "times": "t"}
    rows, counts = read_events(data_config(tmp_path, sequences=sequences), "user", "item", "time", "row")
    flat = [("a", "x", 3), ("a", "0x1A", 5), ("a", "x", 4), ("0042", "1E5", 1), ("0042", "y", 1)]
    assert rows == [(user, item, time * 10**6, row) for row, (user, item, time) in enumerate(flat)]
    assert (counts.rows, counts.sorted_users) == (5, 1)


def test_cells_of_words(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("u,i\na,x y  0042\nb, z \nc,\n")
    data = data_config(tmp_path, sequences={"path": "h.csv", "user": "u", "items": "i"}, dirt={"max_bad_rows": 0.5})
    rows, counts = read_events(data, "user", "item", "time")
    assert rows == [("a", "x", None), ("a", "y", None), ("a", "0042", None), ("b", "z", None)]
    assert (counts.rows, counts.bad, counts.time_unit) == (5, {"no list of items": 1}, "none")


@pytest.mark.parametrize("cell", [' ["x", "y z"]', '["x", "y z"] ', '\t["x",\n"y z"]'])
def test_a_json_list_may_have_blanks_around_it(cell: str, tmp_path: Path) -> None:
    sequences = {"path": "h.parquet", "user": "u", "items": "i"}
    write_columns(tmp_path / "h.parquet", {"u": ["a"], "i": [cell]})
    assert read_events(data_config(tmp_path, sequences=sequences), "item")[0] == [("x",), ("y z",)]


def test_half_a_character_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text('u;i\na;["x", "\\ud800"]\n')
    sequences = {"path": "h.csv", "user": "u", "items": "i", "csv": {"delimiter": ";", "quote": ""}}
    with pytest.raises(UserError, match=r"column 'i' of .* half of a character \(a lone surrogate\); write"):
        read_events(data_config(tmp_path, sequences=sequences))
    (tmp_path / "h.csv").write_text('u;i\na;["\\ud83d\\ude00"]\n')
    assert read_events(data_config(tmp_path, sequences=sequences), "item")[0] == [("\N{GRINNING FACE}",)]


@pytest.mark.parametrize("neighbour", ["", '{"u": "b", "i": ["x"], "t": [1]}\n'])
def test_a_text_among_lists_means_the_same_whatever_is_beside_it(neighbour: str, tmp_path: Path) -> None:
    """As in a cell of a CSV: a JSON list, or words; also a number, which is a list of one."""
    lines = ['{"u": "a", "i": "x y  z", "t": " [3, 1, 2]"}', '{"u": "c", "i": 7, "t": "5"}', '{"u": "d", "i": ""}']
    (tmp_path / "h.jsonl").write_text(neighbour + "\n".join(lines))
    sequences = {"path": "h.jsonl", "user": "u", "items": "i", "times": "t"}
    data = data_config(tmp_path, sequences=sequences, dirt={"max_bad_rows": 0.5})
    rows, counts = read_events(data, "user", "item", "time")
    expected = [("a", "x", 3), ("a", "y", 1), ("a", "z", 2), ("c", "7", 5)]
    assert [row for row in rows if row[0] != "b"] == [(user, item, time * 10**6) for user, item, time in expected]
    assert counts.bad == {"lists of items and times differ in length": 1}


@pytest.mark.parametrize("neighbour", ["", '{"u": "b", "i": ["x"]}\n'])
def test_a_fraction_among_lists_is_no_id(neighbour: str, tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(neighbour + '{"u": "a", "i": 4.5}')
    with pytest.raises(UserError, match="holds the id 4.5; expected integers of 64 bits or text"):
        read_events(data_config(tmp_path, sequences={"path": "h.jsonl", "user": "u", "items": "i"}))


@pytest.mark.parametrize(
    ("columns", "line", "message"),
    [
        ({"times": "x"}, {"x": [2014, 7, 3]}, "column 'x' of .* holds times of type large_list"),
        ({"rating": "x"}, {"x": [5]}, "column 'x' of .* holds ratings of type large_list.*; expected numbers"),
        ({"event": "x"}, {"x": ["view"]}, "column 'x' of .* is of type large_list.*; expected text"),
        ({"split": "x"}, {"x": ["train"]}, "column 'x' of .* is of type large_list.*; expected text"),
        (
            {"layout": "sequences", "items": "i", "times": "x"},
            {"i": ["a"], "x": [[2014, 7, 3]]},
            "column 'x' of .* holds times of type large_list",
        ),
    ],
)
def test_arrays_of_json_lines_where_none_fit(
    columns: dict[str, str], line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Only the rows tell their types."""
    (tmp_path / "e.jsonl").write_text(json.dumps({"u": "a", "i": "x"} | line))
    with pytest.raises(UserError, match=message):
        split = {"by": "given"} if "split" in columns else {}
        read_events(data_config(tmp_path, sequences=interactions("e.jsonl", times="") | columns, split=split))


def test_ids_of_blanks_alone_are_none(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('u,i\na,x\n  ,x\n"",x\na,\t\n')
    sequences = interactions("e.csv", times="")
    rows, counts = read_events(data_config(tmp_path, sequences=sequences, dirt={"max_bad_rows": 0.9}), "user", "item")
    assert rows == [("a", "x")] and counts.bad == {"no user": 2, "no item": 1}


def test_the_first_of_two_values_of_one_key_counts(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"u": "a", "i": "x", "u": "b"}')
    rows, _ = read_events(data_config(tmp_path, sequences=interactions("e.jsonl", times="")), "user", "item")
    assert rows == [("a", "x")]


MOMENT = 1_406_073_600_000_000  # 2014-07-23
TIMES: dict[str, tuple[list[Any], pa.DataType | None, list[int], str]] = {
    "seconds": ([0, 1_406_073_600], pa.int64(), [0, MOMENT], "s"),
    "milliseconds": ([1, 1_406_073_600_001], pa.int64(), [1000, MOMENT + 1000], "ms"),
    "microseconds": ([MOMENT + 1, -5], pa.int64(), [MOMENT + 1, -5], "us"),
    "nanoseconds": ([1000 * MOMENT + 1999, -1], pa.int64(), [1000 * MOMENT + 1999, -1], "ns"),
    "ISO to the nanosecond": (
        ["2014-07-23T00:00:00.0000019Z", "1969-12-31 23:59:59.999999999"],
        None,
        [1000 * MOMENT + 1900, -1],
        "text",
    ),
    "unsigned": ([7, 1_406_073_600], pa.uint32(), [7_000_000, MOMENT], "s"),
    "floats": ([1_406_073_600.25, 0.5], pa.float64(), [MOMENT + 250_000, 500_000], "s"),
    "floats of milliseconds": ([1_406_073_600_000.5, 1.0], pa.float64(), [MOMENT + 500, 1000], "ms"),
    "text of seconds": (["1406073600.25", ".5"], None, [MOMENT + 250_000, 500_000], "s"),
    "seconds to the nanosecond": (
        ["1406073600.000000001", "-0.5"],
        None,
        [1000 * MOMENT + 1, -500_000_000],
        "s",
    ),
    "milliseconds to the nanosecond": (["1406073600000.000001", "7"], None, [1000 * MOMENT + 1, 7_000_000], "ms"),
    "dates": (["2014-07-23", "1970-01-02"], None, [MOMENT, 86_400_000_000], "text"),
    "ISO": (["2014-07-23T00:00:00.000001", "2014-07-23 00:00:01"], None, [MOMENT + 1, MOMENT + 1_000_000], "text"),
    "ISO with zones": (["2014-07-23T00:00:00Z", "2014-07-23T02:00:00+02:00"], None, [MOMENT, MOMENT], "text"),
    "ISO with short zones": (["2014-07-22T19:00:00-0500", "2014-07-23 02:00:00+02"], None, [MOMENT, MOMENT], "text"),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_times_of_every_form(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, arrow, expected, unit = TIMES[name]
    types = {"u": pa.string(), "i": pa.string(), "t": arrow or pa.string()}
    write_columns(tmp_path / f"e{kind}", {"u": ["a", "b"], "i": ["x", "y"], "t": values}, types)
    rows, counts = read_events(data_config(tmp_path, sequences=interactions(f"e{kind}")), "time")
    assert ([time for (time,) in rows], counts.time_unit) == (expected, unit)
    assert counts.per_second == (10**9 if "nanosecond" in name else 10**6)
    assert "events: 't' holds" in capsys.readouterr().out


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_timestamps_of_parquet(unit: str, zone: str | None, tmp_path: Path) -> None:
    """A zone changes how a moment is shown, not when it is; without one it is UTC."""
    times = pa.array([1_406_073_600, -1]).cast(pa.timestamp("s")).cast(pa.timestamp(unit))
    table = pa.table({"u": ["a", "b"], "i": ["x", "y"], "t": times.cast(pa.timestamp(unit, zone))})
    pq.write_table(table, tmp_path / "e.parquet")
    rows, counts = read_events(data_config(tmp_path, sequences=interactions("e.parquet")), "time")
    assert (rows, counts.time_unit, counts.per_second) == ([(MOMENT,), (-1_000_000,)], "timestamp", 10**6)


def test_timestamps_finer_than_microseconds(tmp_path: Path) -> None:
    """They alone make all times nanoseconds; a year that these cannot hold is a bad row."""
    far = pa.array([10**9, -1, -(2**63) + 10], pa.timestamp("ns"))
    pq.write_table(pa.table({"u": ["a", "b", "c"], "i": ["x", "y", "z"], "t": far}), tmp_path / "e.parquet")
    rows, counts = read_events(data_config(tmp_path, sequences=interactions("e.parquet")), "time")
    assert ([time for (time,) in rows], counts.per_second) == ([10**9, -1, -(2**63) + 10], 10**9)
    texts = ["2014-07-23T00:00:00.0000019Z", "0800-12-25T00:00:00Z"]
    write_columns(tmp_path / "e.csv", {"u": ["a", "b"], "i": ["x", "y"], "t": texts})
    data = data_config(tmp_path, sequences=interactions("e.csv"), dirt={"max_bad_rows": 0.5})
    rows, counts = read_events(data, "time")
    assert (rows, counts.bad) == ([(1000 * MOMENT + 1900,)], {"time": 1})


def test_decimals_are_exact(tmp_path: Path) -> None:
    """No float holds nanoseconds of today; a date that is too far for the engine is a bad row."""
    ticks = [1000 * MOMENT + 3, 1000 * MOMENT + 1, -1]
    times = pa.array(map(Decimal, ticks), pa.decimal128(38, 0))
    pq.write_table(pa.table({"u": ["a", "b", "c"], "i": ["x", "y", "z"], "t": times}), tmp_path / "e.parquet")
    rows, counts = read_events(data_config(tmp_path, sequences=interactions("e.parquet")), "time")
    assert ([time for (time,) in rows], counts.time_unit, counts.per_second) == (ticks, "ns", 10**9)


def test_days_that_no_timestamp_holds_are_bad(tmp_path: Path) -> None:
    days = pa.array([2**31 - 1, 0, -(2**31)], pa.date32())
    pq.write_table(pa.table({"u": ["a", "b", "c"], "i": ["x", "y", "z"], "t": days}), tmp_path / "e.parquet")
    data = data_config(tmp_path, sequences=interactions("e.parquet"), dirt={"max_bad_rows": 0.7})
    rows, counts = read_events(data, "user", "time")
    assert (rows, counts.bad) == ([("b", 0)], {"time": 2})


def test_days_with_years_of_two_digits_are_bad(tmp_path: Path) -> None:
    write_columns(tmp_path / "e.csv", {"u": list("abc"), "i": list("xyz"), "t": ["28/11/19", "2019-11-28", "03-12-19"]})
    data = data_config(tmp_path, sequences=interactions("e.csv"), dirt={"max_bad_rows": 0.7})
    rows, counts = read_events(data, "user")
    assert (rows, counts.bad) == ([("b",)], {"time": 2})
    with pytest.raises(UserError, match=r"2 of 3 rows cannot be used \(time: 2, such as '28/11/19'\)"):
        read_events(data_config(tmp_path, sequences=interactions("e.csv")))


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
@pytest.mark.parametrize("layout", ["interactions", "sequences"])
def test_numbers_that_are_dates_are_refused(kind: str, layout: str, tmp_path: Path) -> None:
    """As seconds they would be of 1970; a unit that is set says that they are times."""
    wrap = (lambda value: [value]) if layout == "sequences" else (lambda value: value)
    columns: Columns = {"u": ["a", "b"], "i": [wrap("x"), wrap("y")], "t": [wrap(20_140_723), wrap(20_140_725)]}
    write_columns(tmp_path / f"e{kind}", columns)
    sequences = interactions(f"e{kind}", layout=layout)
    with pytest.raises(UserError, match="column 't' of .* holds numbers such as 20140723, which look like dates, not"):
        read_events(data_config(tmp_path, sequences=sequences))
    rows, _ = read_events(data_config(tmp_path, sequences=sequences | {"time_unit": "s"}), "time")
    assert rows == [(20_140_723 * 10**6,), (20_140_725 * 10**6,)]


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_seconds_among_milliseconds(kind: str, tmp_path: Path) -> None:
    """A few are bad rows, whichever are the few; more are refused."""
    for unit, most, one in (("s", 1_400_000_000, 1_400_000_000_000), ("ms", 1_400_000_000_000, 1_400_000_000)):
        times = [most] * 199 + [one]
        write_columns(tmp_path / f"e{kind}", {"u": ["a"] * 200, "i": ["x"] * 200, "t": times})
        rows, counts = read_events(data_config(tmp_path, sequences=interactions(f"e{kind}")), "time")
        assert (set(rows), counts.bad, counts.time_unit) == ({(1_400_000_000 * 10**6,)}, {"time": 1}, unit)
    write_columns(
        tmp_path / f"e{kind}", {"u": ["a"] * 8, "i": ["x"] * 8, "t": [1_400_000_000] * 7 + [1_400_000_000_000]}
    )
    message = (
        r"holds times of several units: 7 of 8 look like seconds \(they are of 1990 to 2100\), 1 like milliseconds"
    )
    with pytest.raises(UserError, match=message):
        read_events(data_config(tmp_path, sequences=interactions(f"e{kind}")))
    data = data_config(tmp_path, sequences=interactions(f"e{kind}", time_unit="ms"))
    assert read_events(data, "time")[0][0] == (1_400_000_000_000,)


def test_a_column_without_a_time_is_all_bad(tmp_path: Path) -> None:
    pq.write_table(pa.table({"u": ["a"], "i": ["x"], "t": pa.nulls(1)}), tmp_path / "e.parquet")
    with pytest.raises(UserError, match="1 of 1 rows cannot be used .time: 1."):
        read_events(data_config(tmp_path, sequences=interactions("e.parquet")))


def test_dates_of_parquet_and_a_unit_that_is_chosen(tmp_path: Path) -> None:
    days = [datetime.date(2014, 7, 23), datetime.date(1969, 12, 31)]
    write_columns(tmp_path / "e.parquet", {"u": ["a", "b"], "i": ["x", "y"], "t": days})
    rows, _ = read_events(data_config(tmp_path, sequences=interactions("e.parquet")), "time")
    assert rows == [(MOMENT,), (-86_400_000_000,)]
    write_columns(tmp_path / "e.csv", {"u": ["a"], "i": ["x"], "t": [5]})
    rows, counts = read_events(data_config(tmp_path, sequences=interactions("e.csv", time_unit="ms")), "time")
    assert (rows, counts.time_unit) == ([(5000,)], "ms")


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_integer_ids(kind: str, tmp_path: Path) -> None:
    """Text by default, whatever a file's types; integers are asked for, and then nothing else is one."""
    write_columns(tmp_path / f"e{kind}", {"u": [7, -1], "i": [2**62, 0], "t": [1, 2]})
    sequences = interactions(f"e{kind}")
    rows, _ = read_events(data_config(tmp_path, sequences=sequences), "user", "item")
    assert rows == [("7", str(2**62)), ("-1", "0")]
    rows, _ = read_events(data_config(tmp_path, sequences=sequences, ids="integer"), "user", "item")
    assert rows == [(7, 2**62), (-1, 0)]
    for ids, expected in (
        ({"items": "integer"}, ("7", 2**62)),
        ({"items": "text", "users": "integer"}, (7, str(2**62))),
    ):
        rows, _ = read_events(data_config(tmp_path, sequences=sequences, ids=ids), "user", "item")
        assert rows[0] == expected


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("word", ["0042", "0x1A", "1E5", "4.0", "+1", " 1"])
def test_what_is_not_written_like_an_integer_is_refused(word: str, kind: str, tmp_path: Path) -> None:
    write_columns(tmp_path / f"e{kind}", {"u": ["1", "2"], "i": ["3", word], "t": [1, 2]})
    data = data_config(tmp_path, sequences=interactions(f"e{kind}"), ids="integer")
    with pytest.raises(UserError, match="column 'i' of .* holds the id '.*', which is no integer; set data.ids: text"):
        read_events(data)


@pytest.mark.parametrize(("kind", "message"), [(".parquet", "ids of type double"), (".jsonl", "holds the id 4.0")])
@pytest.mark.parametrize("layout", ["interactions", "sequences"])
def test_ids_that_are_floats_are_refused(kind: str, message: str, layout: str, tmp_path: Path) -> None:
    items = [3.5, 4.0] if layout == "interactions" else [[1.0], [4.0, 2.0]]
    items = [4.0, 4.0] if layout == "interactions" else [[4.0], [4.0]]
    write_columns(tmp_path / f"e{kind}", {"u": ["a", "b"], "i": items})
    data = data_config(tmp_path, sequences=interactions(f"e{kind}", times="", layout=layout))
    with pytest.raises(UserError, match=f"{message}.*; expected integers( of 64 bits)? or text"):
        read_events(data)


def test_bad_rows_are_counted_by_their_cause(tmp_path: Path) -> None:
    """The numbers of the rows that are kept tell where the others stood."""
    lines = ["u,i,t,r,s", "a,x,1,5,train", ",x,1,5,train", "a,,1,5,test", "a,x,soon,5,test", "a,x,,5,test"]
    lines += ["a,x,1,good,test", "a,x,1,inf,dev", "a,x,1,5,later", "a,x,1", "a,y,2,,validation", "a,z,2,nan,TEST"]
    (tmp_path / "e.csv").write_text("\n".join(lines))
    sequences = interactions("e.csv", rating="r", split="s")
    given = {"by": "given"}
    data = data_config(tmp_path, sequences=sequences, split=given, dirt={"max_bad_rows": 0.8})
    rows, counts = read_events(data)
    assert rows == [
        ("a", "x", 1_000_000, 5.0, None, "train", 0),
        ("a", "y", 2_000_000, None, None, "valid", 8),
        ("a", "z", 2_000_000, None, None, "test", 9),
    ]
    bad = {"no item": 1, "no user": 1, "rating": 2, "split": 1, "time": 2, "unreadable line": 1}
    assert (counts.rows, counts.bad) == (11, bad)
    data = data_config(tmp_path, sequences=sequences, split=given, dirt={"max_bad_rows": 0.7})
    with pytest.raises(
        UserError,
        match=r"8 of 11 rows cannot be used \(time: 2, such as 'soon', rating: 2, such as 'good'.* split: 1, such as "
        r"'later'.*more than a share of 0.7; .*or raise data.dirt",
    ):
        read_events(data)


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"u": "a", "i": "x", "t": 1} {', "{'u': 1}", "\x01", '"u"', "nul"])
def test_lines_that_are_no_json_objects(line: str, tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text('{"u": "a", "i": "x", "t": 1}\n' + line + '\n\n  \n{"i": 5, "u": "b", "t": "2"}')
    data = data_config(tmp_path, sequences=interactions("e.jsonl"), dirt={"max_bad_rows": 0.4})
    rows, counts = read_events(data, "user", "item", "time")
    assert rows == [("a", "x", 1_000_000), ("b", "5", 2_000_000)]
    assert (counts.rows, counts.bad) == (3, {"unreadable line": 1})


def test_examples_are_of_the_table_that_has_them(tmp_path: Path) -> None:
    for name, time in (("train", "2024-01-02"), ("valid", "02.01.2024 at noon"), ("test", "later")):
        (tmp_path / f"{name}.csv").write_text(f"u,i,t\na,x,2024-01-01\na,y,{time}\n")
    split = {"by": "given", "valid": "valid.csv", "test": "test.csv"}
    with pytest.raises(UserError, match=r"2 of 6 rows cannot be used \(time: 2, such as '02.01.2024 at noon'\)"):
        read_events(data_config(tmp_path, sequences=interactions("train.csv"), split=split))


def test_lists_that_differ_in_length_and_nulls_in_lists(tmp_path: Path) -> None:
    columns: Columns = {
        "u": ["a", "b", "c", None],
        "i": [["x", "y"], None, ["x", None], ["z"]],
        "t": [[1], [1], [1, 2], [3]],
    }
    for kind in (".parquet", ".jsonl"):
        write_columns(tmp_path / f"e{kind}", columns)
        data = data_config(tmp_path, sequences=interactions(f"e{kind}", layout="sequences"), dirt={"max_bad_rows": 0.9})
        rows, counts = read_events(data, "user", "item", "time", "row")
        assert rows == [("c", "x", 1_000_000, 0)]
        lists = {"lists of items and times differ in length": 1, "no list of items": 1}
        assert (counts.rows, counts.bad) == (5, lists | {"no item": 1, "no user": 1})


def test_an_integer_that_no_id_can_be(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(f'{{"u": 1, "i": {2**70}, "t": 1}}')
    with pytest.raises(UserError, match=f"holds the id {2**70}; expected integers of 64 bits or text"):
        read_events(data_config(tmp_path, sequences=interactions("e.jsonl")))


def test_where_numbers_and_dates_are_mixed_the_fewer_are_bad(tmp_path: Path) -> None:
    write_columns(tmp_path / "e.csv", {"u": list("abc"), "i": list("xyz"), "t": ["2014-07-23", "0", "2014-07-24"]})
    data = data_config(tmp_path, sequences=interactions("e.csv"), dirt={"max_bad_rows": 0.5})
    rows, counts = read_events(data, "user")
    assert (rows, counts.bad, counts.time_unit) == ([("a",), ("c",)], {"time": 1}, "text")


def test_splits_by_files(tmp_path: Path) -> None:
    for name, user in (("train", "a"), ("valid", "b"), ("test", "c")):
        write_columns(tmp_path / f"{name}.csv", {"u": [user], "i": ["x"], "t": [1]})
    split = {"by": "given", "valid": "valid.csv", "test": ["test.csv"]}
    rows, _ = read_events(
        data_config(tmp_path, sequences=interactions("train.csv"), split=split), "user", "split", "row"
    )
    assert rows == [("a", "train", 0), ("b", "valid", 1), ("c", "test", 2)]


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        write_columns(tmp_path / f"{name}.csv", {"u": ["a"], "i": ["x"], "t": [1]})
    split = {"by": "given", "valid": "valid.csv", "test": "test.csv"}
    for path in ("*.csv", ["train.csv", str(tmp_path / "valid.csv")]):
        data = data_config(tmp_path, sequences=interactions("train.csv") | {"path": path}, split=split)
        with pytest.raises(
            UserError, match=r"data\.sequences\.path and data\.split\.\w+ both name \S+\.csv: its events"
        ):
            read_events(data)


HOSTILE = """a"b'); DROP TABLE raw_events; --"""


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_hostile_names(kind: str, tmp_path: Path) -> None:
    """Neither a file's nor a column's name is part of a statement, or of a pattern."""
    names = [HOSTILE, "new\nline", "tab\t~1/[0]$*"]
    file = f'it\'s "x"; [a]*?{kind}'
    write_columns(tmp_path / file, dict(zip(names, (["a"], ["x"], [1]), strict=True)))
    sequences = interactions(file, user=names[0], items=names[1], times=names[2])
    rows, _ = read_events(data_config(tmp_path, sequences=sequences), "user", "item", "time")
    assert rows == [("a", "x", 1_000_000)]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_fields_of_nested_columns(kind: str, tmp_path: Path) -> None:
    """By dotted names; a column whose own name has the dot wins."""
    columns: Columns = {"who": [{"id": "a", "x": {"y": 1}}], "what.id": ["x"], "what": [{"id": "no"}]}
    write_columns(tmp_path / f"e{kind}", columns)
    sequences = interactions(f"e{kind}", user="who.id", items="what.id", times="who.x.y")
    rows, _ = read_events(data_config(tmp_path, sequences=sequences), "user", "item", "time")
    assert rows == [("a", "x", 1_000_000)]


def test_fields_of_the_column_with_the_longest_name(tmp_path: Path) -> None:
    columns: Columns = {"a": ["no"], "a.b": [{"c": "a"}], "i": ["x"]}
    write_columns(tmp_path / "e.parquet", columns)
    data = data_config(tmp_path, sequences=interactions("e.parquet", user="a.b.c", times=""))
    assert read_events(data, "user", "item")[0] == [("a", "x")]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_ratings_are_the_decimals_that_were_meant(kind: pa.DataType, tmp_path: Path) -> None:
    """As in a CSV of the same rows, so that a rating that equals a threshold is not below it."""
    ratings = pa.array(np.array([0.7, 3.3, np.nan, 5.0], kind.to_pandas_dtype()))
    pq.write_table(pa.table({"u": list("abcd"), "i": list("xxxx"), "r": ratings}), tmp_path / "e.parquet")
    rows, _ = read_events(data_config(tmp_path, sequences=interactions("e.parquet", times="", rating="r")), "rating")
    assert rows == [(0.7,), (3.3,), (None,), (5.0,)]


def test_columns_of_views_and_uuids(tmp_path: Path) -> None:
    view = pa.string_view()
    uuids = pa.array([bytes(16), b"\xc8" * 16], pa.uuid())
    columns = {
        "u": uuids,
        "i": pa.array([["x", "y"], ["z"]], pa.list_(view)),
        "t": pa.array([["5", "2014-07-23"], ["2014-07-23"]], pa.list_(view)),
    }
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    sequences = interactions("e.parquet", layout="sequences")
    rows, _ = read_events(
        data_config(tmp_path, sequences=sequences, dirt={"max_bad_rows": 0.5}), "user", "item", "time"
    )
    user = "00000000-0000-0000-0000-000000000000"
    assert rows == [(user, "y", MOMENT), (user.replace("0", "c8")[:8] + "-c8c8-c8c8-c8c8-" + "c8" * 6, "z", MOMENT)]
    events = {
        "u": uuids,
        "i": pa.array(["x", "y"], view),
        "t": pa.array(["1", "2"], view),
        "r": pa.array(["3", "4"], view),
    }
    pq.write_table(pa.table(events), tmp_path / "e.parquet")
    rows, _ = read_events(
        data_config(tmp_path, sequences=interactions("e.parquet", rating="r")), "item", "time", "rating"
    )
    assert rows == [("x", 10**6, 3.0), ("y", 2 * 10**6, 4.0)]


def test_a_failure_leaves_no_table(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("u,i,t\na,x,never\n")
    engine = private_engine()
    with pytest.raises(UserError, match="cannot be used"):
        load_events(engine, data_config(tmp_path, sequences=interactions("e.csv")), tmp_path)
    assert engine.execute("SHOW TABLES").fetchall() == []


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no column": ("u,i\na,x\n", {}, "has no column 't'; it has: u, i"),
    "case": ("U,i,t\na,x,1\n", {}, "has no column 'u'; it has 'U': names of columns differ by case"),
    "by case": ("u,U,i,t\na,b,x,1\n", {}, "has columns that differ from 'u' only by case; give each its own name"),
    "twice": ("u,u,i,t\na,b,x,1\n", {}, "has several columns 'u'; give each its own name"),
    "no rows": ("u,i,t\n", {}, "e.csv is empty; expected at least one row"),
    "nothing": ("", {}, "e.csv is empty; expected a line with the names of its columns"),
    "encoding": (
        "u,i,t\na,caf\udce9,1\n",
        {},
        "is not UTF-8 text .*; name its encoding, such as --data.sequences.csv.encoding latin-1",
    ),
    "another encoding": ("u,i,t\na,x,1\n", {"encoding": "utf-16"}, "is not utf-16 text"),
    "no encoding": (
        "u,i,t\na,x,1\n",
        {"encoding": "latin-one"},
        "'latin-one', which Python does not know; try latin-1",
    ),
    "no encoding of text": ("u,i,t\na,x,1\n", {"encoding": "hex"}, "'hex', which is no encoding of text"),
    "delimiter": ("u,i,t\na,x,1\n", {"delimiter": '"'}, "expected ASCII that differs, and no line break"),
    "a quote without its pair": (
        'u,i,t\na,"x,1\n' + "b,y,2\n" * 2_000_000,
        {},
        "a text in quotes that begins in line 2 is not closed in 8,388,608 bytes; is it a quote without its pair",
    ),
    "a row of lines and too few columns": (
        'u,i,t\na,"x\ny"\n',
        {},
        "has a row of many lines that does not fit its columns",
    ),
    "no line breaks": (
        "u,i,t\na," + "x" * (1 << 25),
        {},
        "has a row of more than 8,388,608 bytes; expected shorter ones",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    text, csv, message = REFUSED[name]
    (tmp_path / "e.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_events(data_config(tmp_path, sequences=interactions("e.csv", csv=csv)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8-sig", "utf-32-le", "shift_jis"])
@pytest.mark.parametrize("delimiter", [",", "::", "|", "~^~"])
def test_encodings_and_delimiters(encoding: str, delimiter: str, tmp_path: Path) -> None:
    """A byte-order mark is not part of a name; a delimiter in quotes is none."""
    word = "日本" if encoding == "shift_jis" else "café"
    rows = [["u", "i", "t"], [word, f'x{delimiter}"y', "1"], *[["b", f"i{n}", str(n)] for n in range(3000)]]
    text = "\n".join(delimiter.join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in rows)
    (tmp_path / "e.csv").write_bytes(text.encode(encoding))
    csv = {"encoding": encoding, "delimiter": delimiter}
    found, _ = read_events(data_config(tmp_path, sequences=interactions("e.csv", csv=csv)), "user", "item", "time")
    assert found[0] == (word, f'x{delimiter}"y', 1_000_000)
    assert found[1:] == [("b", f"i{n}", n * 10**6) for n in range(3000)]


def test_byte_order_mark_and_no_header(tmp_path: Path) -> None:
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfu,i,t\na,x,1\n")
    rows, _ = read_events(data_config(tmp_path, sequences=interactions("bom.csv")), "user", "time")
    assert rows == [("a", 1_000_000)]
    (tmp_path / "bare.csv").write_text('1::"x::5\n2::y::6\n')
    csv = {"delimiter": "::", "quote": "", "header": False, "names": ["u", "i", "t"]}
    rows, _ = read_events(data_config(tmp_path, sequences=interactions("bare.csv", csv=csv)), "user", "item", "time")
    assert rows == [("1", '"x', 5_000_000), ("2", "y", 6_000_000)]


def test_many_rows_stream(tmp_path: Path) -> None:
    """Files of several blocks, in order."""
    n = 400_000
    rows = [("u", "i", "t"), *((f"user{row % 1000}", f"item{row % 777}", row) for row in range(n))]
    (tmp_path / "e.csv").write_text(csv_text(rows, ","))
    engine = private_engine()
    counts = load_events(engine, data_config(tmp_path, sequences=interactions("e.csv")), tmp_path)
    query = (
        """SELECT count(*), bool_and("row" = "time" // 1000000 AND "user" = 'user' || "row" % 1000) FROM raw_events"""
    )
    assert counts.rows == n and engine.execute(query).fetchall() == [(n, True)]
