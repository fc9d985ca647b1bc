"""All events of the tables of histories as one table of the engine, ``raw_events``, with what cannot be used counted.

Batches of rows come from the files in their order; ids become what ``data.ids`` says, times ticks since 1970.
Nothing is sorted, left out or split here: that is what ``shards.interactions`` does with the table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from fmrl_dist.base.errors import require
from fmrl_dist.config.data_section import DataConfig
from shards.tables.bad_rows import check_bad_rows
from shards.tables.engine import quiet
from shards.tables.event_batches import (
    LENGTHS,
    NO_LIST,
    SPLIT_NAMES,
    EventTable,
    event_batches,
    event_tables,
    optional_columns,
)
from shards.tables.item_ids import refuse_repeated
from shards.tables.times import (
    PER_SECOND,
    TEXT_TIMES,
    UNITS,
    is_fine_sql,
    number_counts,
    other_units_sql,
    ticks_sql,
    unit_of,
)

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

STAGED, ROWS, BATCH, OWNERS = "read_events", "read_rows", "event_batch", "list_owners"
CAUSES = ("no user", "no item", "time", "rating", "split", NO_LIST, LENGTHS)  # why a row gives no event
OPTIONAL = {  # columns of rows that not all tables have
    **{"whole": "BIGINT", "fraction": "INTEGER", "part": "DOUBLE", "moment": "BIGINT", "nanos": "USMALLINT"},
    **{"rating": "DOUBLE", "event": "VARCHAR", "split": "VARCHAR"},
}
TIME_COLUMNS = ("whole", "fraction", "part", "moment", "nanos")
TEXTS = {"time": "time", "rating": "rating_text", "split": "split"}  # by cause, the column that was not understood
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SPLITS = " ".join(f"WHEN '{name}' THEN '{split}'" for name, split in SPLIT_NAMES.items())


@dataclass(frozen=True)
class ReadCounts:
    """What was read."""

    rows: int  # events, and rows or lines that gave none
    bad: dict[str, int]  # cause -> rows that could not be used
    time_unit: str  # what times were taken for: "s" | "ms" | "us" | "ns" | "text" | "timestamp" | "none"
    per_second: int  # ticks of ``time``: 10⁶, or 10⁹ where times are in nanoseconds or any is finer than microseconds
    sorted_users: int  # of a table of sequences: users whose list was not in order of its own times
    joined_users: int  # of a table of sequences: users of several rows
    empty_lists: int  # of a table of sequences: rows without an event, which are no mistake


def load_events(connection: DuckDBPyConnection, data: DataConfig, downloads: Path | None) -> ReadCounts:
    """Create the view ``raw_events`` of the rows that can be used; :func:`drop_events` removes it and what is below it.

    Its columns: ``user`` and ``item``, VARCHAR, or BIGINT where ``data.ids`` says integer; ``time`` BIGINT, ticks since
    1970 UTC (``per_second`` of the counts); ``rating`` DOUBLE; ``event`` VARCHAR; ``split`` VARCHAR: train, valid or
    test; each of these four NULL where the tables have none; ``row`` BIGINT, unique, increasing in the order of the
    files.

    Args:
        connection: that keeps the order of insertion, outside a transaction.
        data: the config's section.
        downloads: folder for copies of URLs, made when it is needed; None: there may be none.

    Raises:
        UserError: a table cannot be read, an id is not of its kind, a user has two lists in a table of sequences and
            no item counts once, or more rows than ``data.dirt.max_bad_rows`` allows cannot be used.
    """
    quiet(connection)
    user_type, item_type = ("BIGINT" if kind == "integer" else "VARCHAR" for kind in (data.user_ids, data.item_ids))
    tables, bad, num_staged, is_text = event_tables(data, downloads), Counter[str](), 0, False
    joined_users = empty_lists = 0
    try:
        columns = _create_staged(connection, tables, user_type, item_type)
        for table in tables:
            connection.execute(f"CREATE OR REPLACE TABLE {OWNERS} (id {user_type})")
            for batch, owners, num_empty in event_batches(table, data, num_staged, bad):
                names = batch.column_names
                parsed = _parsed(names, bool(table.sequences.times))
                _insert(connection, STAGED, batch, f"SELECT {columns} FROM ({parsed})")
                if owners is not None:
                    _insert(connection, OWNERS, pa.table({"id": owners}), f"SELECT id FROM {BATCH}")
                num_staged += len(batch)
                empty_lists += num_empty
                is_text |= "time" in names
            joined_users += _num_joined(connection, table, data.interactions.duplicates in ("first", "last"))
        num_rows = num_staged + bad.total()
        unit = _time_unit(connection, tables[0], is_text, data.dirt.max_bad_rows)
        per_second = _ticks_per_second(connection, unit)
        _create(connection, unit, per_second, bool(tables[0].sequences.times), bad)
        _check(connection, tables, bad, num_rows, data)
    except BaseException:
        drop_events(connection)
        raise
    sorted_users = 0
    if tables[0].sequences.times:
        _say_times(connection, tables[0], unit, per_second)
        if tables[0].sequences.layout == "sequences":
            sorted_users = _num_unsorted(connection)
    return ReadCounts(num_rows, dict(sorted(bad.items())), unit, per_second, sorted_users, joined_users, empty_lists)


def drop_events(connection: DuckDBPyConnection) -> None:
    """Undo :func:`load_events`."""
    for view in ("raw_events", ROWS):
        connection.execute(f"DROP VIEW IF EXISTS {view}")
    for table in (STAGED, OWNERS):
        connection.execute(f"DROP TABLE IF EXISTS {table}")


def _create_staged(connection: DuckDBPyConnection, tables: list[EventTable], user_type: str, item_type: str) -> str:
    """Create :data:`STAGED` with the columns that a table has, as each takes memory, and :data:`ROWS` over it with all.

    Returns:
        The columns of :data:`STAGED`.
    """
    given = set().union(*map(optional_columns, tables))
    causes = ", ".join(f"'{cause}'" for cause in CAUSES)
    kinds = {"user": user_type, "item": item_type, "row": "BIGINT", "cause": f"ENUM ({causes})"}
    kinds |= {name: kind for name, kind in OPTIONAL.items() if name in given}
    columns = ", ".join(f'"{name}" {kind}' for name, kind in kinds.items())
    connection.execute(f"CREATE OR REPLACE TABLE {STAGED} ({columns})")
    lacking = "".join(f', NULL::{kind} AS "{name}"' for name, kind in OPTIONAL.items() if name not in given)
    connection.execute(f"CREATE OR REPLACE VIEW {ROWS} AS SELECT *{lacking} FROM {STAGED}")
    return ", ".join(f'"{name}"' for name in kinds)


def _insert(connection: DuckDBPyConnection, table: str, batch: pa.Table, query: str) -> None:
    """Add the rows that a ``query`` makes of :data:`BATCH`."""
    connection.register(BATCH, batch)
    connection.execute(f"INSERT INTO {table} {query}")
    connection.unregister(BATCH)


def _num_joined(connection: DuckDBPyConnection, table: EventTable, is_once: bool) -> int:
    """How many users have several lists. They are refused, as where no engine is needed: nothing says how the lists go
    together. Only if a user's item counts once (``is_once``), lists that hold the same events again can be joined."""
    repeated = connection.execute(f"""
        SELECT id, count(*) OVER () FROM (SELECT id, min(rowid) AS first FROM {OWNERS}
            WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1) ORDER BY first LIMIT 1
        """).fetchall()
    connection.execute(f"DROP TABLE {OWNERS}")
    if not repeated:
        return 0
    [(first, number)] = repeated
    if not is_once:
        refuse_repeated(number, first, f"column {table.sequences.user!r} of {table.raw}")
    return int(number)


