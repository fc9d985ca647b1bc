"""Times of events, however they are written, as ticks since 1970 in UTC: microseconds, or nanoseconds if any are finer.

A column holds numbers, whole or not, of a unit since 1970, or dates and timestamps, or text of either. Timestamps and
dates without a zone are UTC. The unit of numbers is known only when all have been seen, so a time is first one of
three: ``whole`` BIGINT, of that unit, with the ``fraction`` INTEGER beyond it in billionths (NULL: 0); ``part`` DOUBLE,
of that unit, of a column of floating-point numbers, which hold no more than microseconds; or ``moment`` BIGINT, in
microseconds, with the ``nanos`` USMALLINT beyond it (NULL: 0).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.config.tables import TimeUnit
from shards.tables.column_kinds import is_text, require_times
from shards.tables.engine import private_engine

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# Since 1970: the largest time that is still taken for one of the unit. In seconds this is the year 5138, in
# milliseconds 1973 to 5138, and so on.
LIMITS: dict[TimeUnit, int] = {"s": 10**11, "ms": 10**14, "us": 10**17}
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
UNIT_NAMES: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
PER_UNIT = {"s": 10**6, "ms": 10**3, "us": 1}  # microseconds
DAY_US, YEAR_S = 86_400 * 10**6, 31_556_952
MOST_SECONDS = 2.0**63  # that a store's int64 holds
BILLION = 10**9
RECENT = (631_152_000, 4_102_444_800)  # seconds from 1970 to 1990 and 2100, between which nearly all events lie

ANY_NUMBER = "coalesce(whole::DOUBLE, part)"  # SQL: the time of a row that is a number
# SQL: whether a number has the digits of a date of 1900 to 2100, perhaps with hours, minutes and seconds
IS_DATE = f"""
    CASE WHEN {" OR ".join(f"number BETWEEN 1900e{digits} AND 2101e{digits}" for digits in (4, 8, 10))}
    THEN regexp_full_match(number::BIGINT::VARCHAR,
        '(19|20|21)[0-9]{{2}}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])(([01][0-9]|2[0-3])[0-5][0-9]([0-5][0-9])?)?') END
"""

DIGITS = "[+-]?[0-9]+"
NUMBER = r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?"
# The engine reads more than that, and takes 28/11/19 for a day of the year 28.
DATE = "[0-9]{4}(-[0-9]{1,2}-[0-9]{1,2}|/[0-9]{1,2}/[0-9]{1,2})"
CLOCK = "[0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]*)?)?(Z| ?UTC|[+-][01][0-9](:?[0-9]{2})?)?"
ISO = f"{DATE}([T ]{CLOCK})?"
FINE = r"(:[0-9]{2}\.[0-9]{6})([0-9]{1,3})[0-9]*"  # seconds with more digits than the engine's timestamps hold
TEXT_TIMES = f"""
    SELECT * EXCLUDE (digits, number, instant, finer), coalesce(digits, TRY_CAST(floor(number) AS BIGINT)) AS whole,
        round((number - floor(number))::DOUBLE * {BILLION})::INTEGER AS fraction,
        CASE WHEN isfinite(instant) THEN epoch_us(instant) END AS moment,
        CASE WHEN isfinite(instant) AND finer <> '' THEN rpad(finer, 3, '0')::USMALLINT END AS nanos
    FROM (SELECT * EXCLUDE (written),
            CASE WHEN regexp_full_match(written, '{DIGITS}') THEN TRY_CAST(written AS BIGINT) END AS digits,
            CASE WHEN regexp_full_match(written, '{DIGITS}') THEN NULL
                WHEN regexp_full_match(written, '{NUMBER}') THEN TRY_CAST(written AS DECIMAL(38, 9)) END AS number,
            CASE WHEN regexp_full_match(written, '{ISO}') THEN
                TRY_CAST(regexp_replace(written, '{FINE}', '\\1') AS TIMESTAMPTZ) END AS instant,
            CASE WHEN regexp_full_match(written, '{ISO}') THEN regexp_extract(written, '{FINE}', 2) END AS finer
        FROM (SELECT * EXCLUDE ("time"), trim("time") AS written FROM %s))
