"""Times of events, however they are written, as ticks since 1970 in UTC: microseconds, or nanoseconds if any are finer.

A column holds numbers, whole or not, of a unit since 1970, or dates and timestamps, or text of either. Timestamps and
dates without a zone are UTC. The unit of numbers is known only when all have been seen, so a time is first one of
three: ``whole`` BIGINT and ``part`` DOUBLE, of that unit, or ``moment`` BIGINT, in microseconds, with the ``nanos``
USMALLINT beyond it (NULL: 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.tables import TimeUnit
from shards.tables.column_kinds import is_text, require_times
from shards.tables.engine import private_engine

# Since 1970: the largest time that is still taken for one of the unit. In seconds this is the year 5138, in
# milliseconds 1973 to 5138, and so on.
LIMITS: dict[TimeUnit, int] = {"s": 10**11, "ms": 10**14, "us": 10**17}
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
UNIT_NAMES: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
PER_UNIT = {"s": 10**6, "ms": 10**3, "us": 1}  # microseconds
YEAR_US = 31_556_952 * 10**6
MOST_SECONDS = 2.0**63  # that a store's int64 holds
DIGITS = "'[+-]?[0-9]+'"

FINE = r"(:[0-9]{2}\.[0-9]{6})([0-9]{1,3})[0-9]*"  # seconds with more digits than the engine's timestamps hold
WHOLE = f"CASE WHEN regexp_full_match(written, {DIGITS}) THEN TRY_CAST(written AS BIGINT) END"
PART = f"CASE WHEN NOT regexp_full_match(written, {DIGITS}) THEN TRY_CAST(written AS DOUBLE) END"
TEXT_TIMES = f"""
    SELECT * EXCLUDE (number, instant, digits), CASE WHEN isfinite(number) THEN number END AS part,
        CASE WHEN isfinite(instant) THEN epoch_us(instant) END AS moment,
        CASE WHEN isfinite(instant) AND digits <> '' THEN rpad(digits, 3, '0')::USMALLINT END AS nanos
    FROM (SELECT * EXCLUDE (written), regexp_extract(written, '{FINE}', 2) AS digits, CASE
            WHEN whole IS NULL AND number IS NULL
            THEN TRY_CAST(regexp_replace(written, '{FINE}', '\\1') AS TIMESTAMPTZ) END AS instant
        FROM (SELECT *, {WHOLE} AS whole, {PART} AS number FROM
            (SELECT * EXCLUDE ("time"), trim("time") AS written FROM %s)))
