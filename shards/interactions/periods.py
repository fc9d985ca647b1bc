"""Which events train and which are held out: 0 training, 1 validation, 2 test."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

import duckdb

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.config.tables import SplitConfig
from fmrl_dist.data.store.manifest import LEAVE_ONE_OUT
from shards.interactions.engine import count
from shards.tables.events import ReadCounts
from shards.tables.times import PER_SECOND

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FINER = re.compile(r":\d\d[.,]\d{6}(\d+)")  # digits that a datetime leaves out
MAX_TIME = 2**63


def period_of(
    connection: duckdb.DuckDBPyConnection, split: SplitConfig, events: str, read: ReadCounts
) -> tuple[str, str]:
    """The period of an event as an SQL expression over ``t`` (ticks) and ``split``, and the rule in words.

    Args:
        connection: to the engine.
        split: the config's section.
        events: table with ``t``; quantiles are of its rows.
        read: says what the table's times are.

    Raises:
        UserError: a cut is no moment, or a period would be empty.
    """
    if split.by == "leave_one_out":
        return "0", LEAVE_ONE_OUT
    which = f"the {split.target} event of each user there is to be predicted"
    if split.by == "given":
        return "CASE split WHEN 'train' THEN 0 WHEN 'valid' THEN 1 ELSE 2 END", f"splits as given, {which}"
    valid, test = _cuts(connection, split, events, read)
    shown_valid, shown_test = _shown(valid, read.per_second), _shown(test, read.per_second)
    periods = {
        "training": f"t < {valid}",
        "validation": f"t >= {valid} AND t < {test}",
        "test": f"t >= {test}",
    }
    for name, where in periods.items():
        require(
            count(connection, f"SELECT count(*) FROM (SELECT 1 FROM {events} WHERE {where} LIMIT 1)") > 0,
            f"no event is for {name}: validation is from {shown_valid}, test from {shown_test}; mend data.split",
        )
    rule = f"by time: validation from {shown_valid}, test from {shown_test}, {which}"
    return f"CASE WHEN t < {valid} THEN 0 WHEN t < {test} THEN 1 ELSE 2 END", rule


def _cuts(connection: duckdb.DuckDBPyConnection, split: SplitConfig, events: str, read: ReadCounts) -> tuple[int, int]:
    """First moments of validation and test, in ticks."""
    if split.valid_from != "":
        cuts = tuple(
            parse_moment(getattr(split, name), read.time_unit, read.per_second, f"data.split.{name}")
            for name in ("valid_from", "test_from")
        )
        require(
            cuts[0] < cuts[1],
            f"data.split.valid_from is {split.valid_from}, test_from {split.test_from}; expected them in order",
        )
        return cuts[0], cuts[1]
    cuts = tuple(
        count(connection, f"SELECT quantile_disc(t, {share}) FROM {events}")
        for share in (split.valid_quantile, split.test_quantile)
    )
    require(
        cuts[0] < cuts[1],
        f"the quantiles {split.valid_quantile} and {split.test_quantile} of the times are the same moment, "
        f"{_shown(cuts[0], read.per_second)}; move them apart, or set data.split.valid_from and test_from",
    )
    return cuts[0], cuts[1]


def parse_moment(text: str | int | float, time_unit: str, per_second: int, key: str) -> int:
    """Ticks since 1970 of a date, an ISO time (UTC unless it says otherwise) or a number in the table's unit.

    It is rounded up: the events before it are those of smaller ticks.

    Raises:
        UserError: it is none, or out of range; the message begins with ``key``.
    """
    try:
        number = Decimal(str(text))
    except InvalidOperation:
        return math.ceil(_microseconds(str(text), key) * per_second / PER_SECOND["us"])
    require(time_unit in PER_SECOND, f"{key} is the number {text}, but the table's times are {time_unit}; write a date")
    ticks = number * per_second / PER_SECOND[time_unit] if number.is_finite() else number
    require(
        number.is_finite() and abs(ticks) < MAX_TIME,
        f"{key} is {text}; expected a number of {time_unit} since 1970 that a calendar has",
    )
    return math.ceil(ticks)


def _microseconds(text: str, key: str) -> Decimal:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{key} is {text!r}; expected a date (2014-05-01), an ISO time or a number as in the table"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    finer = FINER.search(text)
    return (moment - EPOCH) // timedelta(microseconds=1) + Decimal(f"0.{finer[1]}" if finer else 0)


def _shown(ticks: int, per_second: int) -> str:
    microseconds, rest = divmod(ticks, per_second // PER_SECOND["us"])
    try:
        moment = (EPOCH + timedelta(microseconds=microseconds)).isoformat()
    except OverflowError:
        moment = f"{microseconds:,} microseconds after 1970"
    return f"{moment} and {rest} ns" if rest else moment
