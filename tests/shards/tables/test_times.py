"""Units of times, their bounds, and times that are refused."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.tables import TimeUnit
from shards.tables.times import NumberCounts, ticks_of, unit_counts, unit_of
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
    assert counts.sizes.sum() == 2 and unit_of(counts, 0, "here") == unit


@pytest.mark.parametrize("column", [pa.array([-7, 5, None]), pa.array(["5", "-7", "x"]), pa.array([5.0, -7.0])])
def test_numbers_count_without_their_sign(column: pa.Array) -> None:
    assert unit_counts(column).sizes.tolist() == [2, 0, 0, 0]


def counts_of(sizes: list[int], recent: list[int]) -> NumberCounts:
    return NumberCounts(np.array(sizes), np.array(recent))


def test_a_few_that_are_too_large_do_not_change_the_unit() -> None:
    for sizes, unit in (([91, 0, 0, 9], "s"), ([90, 0, 0, 10], "ns"), ([50, 43, 7, 0], "ms"), ([0, 0, 0, 0], "s")):
        assert unit_of(counts_of(sizes, [0, 0, 0, 0]), 0.01, "here") == unit


@pytest.mark.parametrize(
    ("sizes", "recent", "unit"),
    [
        ([88, 12, 0, 0], [88, 12, 0, 0], None),  # 1 in 8 is in milliseconds
        ([98, 2, 0, 0], [98, 2, 0, 0], None),  # not enough to be the unit, but too many to be left out
        ([99, 1, 0, 0], [99, 1, 0, 0], "s"),
        ([1, 99, 0, 0], [1, 99, 0, 0], "ms"),
        ([0, 50, 50, 0], [0, 50, 50, 0], None),
        ([88, 0, 0, 12], [88, 0, 0, 0], None),  # clocks that were never set would make nanoseconds of all
        ([80, 20, 0, 0], [3, 0, 0, 0], "ms"),  # milliseconds since something else: 7 to 47 days after it
        ([60, 40, 0, 0], [0, 40, 0, 0], "ms"),  # zeros for times that are missing
    ],
)
def test_times_of_two_units_are_refused(sizes: list[int], recent: list[int], unit: str | None) -> None:
    counts = counts_of(sizes, recent)
    if unit is not None:
        assert unit_of(counts, 0.01, "here") == unit
        return
    with pytest.raises(UserError, match="here holds times of several units: .* write all in one unit, or, if"):
        unit_of(counts, 0.01, "here")


def test_what_numbers_look_like() -> None:
    """Years from 1990 to 2100 in each unit, and digits of dates; neither a 13th month nor a 32nd day."""
    years = [631_152_000, 4_102_444_799, 631_151_999, 4_102_444_800, 1_406_073_600_000, 1_406_073_600_000_000, 10**18]
    assert unit_counts(pa.array(years)).recent.tolist() == [2, 1, 1, 1]
    dates = [
        "20140723",
        "19991231235959",
        "201407231030",
        "20140732",
        "20141301",
        "20140723246060",
        "2014-07-23",
        "1e9",
    ]
    counts = unit_counts(pa.array(dates))
    assert (counts.dates, counts.first_date) == (3, 20_140_723)
    assert counts.plus(unit_counts(pa.array([19_991_231.0]))).first_date == 19_991_231


def test_dates_are_no_numbers() -> None:
    assert unit_counts(pa.array(["2014-07-23"])).sizes.sum() == 0
    assert unit_counts(pa.array([5], pa.timestamp("s"))).sizes.sum() == 0


NO_TIMES = ["28/11/19", "12-01-14", "99-12-31", "2014-07/23", "01/02/2014", "23.07.2014", "Jul 23 2014", "10:00:00"]
NO_TIMES += ["epoch", "infinity", "2014-07-23 (BC)", "2014-07-23 10:00:00 EST", "2014-07-23 10:00 Europe/Berlin"]
NO_TIMES += ["2014-02-30", "2014-07-23T10:00:00+99:00", "1_000", "0x10", "1,000", "nan", "inf", "5 6", "."]


@pytest.mark.parametrize("text", NO_TIMES)
def test_texts_that_are_no_times(text: str) -> None:
    """Of two digits nobody knows which is the year; a zone of letters has several meanings."""
    with pytest.raises(UserError, match="holds the time '.*'; expected a number or a date"):
        ticks_of(pa.array([text]), "s", "here")


MOMENT = 1_406_073_600_000_000  # 2014-07-23


@pytest.mark.parametrize(
    ("text", "tick"),
    [
        ("2014-07-23", MOMENT),
        ("2014/7/23", MOMENT),
        ("2014-07-23 00:00", MOMENT),
        ("2014-07-23T02:00:00+0200", MOMENT),
        ("2014-07-22T19:00:00.000-05", MOMENT),
        ("2014-07-23 00:00:00 UTC", MOMENT),
        ("2014-07-23 00:00:00.5Z", MOMENT + 500_000),
        ("0999-01-01", -30_641_760_000_000_000),
    ],
)
def test_forms_of_iso_times(text: str, tick: int) -> None:
    assert ticks_of(pa.array([text]), "s", "here")[0].tolist() == [tick]


@pytest.mark.parametrize(
    ("column", "unit", "ticks", "per_second"),
    [
        (pa.array([1, 2]), "ms", [1, 2], 1000),
        (pa.array([0.5, 2.0]), "s", [0.5, 2.0], 1),
        (pa.array([5, 6], pa.timestamp("ns")), "s", [5, 6], 10**9),
        (pa.array(["1970-01-01T00:00:00.5", "1970-01-02"]), "s", [500_000, 86_400_000_000], 10**6),
        (pa.array(["1970-01-01T00:00:00.5", "1970-01-01T00:00:00.000000001Z"]), "s", [500_000_000, 1], 10**9),
        (pa.array(["1", "2.5"]), "s", [1_000_000, 2_500_000], 10**6),
        (pa.array(["1", "-2.5e3"]), "s", [1, -2500], 1),
        (pa.array(["-0.000000001", "1400000000.123456789"]), "s", [-1, 1_400_000_000_123_456_789], 10**9),
        (pa.array(["1400000000000.5", "7"]), "ms", [1_400_000_000_000_500, 7000], 10**6),
        (pa.array(["1400000000000.000001", "7"]), "ms", [1_400_000_000_000_000_001, 7_000_000], 10**9),
        (pa.array(["1400000000000000.25"]), "us", [1_400_000_000_000_000_250], 10**9),
        (pa.array([Decimal(10**18 + 1), Decimal(10**18)], pa.decimal128(38, 0)), "ns", [10**18 + 1, 10**18], 10**9),
        (pa.array([Decimal("0.000000001")], pa.decimal128(38, 30)), "s", [1], 10**9),
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
            "holds times to the nanosecond, and one of year 800, .*: expected 1678 to 2261",
        ),
        (pa.array(["0.000000001", "1e11"]), "holds times to the nanosecond, and one of year 5138"),
        (pa.array([1, 2**31 - 1], pa.date32()).slice(1), "expected a number or a date"),
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