"""  # SQL: the rows of a table, with these instead of its text "time"


def time_columns(column: pa.Array | pa.ChunkedArray) -> dict[str, pa.Array | pa.ChunkedArray]:
    """A column's times as ``whole``, ``part`` or ``moment`` with ``nanos``; or as text, which the engine parses."""
    kind = column.type
    if is_text(kind):
        return {"time": column.cast(pa.large_string())}
    if pa.types.is_integer(kind):
        return {"whole": _int64(column)}
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = column.cast(pa.float64(), safe=False)
        return {"part": pc.if_else(pc.is_finite(numbers), numbers, None)}
    if pa.types.is_date(kind):
        days = column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64())
        return {"moment": pc.multiply(days, 86_400_000_000)}
    if pa.types.is_null(kind):
        return {"moment": column.cast(pa.int64())}
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        ticks = column.cast(pa.int64())
        rest = pc.subtract(ticks, pc.multiply(pc.divide(ticks, 1000), 1000))  # of the ticks' sign
        floor = pc.subtract(pc.divide(ticks, 1000), pc.less(rest, 0).cast(pa.int64()))
        nanos = pc.if_else(pc.less(rest, 0), pc.add(rest, 1000), rest)
        return {"moment": floor, "nanos": nanos.cast(pa.uint16())}
    per_tick = PER_SECOND["us"] // PER_SECOND[column.type.unit]
    ticks = column.cast(pa.int64())
    fits = pc.less_equal(pc.abs_checked(pc.max_element_wise(ticks, -(2**63) + 1)), (2**63 - 1) // per_tick)
    return {"moment": pc.multiply(pc.if_else(fits, ticks, None), per_tick)}


def parsed_columns(kind: pa.DataType) -> set[str]:
    """Which of ``whole``, ``part``, ``moment`` and ``nanos`` times of a type can become."""
    found = set(time_columns(pa.array([], kind)))
    return {"whole", "part", "moment", "nanos"} if "time" in found else found


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
    nanos = found.pop("nanos", None)
    if len(found) > 1:
        raise UserError(f"{where} holds {' and '.join(sorted(found))} times; expected all numbers, or all dates")
    for name, values in found.items():
        if values.null_count:
            first = column.filter(pc.is_null(values))[0].as_py()
            raise UserError(f"{where} holds the time {first!r}; expected a number or a date")
        ticks, per_second = values.to_numpy(zero_copy_only=False), PER_SECOND["us" if name == "moment" else unit]
        if nanos is not None:
            return _nanoseconds(ticks, nanos.fill_null(0).to_numpy(), where), PER_SECOND["ns"]
        if len(ticks) and np.abs(ticks.astype(np.float64)).max() >= MOST_SECONDS * per_second:
            raise UserError(
                f"{where} holds the time {ticks[np.abs(ticks.astype(np.float64)).argmax()]}; no clock has it"
            )
        return ticks, per_second
    return np.zeros(0, np.int64), 1


def _nanoseconds(moments: np.ndarray, nanos: np.ndarray, where: str) -> np.ndarray:
    far = np.abs(moments) >= 2**63 // 1000 - 1
    if far.any():
        raise UserError(
            f"{where} holds times to the nanosecond, and one of year {1970 + int(moments[far][0]) // YEAR_US}, which "
            "does not fit: expected 1678 to 2261; mend it, or leave out the digits after the microseconds"
        )
    return moments * 1000 + nanos


def unit_counts(column: pa.Array) -> np.ndarray:
    """How many of the times that are numbers have the size of each of :data:`UNITS`, int64 [4]."""
    found = time_columns(column)
    if "time" in found:
        found = _parsed(column)
    counts = np.zeros(len(UNITS), np.int64)
    for name in ("whole", "part"):
        if name in found:
            numbers = np.abs(found[name].cast(pa.float64(), safe=False).drop_null().to_numpy(zero_copy_only=False))
            sizes = np.searchsorted(list(LIMITS.values()), numbers, side="right")
            counts += np.bincount(sizes, minlength=len(UNITS))
    return counts


def _parsed(column: pa.Array) -> dict[str, pa.Array]:
    """Text as what it all is: ``whole``, ``part`` or ``moment``, several where it is not of one kind; and ``nanos``.

    The nanoseconds beyond a moment are there if any is not 0.
    """
    engine = private_engine()
    engine.register("texts", pa.table({"time": column.cast(pa.large_string())}))
    table = engine.sql(TEXT_TIMES % "texts").to_arrow_table().combine_chunks()
    engine.close()
    found = {name: table[name].combine_chunks() for name in ("whole", "part", "moment")}
    used = {name: values for name, values in found.items() if values.null_count < len(values)}
    if {"whole", "part"} == used.keys():  # some numbers have a fraction
        used = {"part": pc.coalesce(used["part"], used["whole"].cast(pa.float64(), safe=False))}
    nanos = table["nanos"].combine_chunks()
    if used.keys() == {"moment"} and pc.any(pc.greater(nanos, 0)).as_py():
        used["nanos"] = nanos
    return used or {"moment": found["moment"]}


def unit_of(counts: Sequence[int] | np.ndarray, chosen: TimeUnit) -> TimeUnit:
    """The unit of times that are numbers: as chosen, or the largest whose size at least a tenth of them have.

    A few that are far too large, as clocks that were never set leave them, do not change the unit of the others.

    Args:
        counts: how many have the size of each of :data:`UNITS`, [4].
        chosen: ``data.sequences.time_unit``.
    """
    if chosen != "auto":
        return chosen
    total = sum(counts)
    return next((UNIT_NAMES[size] for size in (3, 2, 1) if 0 < total <= counts[size] * 10), "s")


def ticks_sql(unit: str, per_second: int) -> str:
    """SQL: the time of a row with ``whole``, ``part``, ``moment`` and ``nanos``; NULL where it fits no BIGINT.

    Args:
        unit: of its numbers, one of :data:`UNITS`, or "moment" if there are none that count.
        per_second: 10⁶, or 10⁹ where times are in nanoseconds or are finer than microseconds.
    """
    if unit == "moment":
        fine = "TRY_CAST(moment::HUGEINT * 1000 + coalesce(nanos, 0) AS BIGINT)"
        return fine if per_second == PER_SECOND["ns"] else "moment"
    if unit == "ns":
        return "coalesce(whole, TRY_CAST(floor(part) AS BIGINT))"
    whole = f"TRY_CAST(whole::HUGEINT * {PER_UNIT[unit]} AS BIGINT)"
    part = f"TRY_CAST({'floor' if unit == 'us' else 'round'}(part * {PER_UNIT[unit]}) AS BIGINT)"
    return f"coalesce({whole}, {part})"


def _int64(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Numbers that do not fit become null."""
    if column.type == pa.uint64():
        column = pc.if_else(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), column, None)
    return column.cast(pa.int64())
