"""From raw events to those that are kept, as integers: filters, duplicates, the k-core.

Tables in the engine, one after the other:

    raw_events     user, item, time, rating, event, split, row   as read (shards.tables.events)
    users, items                                                 codes of ids: users by id, items as in the catalogue
    placed, coded  u, i, t, p, tie                               what the filters keep, with codes
    unique_events  likewise                                      without duplicates
    in_core, kept  likewise                                      in the k-core, and the latest of each user

``t`` is in the ticks of the tables' times, or the row where there are no times; ``p`` is the period; ``tie`` orders
events of one user and time. A training event is kept whatever happens after the cut: only training events count for the
core, and a duplicate leaves no earlier event out for a later one of another period.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.table_files import rooted, shown_places
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.tables import InteractionsConfig
from shards.interactions.engine import count
from shards.interactions.funnel import Funnel
from shards.interactions.k_core import k_core
from shards.interactions.periods import period_of
from shards.tables.events import ReadCounts, drop_events
from shards.tables.item_ids import FLOAT, refuse_floats

# 64 bits of a text, the same in every version of the engine. The order of two items under a user's bits xor theirs is
# that of a coin, and the same whenever the user and the items are.
BITS = "('0x' || substr(md5({}::VARCHAR), 1, 16))::UBIGINT"


@dataclass(frozen=True)
class KeptEvents:
    """What the table ``kept`` is about."""

    split_rule: str
    num_catalogue: int  # items of the item table; codes from there on are of items that were added
    item_ids: pa.Array  # [items], by code
    has_times: bool
    trained: np.ndarray  # bool [items]: whether a training event names it
    used: np.ndarray  # bool [items]: whether any event does


def keep_events(
    connection: duckdb.DuckDBPyConnection,
    data: DataConfig,
    catalogue: pa.Array | None,
    read: ReadCounts,
    funnel: Funnel,
) -> KeptEvents:
    """Make the table ``kept`` of ``raw_events``.

    Args:
        connection: to the engine, with ``raw_events``.
        data: the config's section.
        catalogue: ids of the item table, in its order; None if there is none.
        read: says what the times are.
        funnel: takes the counts.

    Raises:
        UserError: an unknown item, nothing is left, or the split is impossible.
    """
    settings, has_times = data.interactions, read.time_unit != "none"
    wanted = _filters(connection, settings, funnel)
    num_catalogue, item_ids = _code_ids(connection, data, catalogue, wanted, funnel)
    by_row = settings.ties == "table" or data.sequences.layout == "sequences" or not has_times
    time, tie = "time" if has_times else "row", "row" if by_row else "xor(users.bits, items.bits)"
    split = "split, " if data.split.by == "given" else ""
    connection.execute(f"""
        CREATE TABLE placed AS SELECT u, i, {time} AS t, {split}{tie} AS tie
        FROM raw_events JOIN users ON raw_events."user" = users.id JOIN items ON raw_events.item = items.id
        WHERE {wanted}""")
    drop_events(connection)
    period, rule = period_of(connection, data.split, "placed", read)
    connection.execute(f"CREATE VIEW coded AS SELECT u, i, t, ({period})::UTINYINT AS p, tie FROM placed")
    _drop_duplicates(connection, settings, by_row, data.split.by != "leave_one_out")
    funnel.add(f"duplicates ({settings.duplicates})", count(connection, "SELECT count(*) FROM unique_events"))
    num_codes = {"u": count(connection, "SELECT count(*) FROM users"), "i": len(item_ids)}
    least = {"u": settings.min_user_events, "i": settings.min_item_events}
    _drop_below_core(connection, least, num_codes)
    in_core = count(connection, "SELECT count(*) FROM in_core")
    funnel.add(f"users below {least['u']} or items below {least['i']} events", in_core)
    _drop_earlier(connection, settings.max_events)
    funnel.events = count(connection, "SELECT count(*) FROM kept")
    funnel.add(f"before the latest {settings.max_events} of a user", funnel.events)
    funnel.users = count(connection, "SELECT count(DISTINCT u) FROM kept")
    if data.split.by == "given" and has_times:
        _check_in_time(connection, funnel.users)
    trained, used = (_items_of(connection, where, len(item_ids)) for where in ("p = 0", "true"))
    funnel.items = int(used.sum())
    taken = "; ".join(f"{step.name} took {step.removed:,}" for step in funnel.steps)
    require(bool(trained.any()), f"no event is left to train on, of {funnel.rows:,} rows: {taken}")
    return KeptEvents(rule, num_catalogue, item_ids, has_times, trained, used)


def _filters(connection: duckdb.DuckDBPyConnection, settings: InteractionsConfig, funnel: Funnel) -> str:
    """The condition on ``raw_events`` that ratings and kinds of events make; counts what each leaves."""
    wanted = ["true"]
    if settings.min_rating is not None:
        wanted.append(f"rating >= {settings.min_rating!r}")
        funnel.add(f"rating below {settings.min_rating:g}", _num_raw(connection, wanted))
    if settings.events:
        names = ", ".join("'" + name.replace("'", "''") + "'" for name in settings.events)
        wanted.append(f"event IN ({names})")
        funnel.add("other kinds of events", _num_raw(connection, wanted))
        require(
            _num_raw(connection, wanted) > 0,
            f"no event is of a kind of data.interactions.events {list(settings.events)}; the table has: "
            f"{', '.join(_examples(connection, 'event'))}",
        )
    return " AND ".join(wanted)


def _num_raw(connection: duckdb.DuckDBPyConnection, wanted: list[str]) -> int:
    return count(connection, f"SELECT count(*) FROM raw_events WHERE {' AND '.join(wanted)}")


def _examples(connection: duckdb.DuckDBPyConnection, column: str) -> list[str]:
    rows = connection.execute(f"SELECT DISTINCT {column} FROM raw_events ORDER BY 1 LIMIT 8").fetchall()
    return [str(row[0]) for row in rows]


def _code_ids(
    connection: duckdb.DuckDBPyConnection, data: DataConfig, catalogue: pa.Array | None, wanted: str, funnel: Funnel
) -> tuple[int, pa.Array]:
    """Make tables ``users`` and ``items``, and deal with items that the catalogue lacks.

    Returns:
        The number of items in the catalogue, and the ids of all items by code.
    """
    connection.execute(f"""
        CREATE TABLE users AS
        SELECT id, (row_number() OVER (ORDER BY id) - 1)::INTEGER AS u, {BITS.format("id")} AS bits
        FROM (SELECT DISTINCT "user" AS id FROM raw_events WHERE {wanted})""")
    known = pa.array([], pa.int64() if data.item_ids == "integer" else pa.string()) if catalogue is None else catalogue
    connection.register("catalogue", pa.table({"id": known, "i": pa.array(np.arange(len(known)), pa.int32())}))
    connection.execute(f"CREATE TABLE items AS SELECT id, i, {BITS.format('id')} AS bits FROM catalogue")
    connection.execute(f"""
        CREATE TABLE unknown AS SELECT id, (row_number() OVER (ORDER BY id) - 1 + {len(known)})::INTEGER AS i, n
        FROM (SELECT item AS id, count(*) AS n FROM raw_events WHERE {wanted} AND item NOT IN (SELECT id FROM items)
              GROUP BY 1)""")
    connection.unregister("catalogue")
    source = shown_places(rooted(data.root, data.sequences.path))
    _check_whole(connection, "users", f"the column of users of {source}")
    if catalogue is None:
        _check_whole(connection, "unknown", f"the column of items of {source}")
    num_unknown, events = connection.execute("SELECT count(*), coalesce(sum(n), 0) FROM unknown").fetchall()[0]
    if num_unknown and catalogue is not None:
        if data.on_unknown_item == "stop":
            first = connection.execute("SELECT id FROM unknown ORDER BY i LIMIT 1").fetchall()[0][0]
            raise UserError(
                f"{events:,} events name {num_unknown:,} items that are not in the item table, the first is {first!r}; "
                "add them there, or set data.on_unknown_item to drop or add"
            )
        if data.on_unknown_item == "drop":
            left = _num_raw(connection, [wanted]) - int(events)
            funnel.add(f"of {num_unknown:,} items that the item table lacks", left)
        else:
            funnel.notes.append(f"{num_unknown:,} items of {events:,} events joined the catalogue as ids alone")
    if catalogue is None or data.on_unknown_item == "add":
        connection.execute(f"INSERT INTO items SELECT id, i, {BITS.format('id')} FROM unknown")
    ids = connection.sql("SELECT id FROM items ORDER BY i").to_arrow_table()["id"].combine_chunks()
    return len(known), ids


def _check_whole(connection: duckdb.DuckDBPyConnection, table: str, where: str) -> None:
    """As :func:`shards.tables.item_ids.check_whole`, of the texts ``id`` of a table of the engine."""
    [(first, are_floats)] = connection.execute(
        f"SELECT min(id::VARCHAR), bool_and(regexp_matches(id::VARCHAR, '{FLOAT}')) FROM {table}"
    ).fetchall()
    if are_floats:
        refuse_floats(first, where)


def _drop_duplicates(
    connection: duckdb.DuckDBPyConnection, settings: InteractionsConfig, by_row: bool, has_periods: bool
) -> None:
    """Make ``unique_events``, a table or view, of ``coded``. An event that stands twice has the smaller tie."""
    events = "SELECT u, i, t, p, tie FROM coded"
    if settings.duplicates == "event" or (settings.duplicates != "none" and by_row):
        events = f"SELECT u, i, t, p, min(tie) AS tie FROM ({events}) GROUP BY u, i, t, p"
    if settings.duplicates == "event" and has_periods:  # the same event in two periods is of the earlier one
        events = f"SELECT u, i, t, min(p) AS p, arg_min(tie, p) AS tie FROM ({events}) GROUP BY u, i, t"
    if settings.duplicates in ("first", "last"):
        end = "min" if settings.duplicates == "first" else "max"
        events = f"SELECT u, i, {end}(t) AS t, p, arg_{end}(tie, t) AS tie FROM ({events}) GROUP BY u, i, p"
        if has_periods and settings.duplicates == "first":  # an event of a later period is no reason to lose this one
            events = (
                f"SELECT u, i, arg_min(t, p) AS t, min(p) AS p, arg_min(tie, p) AS tie FROM ({events}) GROUP BY u, i"
            )
    kind = "VIEW" if settings.duplicates == "none" else "TABLE"
    connection.execute(f"CREATE {kind} unique_events AS {events}")


def _drop_below_core(connection: duckdb.DuckDBPyConnection, least: dict[str, int], num_codes: dict[str, int]) -> None:
    """Make ``in_core``, a table or view, of ``unique_events``."""
    if max(least.values()) <= 1:
        connection.execute("CREATE VIEW in_core AS SELECT * FROM unique_events")
        return
    alive = k_core(connection, "unique_events", least, num_codes)
    for side in ("u", "i"):
        connection.register(f"core_{side}", pa.table({"code": np.flatnonzero(alive[side]).astype(np.int32)}))
    connection.execute("""
        CREATE TABLE in_core AS SELECT u, i, t, p, tie FROM unique_events
        WHERE u IN (SELECT code FROM core_u) AND i IN (SELECT code FROM core_i)""")
    for side in ("u", "i"):
        connection.unregister(f"core_{side}")


def _drop_earlier(connection: duckdb.DuckDBPyConnection, max_events: int) -> None:
    """Make ``kept``, a table or view, of ``in_core``: of each user's training events the latest, 0 for all."""
    if not max_events:
        connection.execute("CREATE VIEW kept AS SELECT * FROM in_core")
        return
    latest = "row_number() OVER (PARTITION BY u, p ORDER BY t DESC, tie DESC, i DESC)"
    connection.execute(f"CREATE TABLE kept AS SELECT * FROM in_core QUALIFY p > 0 OR {latest} <= {max_events}")