"""  # SQL: the rows of a table, with these instead of its text "time"


def time_columns(column: pa.Array | pa.ChunkedArray) -> dict[str, pa.Array | pa.ChunkedArray]:
    """A column's times as ``whole``, ``part`` or ``moment`` with ``nanos``; or as text, which the engine parses.

    Decimals are text: no type of the engine's numbers holds all of them.
    """
    kind = column.type
    if is_text(kind) or pa.types.is_decimal(kind):
        return {"time": column.cast(pa.large_string())}
    if pa.types.is_integer(kind):
        return {"whole": _int64(column)}
    if pa.types.is_floating(kind):
        numbers = column.cast(pa.float64(), safe=False)
        return {"part": pc.if_else(pc.is_finite(numbers), numbers, None)}
    if pa.types.is_date(kind):
        is_days = pa.types.is_date32(kind)
        ticks = (column.cast(pa.int32()) if is_days else column).cast(pa.int64())  # date64 is in milliseconds
        return {"moment": _times(ticks, DAY_US if is_days else 1000)}
    if pa.types.is_null(kind):
        return {"moment": column.cast(pa.int64())}
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        ticks = column.cast(pa.int64())
        rest = pc.subtract(ticks, pc.multiply(pc.divide(ticks, 1000), 1000))  # of the ticks' sign
        floor = pc.subtract(pc.divide(ticks, 1000), pc.less(rest, 0).cast(pa.int64()))
        nanos = pc.if_else(pc.less(rest, 0), pc.add(rest, 1000), rest)
        return {"moment": floor, "nanos": nanos.cast(pa.uint16())}
    return {"moment": _times(column.cast(pa.int64()), PER_SECOND["us"] // PER_SECOND[column.type.unit])}


def _times(ticks: pa.Array | pa.ChunkedArray, factor: int) -> pa.Array | pa.ChunkedArray:
    """``ticks`` times ``factor``; null where that does not fit."""
    fits = pc.less_equal(pc.abs_checked(pc.max_element_wise(ticks, -(2**63) + 1)), (2**63 - 1) // factor)
    return pc.multiply(pc.if_else(fits, ticks, None), factor)


def parsed_columns(kind: pa.DataType) -> set[str]:
    """Which of ``whole``, ``fraction``, ``part``, ``moment`` and ``nanos`` times of a type can become."""
    found = set(time_columns(pa.array([], kind)))
    return {"whole", "fraction", "moment", "nanos"} if "time" in found else found


def ticks_of(column: pa.Array, unit: TimeUnit, where: str) -> tuple[np.ndarray, int]:
    """Times to sort by, int64 or float64 [n] at the column's own resolution, and how many of them are a second.

    Args:
        column: without nulls.
        unit: of numbers; not auto, unless the column is one of timestamps or dates.
        where: begins messages.

    Raises:
        UserError: nulls, a time that cannot be read, or both numbers and dates.
    """
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null times; fill them, or leave data.sequences.times empty")
    require_times(column.type, where)
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False), PER_SECOND[column.type.unit]
    found = time_columns(column)
    if "time" in found:
        found = _parsed(column)
    nanos, fraction = found.pop("nanos", None), found.pop("fraction", None)
    if len(found) > 1:
        raise UserError(f"{where} holds {' and '.join(sorted(found))} times; expected all numbers, or all dates")
    for name, values in found.items():
        if values.null_count:
            first = column.filter(pc.is_null(values)).cast(pa.large_string())[0].as_py()
            shown = repr(first) if is_text(column.type) else first
            raise UserError(f"{where} holds the time {shown}; expected a number or a date")
        ticks, per_second = values.to_numpy(zero_copy_only=False), PER_SECOND["us" if name == "moment" else unit]
        if nanos is not None:
            return _finer(ticks, nanos.fill_null(0).to_numpy(), "us", "ns", where), PER_SECOND["ns"]
        if fraction is not None:
            billionths = fraction.fill_null(0).to_numpy().astype(np.int64)
            finest: TimeUnit = "ns" if (billionths % _billionths(unit)).any() else "us"
            rest = billionths * PER_SECOND[finest] // per_second // BILLION
            return _finer(ticks, rest, unit, finest, where), PER_SECOND[finest]
        if len(ticks) and np.abs(ticks.astype(np.float64)).max() >= MOST_SECONDS * per_second:
            raise UserError(
                f"{where} holds the time {ticks[np.abs(ticks.astype(np.float64)).argmax()]}; no clock has it"
            )
        return ticks, per_second
    return np.zeros(0, np.int64), 1


def _finer(ticks: np.ndarray, rest: np.ndarray, unit: TimeUnit, finer: TimeUnit, where: str) -> np.ndarray:
    """``ticks`` of a unit in a finer one, with the ``rest`` of that one that they have beyond them."""
    factor = PER_SECOND[finer] // PER_SECOND[unit]
    far = (ticks > 2**63 // factor - 2) | (ticks < 2 - 2**63 // factor)
    year, years = YEAR_S * PER_SECOND[unit], 2**63 // YEAR_S // PER_SECOND[finer]
    require(
        not far.any(),
        f"{where} holds times to the {UNITS[finer][:-1]}, and one of year {1970 + int(ticks[far.argmax()]) // year}, "
        f"which does not fit: expected {1970 - years} to {1969 + years}; mend it, or leave out the last digits",
    )
    return ticks * factor + rest


class NumberCounts(NamedTuple):
    """What the numbers of a column of times look like."""

    sizes: np.ndarray  # int64 [4], how many have the size of each of UNITS
    recent: np.ndarray  # int64 [4], how many are of 1990 to 2100, taken for each of UNITS
    dates: int = 0  # how many are digits of a date, 20140723 or 20140723103000
    first_date: int | None = None  # the smallest of these

    def num_of_others(self, unit: TimeUnit) -> int:
        """How many :func:`other_units_sql` means."""
        place = UNIT_NAMES.index(unit)
        return int(self.sizes[place + 1 :].sum() + self.recent[:place].sum() * self.mostly_recent(unit))

    def mostly_recent(self, unit: TimeUnit) -> bool:
        """Whether most are of 1990 to 2100, taken for a unit."""
        return bool(self.recent[UNIT_NAMES.index(unit)] * 2 > self.sizes.sum())

    def plus(self, other: NumberCounts) -> NumberCounts:
        """Of both."""
        first = min(filter(None, (self.first_date, other.first_date)), default=None)
        return NumberCounts(self.sizes + other.sizes, self.recent + other.recent, self.dates + other.dates, first)


def number_counts(connection: DuckDBPyConnection, rows: str) -> NumberCounts:
    """Counts of a table of the engine with ``whole`` and ``part``, in one pass."""
    bounds = [0, *LIMITS.values()]
    sizes = [f"abs(number) >= {low} AND abs(number) < {high}" for low, high in pairwise([*bounds, "'inf'::DOUBLE"])]
    looks = [*sizes, *(_is_recent(unit) for unit in UNIT_NAMES), IS_DATE]
    counts = ", ".join(f"count(CASE WHEN {look} THEN 1 END)" for look in looks)
    *found, first = connection.execute(
        f"SELECT {counts}, min(CASE WHEN {IS_DATE} THEN number::BIGINT END) FROM (SELECT {ANY_NUMBER} AS number "
        f"FROM {rows})"
    ).fetchall()[0]
    return NumberCounts(np.array(found[:4], np.int64), np.array(found[4:8], np.int64), found[8], first)


def unit_counts(column: pa.Array) -> NumberCounts:
    """:func:`number_counts` of a column of numbers, dates or text."""
    found = time_columns(column)
    if "time" in found:
        found = _parsed(column)
    kinds = {"whole": pa.int64(), "part": pa.float64()}
    engine = private_engine()
    engine.register("numbers", pa.table({name: found.get(name, pa.nulls(len(column), kinds[name])) for name in kinds}))
    counts = number_counts(engine, "numbers")
    engine.close()
    return counts


def _parsed(column: pa.Array) -> dict[str, pa.Array]:
    """Text as what it all is: ``whole`` or ``moment``, both where it is not of one kind; ``fraction`` and ``nanos``.

    These two are there if any is not 0.
    """
    engine = private_engine()
    engine.register("texts", pa.table({"time": column.cast(pa.large_string())}))
    table = engine.sql(TEXT_TIMES % "texts").to_arrow_table().combine_chunks()
    engine.close()
    found = {name: table[name].combine_chunks() for name in ("whole", "fraction", "moment", "nanos")}
    used = {name: found[name] for name in ("whole", "moment") if found[name].null_count < len(column)}
    for name, beyond in (("whole", "fraction"), ("moment", "nanos")):
        if used.keys() == {name} and pc.any(pc.greater(found[beyond], 0)).as_py():
            used[beyond] = found[beyond]
    return used or {"moment": found["moment"]}


def unit_of(counts: NumberCounts, limit: float, where: str) -> TimeUnit:
    """The unit of times that are numbers: the largest whose size at least a tenth of them have.

    A few that are far too large, as clocks that were never set leave them, do not change the unit of the others.

    Args:
        counts: of all of them.
        limit: share of them that may be of another unit, or of none.
        where: begins messages.

    Raises:
        UserError: they are of several units, or dates without separators.
    """
    total = int(counts.sizes.sum())
    require(
        counts.dates * 2 <= total,
        f"{where} holds numbers such as {counts.first_date}, which look like dates, not like times since 1970; write "
        "them as 2014-07-23, or 2014-07-23T10:30:00, or, if they are times, set data.sequences.time_unit",
    )
    place = next((size for size in (3, 2, 1) if 0 < total <= counts.sizes[size] * 10), 0)
    unit = UNIT_NAMES[place]
    recent = counts.recent.copy()
    recent[place] = 0
    other = int(recent.argmax())
    require(
        recent[other] * 2 <= total and min(recent[other], counts.recent[place]) <= limit * total,
        f"{where} holds times of several units: {recent[other]:,} of {total:,} look like {UNITS[UNIT_NAMES[other]]} "
        f"(they are of 1990 to 2100), {counts.sizes[place]:,} like {UNITS[unit]}; write all in one unit, or, if they "
        "are of one, set data.sequences.time_unit",
    )
    return unit


def other_units_sql(counts: NumberCounts, unit: TimeUnit) -> str:
    """SQL: whether the time of a row with ``whole`` and ``part`` is a number that is none of ``unit``.

    It is too large; or most numbers are of 1990 to 2100, and it is so only in a smaller unit: in this one, of 1970.
    """
    place = UNIT_NAMES.index(unit)
    looks = [f"abs({ANY_NUMBER}) >= {LIMITS[unit]}"] if unit in LIMITS else []
    looks += [_is_recent(smaller, ANY_NUMBER) for smaller in UNIT_NAMES[:place] if counts.mostly_recent(unit)]
    return " OR ".join(looks)


def _is_recent(unit: TimeUnit, number: str = "number") -> str:
    low, high = (seconds * PER_SECOND[unit] for seconds in RECENT)
    return f"({number} >= {low} AND {number} < {high})"


def is_fine_sql(unit: str) -> str:
    """SQL: whether a row's time, of a ``unit`` as in :func:`ticks_sql`, is finer than microseconds."""
    return f"fraction % {_billionths(unit)} > 0" if unit in UNIT_NAMES else "nanos > 0"