def _parsed(names: list[str], has_times: bool) -> str:
    """SQL: rows of all columns from a batch, whose texts of times and ratings are parsed, with why one is bad."""
    source = f"({TEXT_TIMES % BATCH})" if "time" in names else BATCH
    found = {"whole", "fraction", "moment", "nanos"} if "time" in names else set(names)
    times = ", ".join(f"{name if name in found else 'NULL'}::{OPTIONAL[name]} AS {name}" for name in TIME_COLUMNS)
    text = "nullif(trim(rating_text), '')" if "rating_text" in names else "NULL"
    rating = "rating" if "rating" in names else f"TRY_CAST({text} AS DOUBLE)"
    event = '"event"' if "event" in names else "NULL"
    split = f'CASE lower(trim("split")) {SPLITS} END' if "split" in names else "NULL"
    return f"""
        SELECT "user", "item", {", ".join(TIME_COLUMNS)}, CASE WHEN isnan(rating) THEN NULL ELSE rating END AS rating,
            "event", "split", "row", CASE WHEN cause IS NOT NULL THEN cause
                WHEN "user" IS NULL THEN 'no user'
                WHEN "item" IS NULL THEN 'no item'
                WHEN {has_times} AND whole IS NULL AND part IS NULL AND moment IS NULL THEN 'time'
                WHEN rating IS NULL AND rating_text IS NOT NULL OR isinf(rating) THEN 'rating'
                WHEN {"split" in names} AND "split" IS NULL THEN 'split' END AS cause
        FROM (SELECT "user", "item", {times}, {rating}::DOUBLE AS rating, {text}::VARCHAR AS rating_text,
            {event}::VARCHAR AS "event", {split}::VARCHAR AS "split", "row", cause FROM {source})
    """