def _check_in_time(connection: duckdb.DuckDBPyConnection, num_users: int) -> None:
    """Refuse a split in which a held-out event is older than one of an earlier period.

    Raises:
        UserError: it would stand behind what came after it, in the history that it is predicted from.
    """
    [(number, first)] = connection.execute("""
        SELECT count(*), min(u) FROM (
            SELECT u, max(t) FILTER (p = 0) AS trained, min(t) FILTER (p > 0) AS held_out,
                max(t) FILTER (p < 2) AS before_test, min(t) FILTER (p = 2) AS tested
            FROM kept GROUP BY u)
        WHERE trained > held_out OR before_test > tested""").fetchall()
    if not number:
        return
    [(user,)] = connection.execute("SELECT id FROM users WHERE u = ?", [first]).fetchall()
    raise UserError(
        "data.split.by: given holds out events that are older than events which train, or which validate before a "
        f"test: of {number:,} of {num_users:,} users, the first is {user!r}. The history of a held-out event is all "
        "that the user did before it, and this would show a model what came after it; split by time (data.split.by: "
        "time) or mend the split, or set data.sequences.times to '' if the split's order is the order that counts"
    )


def _items_of(connection: duckdb.DuckDBPyConnection, where: str, num_items: int) -> np.ndarray:
    """Which items the kept events name, bool [items]."""
    found = np.zeros(num_items, np.bool_)
    for batch in connection.sql(f"SELECT DISTINCT i FROM kept WHERE {where}").to_arrow_reader():
        found[batch.column(0).to_numpy()] = True
    return found