def _billionths(unit: TimeUnit) -> int:
    """Of a unit, that are a microsecond; at most all of them."""
    return BILLION // PER_UNIT.get(unit, 1)


def ticks_sql(unit: str, per_second: int) -> str:
    """SQL: the time of a row of :func:`parsed_columns`; NULL where it fits no BIGINT.

    Args:
        unit: of its numbers, one of :data:`UNITS`, or "moment" if there are none that count.
        per_second: 10⁶, or 10⁹ where times are in nanoseconds or are finer than microseconds.
    """
    if unit == "moment":
        fine = "TRY_CAST(moment::HUGEINT * 1000 + coalesce(nanos, 0) AS BIGINT)"
        return fine if per_second == PER_SECOND["ns"] else "moment"
    factor = per_second // PER_SECOND[unit]
    whole = f"TRY_CAST(whole::HUGEINT * {factor} + coalesce(fraction, 0)::BIGINT * {factor} // {BILLION} AS BIGINT)"
    if unit == "ns":
        return f"coalesce({whole}, TRY_CAST(floor(part) AS BIGINT))"
    microseconds = f"TRY_CAST({'floor' if unit == 'us' else 'round'}(part * {PER_UNIT[unit]}) AS HUGEINT)"
    return f"coalesce({whole}, TRY_CAST({microseconds} * {per_second // PER_SECOND['us']} AS BIGINT))"


def _int64(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Numbers that do not fit become null."""
    if column.type == pa.uint64():
        column = pc.if_else(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), column, None)
    return column.cast(pa.int64())