def _time_unit(connection: DuckDBPyConnection, table: EventTable, is_text: bool, limit: float) -> str:
    """What the times are; where there are numbers and dates, the fewer of the two become bad, as do the few numbers of
    another unit, and those that are too large, of clocks that were never set."""
    if not table.sequences.times:
        return "none"
    num_numbers, num_moments = connection.execute(
        f"SELECT count(coalesce(whole, part)), count(moment) FROM {ROWS} WHERE cause IS NULL"
    ).fetchall()[0]
    if num_numbers and num_moments:
        fewer = "moment" if num_moments < num_numbers else "coalesce(whole, part)"
        _spoil(connection, f"{fewer} IS NOT NULL")
    if num_numbers <= num_moments:
        return "text" if is_text else "timestamp"
    if table.sequences.time_unit != "auto":
        return table.sequences.time_unit
    counts = number_counts(connection, f"{ROWS} WHERE cause IS NULL")
    unit = unit_of(counts, limit, f"column {table.sequences.times!r} of {table.raw}")
    if counts.num_of_others(unit):
        _spoil(connection, other_units_sql(counts, unit))
    return unit


def _spoil(connection: DuckDBPyConnection, where: str) -> None:
    """Good rows become bad by their time."""
    rows = f'SELECT "row" FROM {ROWS} WHERE cause IS NULL AND {where}'
    connection.execute(f"UPDATE {STAGED} SET cause = 'time' WHERE \"row\" IN ({rows})")


def _ticks_per_second(connection: DuckDBPyConnection, unit: str) -> int:
    """Of the times: fine enough that none is rounded, so that they are sorted truly."""
    query = f"SELECT bool_or({is_fine_sql(unit)}) FROM {ROWS} WHERE cause IS NULL"
    [(is_fine,)] = connection.execute(query).fetchall()
    return PER_SECOND["ns" if unit == "ns" or is_fine else "us"]


def _create(connection: DuckDBPyConnection, unit: str, per_second: int, has_times: bool, bad: Counter[str]) -> None:
    """Create ``raw_events`` over :data:`ROWS`, and count bad rows."""
    time = ticks_sql(unit if unit in UNITS else "moment", per_second)
    connection.execute(
        'CREATE OR REPLACE VIEW raw_events AS SELECT "user", "item", "time", rating, "event", "split", "row" FROM '
        f'(SELECT *, {time} AS "time" FROM {ROWS} WHERE cause IS NULL) WHERE "time" IS NOT NULL OR NOT {has_times}'
    )
    causes = connection.execute(f"SELECT cause, count(*) FROM {STAGED} GROUP BY cause").fetchall()
    bad.update({cause: count for cause, count in causes if cause is not None})
    num_good = sum(count for cause, count in causes if cause is None)
    [(num_kept,)] = connection.execute("SELECT count(*) FROM raw_events").fetchall()
    if num_kept < num_good:  # times that no BIGINT holds
        bad["time"] += num_good - num_kept


def _check(
    connection: DuckDBPyConnection, tables: list[EventTable], bad: Counter[str], num_rows: int, data: DataConfig
) -> None:
    name, limit = ", ".join(str(table.raw) for table in tables), data.dirt.max_bad_rows
    require(num_rows > 0, f"table {name} is empty; expected at least one row")
    examples = _examples(connection, tables, data) if bad.total() > limit * num_rows else {}
    check_bad_rows(bad, num_rows, name, limit, examples)
    require(num_rows > bad.total(), f"table {name} has no row that can be used")


def _examples(connection: DuckDBPyConnection, tables: list[EventTable], data: DataConfig) -> dict[str, str]:
    """The first text of each kind that is not understood, by cause."""
    first = dict(connection.execute(f'SELECT cause, min("row") FROM {STAGED} GROUP BY cause').fetchall())
    texts = {cause: _text_of_row(tables, data, TEXTS[cause], first[cause]) for cause in TEXTS.keys() & first.keys()}
    return {cause: text for cause, text in texts.items() if text}


def _text_of_row(tables: list[EventTable], data: DataConfig, column: str, row: int) -> str | None:
    """What a column of texts holds in a row of the tables, which are read again up to it; None if it is of no text."""
    begin = 0
    for table in tables:
        for batch, *_ in event_batches(table, data, begin, Counter()):
            if row < begin + len(batch):
                return batch[column][row - begin].as_py() if column in batch.column_names else None
            begin += len(batch)
    return None


def _say_times(connection: DuckDBPyConnection, table: EventTable, unit: str, per_second: int) -> None:
    low, high = connection.execute('SELECT min("time"), max("time") FROM raw_events').fetchall()[0]
    taken = f"taken for {UNITS[unit]} since 1970" if unit in UNITS else "dates and times"
    print(
        f"events: {table.sequences.times!r} holds {taken}, from {_day(low, per_second)} to {_day(high, per_second)}",
        flush=True,
    )


def _day(time: int, per_second: int) -> str:
    try:
        return (EPOCH + timedelta(seconds=time // per_second)).date().isoformat()
    except OverflowError:
        return f"year {1970 + time // per_second // 31_556_952:,}"


def _num_unsorted(connection: DuckDBPyConnection) -> int:
    """Users of whose neighbouring events in the table the second is older."""
    query = """
        SELECT count(DISTINCT "user") FROM (SELECT "user", "time", lag("user") OVER () AS user_before,
        lag("time") OVER () AS time_before FROM raw_events) WHERE "user" = user_before AND "time" < time_before
    """
    [(number,)] = connection.execute(query).fetchall()
    return int(number)
