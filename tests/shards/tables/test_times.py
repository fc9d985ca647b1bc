"""Units of times, their bounds, and times that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.tables import TimeUnit
from shards.tables.times import ticks_of, unit_counts, unit_of
from tests.fixtures.tables import data_config, interactions, read_events, write_columns


@pytest.mark.parametrize(
    ("largest", "unit"),
    [
        (0, "s"),
        (1e11 - 1, "s"),
        (1e11, "ms"),
        (1e14 - 1, "ms"),
        (1e14, "us"),
        (1e17 - 16, "us"),
        (1e17, "ns"),
        (9e18, "ns"),
    ],
)
def test_the_size_of_numbers_tells_the_unit(largest: float, unit: str) -> None:
    counts = unit_counts(pa.array([largest, -largest, None]))
    assert counts.sum() == 2 and unit_of(counts, "auto") == unit
    assert unit_of(counts, "us") == "us"


@pytest.mark.parametrize("column", [pa.array([-7, 5, None]), pa.array(["5", "-7", "x"]), pa.array([5.0, -7.0])])
def test_numbers_count_without_their_sign(column: pa.Array) -> None:
    assert unit_counts(column).tolist() == [2, 0, 0, 0]


def test_a_few_that_are_too_large_do_not_change_the_unit() -> None:
    assert unit_of([91, 0, 0, 9], "auto") == "s"
    assert unit_of([90, 0, 0, 10], "auto") == "ns"
    assert unit_of([50, 43, 7, 0], "auto") == "ms"
    assert unit_of([0, 0, 0, 0], "auto") == "s"


def test_dates_are_no_numbers() -> None:
    assert unit_counts(pa.array(["2014-07-23"])).sum() == 0
    assert unit_counts(pa.array([5], pa.timestamp("s"))).sum() == 0


@pytest.mark.parametrize(
    ("column", "unit", "ticks", "per_second"),
    [
        (pa.array([1, 2]), "ms", [1, 2], 1000),
        (pa.array([0.5, 2.0]), "s", [0.5, 2.0], 1),
        (pa.array([5, 6], pa.timestamp("ns")), "s", [5, 6], 10**9),
        (pa.array(["1970-01-01T00:00:00.5", "1970-01-02"]), "s", [500_000, 86_400_000_000], 10**6),
        (pa.array(["1970-01-01T00:00:00.5", "1970-01-01T00:00:00.000000001Z"]), "s", [500_000_000, 1], 10**9),
        (pa.array(["1", "2.5"]), "s", [1.0, 2.5], 1),
        (pa.array([1], pa.date32()), "s", [86_400_000_000], 10**6),
    ],
)
def test_times_to_sort_by(column: pa.Array, unit: TimeUnit, ticks: list[float], per_second: int) -> None:
    found, found_per_second = ticks_of(column, unit, "here")
    assert (found.tolist(), found_per_second) == (ticks, per_second)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, None]), "here holds 1 null times"),
        (pa.array(["1", "soon"]), "here holds the time 'soon'; expected a number or a date"),
        (pa.array(["1", "2014-07-23"]), "here holds moment and whole times; expected all numbers, or all dates"),
        (pa.array([float("inf"), 1.0]), "here holds the time inf"),
        (pa.array([1e300, 1.0]), r"here holds the time 1e\+300; no clock has it"),
        (
            pa.array(["1970-01-01T00:00:00.000000001", "0800-12-25"]),
            "holds times to the nanosecond, and one of year 800",
        ),
        (pa.array([True]), "times of type bool; expected numbers, dates or timestamps"),
    ],
)
def test_times_that_are_refused(column: pa.Array, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ticks_of(column, "s", "here")


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
@pytest.mark.parametrize("time", [2**62, 1e300, "infinity"])
def test_times_that_no_clock_has_are_bad(kind: str, time: Any, tmp_path: Path) -> None:
    times = [time, "2014-07-23"] if isinstance(time, str) else [time, type(time)(5)]
    write_columns(tmp_path / f"e{kind}", {"u": ["a", "b"], "i": ["x", "y"], "t": times})
    data = data_config(tmp_path, sequences=interactions(f"e{kind}", time_unit="s"), dirt={"max_bad_rows": 0.5})
    rows, counts = read_events(data, "user")
    assert (rows, counts.bad) == ([("b",)], {"time": 1})
