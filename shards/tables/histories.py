"""Histories: read from a table of sequences or of interactions, in CSR form.

``n`` users of a batch, their events laid end to end: user ``i`` owns events ``starts[i]:starts[i + 1]``, oldest first.
A table of sequences streams through; if it has times, each user's events are sorted by them. A table of interactions is
held in memory once, to be sorted by (user, time). Both sorts are stable: events of one time keep the table's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.id_columns import as_ids
from fmrl_dist.config.sections import SequenceTableConfig
from shards.tables.column_kinds import require_ids, require_lists, require_times
from shards.tables.item_ids import ItemIds
from shards.tables.raw_tables import TableBatches, read_batches, read_table, table_types

TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Histories:
    """Whole histories of ``n`` users."""

    users: pa.Array  # [n], external ids
    starts: np.ndarray  # int64 [n + 1]
    items: np.ndarray  # int64 [events], internal ids
    times: np.ndarray | None  # int64 [events], Unix seconds where the table has timestamps
    num_sorted: int = 0  # users of a table of sequences whose list was not in order of time
    num_repeated: int = 0  # events that an earlier event of the user equals, in item and time
    # how many of its first events are for training, and of the next for validation, int64 [n]; None: leave-one-out
    train: np.ndarray | None = None
    valid: np.ndarray | None = None


class HistoryBatches(NamedTuple):
    """All histories of a table, a batch of users at a time."""

    num_users: int  # of all batches
    batches: Iterator[Histories]


def read_histories(path: Path, table: SequenceTableConfig, ids: ItemIds) -> HistoryBatches:
    """All histories of the table, users in order of their (first) row.

    Raises:
        UserError: the table cannot be read, holds nulls or an unknown item, or its times do not fit its items. What is
            wrong with a batch is raised when that batch is taken.
    """
    if table.layout == "interactions":
        histories = _read_interactions(path, table, ids)
        return HistoryBatches(len(histories.users), iter([histories]))
    columns = [table.user, table.items, *([table.times] if table.times else [])]
    found = read_batches(path, columns, text=columns[1:], ids=[table.user])
    return HistoryBatches(found.num_rows, _parse_sequences(found, path, table, ids))


def check_histories(path: Path, table: SequenceTableConfig) -> None:
    """Refuse a table that lacks a column, or has one of a type that cannot serve, without reading a row.

    Raises:
        UserError: likewise, or the table cannot be read.
    """
    columns = [table.user, table.items, *([table.times] if table.times else [])]
    types = table_types(path, columns)
    for name in columns if types else ():
        where = f"column {name!r} of {path}"
        if name == table.user:
            require_ids(types[name], where)
        if name in columns[1:]:
            inner = require_lists(types[name], where) if table.layout == "sequences" else types[name]
            (require_ids if name == table.items else require_times)(inner, where)


def _parse_sequences(found: TableBatches, path: Path, table: SequenceTableConfig, ids: ItemIds) -> Iterator[Histories]:
    item_column = f"column {table.items!r} of {path}"
    for batch in found.batches:
        starts, values = _flatten(batch[table.items], item_column)
        items = ids.lookup(as_ids(values, item_column), item_column)
        times, num_sorted, num_repeated = None, 0, 0
        if table.times:
            where = f"column {table.times!r} of {path}"
            time_starts, time_values = _flatten(batch[table.times], where)
            if not np.array_equal(starts, time_starts):
                raise UserError(f"{where} has lists of other lengths than {table.items!r}; expected a time per event")
            ticks = _ticks(time_values, where)
            rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            late = (np.diff(ticks) < 0) & (np.diff(rows) == 0)  # events that are older than the one before
            if num_sorted := len(np.unique(rows[1:][late])):
                order = np.lexsort((ticks, rows))
                ticks, items = ticks[order], items[order]
            num_repeated = _num_repeated(rows, ticks, items)
            times = _seconds(ticks, time_values.type)
        users = as_ids(batch[table.user], f"column {table.user!r} of {path}")
        yield Histories(users, starts, items, times, num_sorted, num_repeated)


def _read_interactions(path: Path, table: SequenceTableConfig, ids: ItemIds) -> Histories:
    columns = [table.user, table.items, *([table.times] if table.times else [])]
    events = read_table(path, columns, ids=[table.user, table.items])
    users = as_ids(events[table.user], f"column {table.user!r} of {path}").dictionary_encode()
    where = f"column {table.items!r} of {path}"
    items = ids.lookup(as_ids(events[table.items], where), where)
    rows = users.indices.to_numpy()  # numbered by first appearance
    if table.times:
        column = events[table.times].combine_chunks()
        ticks = _ticks(column, f"column {table.times!r} of {path}")
        order = np.lexsort((ticks, rows))  # stable: events of one time keep the table's order
        times = _seconds(ticks, column.type)[order]
        num_repeated = _num_repeated(rows[order], ticks[order], items[order])
    else:
        order, times, num_repeated = np.argsort(rows, kind="stable"), None, 0
    starts = np.zeros(len(users.dictionary) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(users.dictionary)), out=starts[1:])
    return Histories(users.dictionary, starts, items[order], times, num_repeated=num_repeated)


def _num_repeated(rows: np.ndarray, ticks: np.ndarray, items: np.ndarray) -> int:
    """How many events equal an earlier one in user, time and item; events are sorted by user and time."""
    same = (np.diff(rows) == 0) & (np.diff(ticks) == 0)
    tied = np.zeros(len(rows), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    rows, ticks, items = rows[tied], ticks[tied], items[tied]  # few, where times are fine
    order = np.lexsort((items, ticks, rows))
    return int(np.logical_and.reduce([np.diff(values[order]) == 0 for values in (rows, ticks, items)]).sum())


def _flatten(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, pa.Array]:
    """Starts int64 [n + 1] and the flat values of a column of lists."""
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        column = pa.chunked_array([_parse_lists(column, where)])
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise UserError(f"{where} is of type {column.type}; expected lists (or data.sequences.layout: interactions)")
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null lists; remove these rows, or leave the column out")
    starts = np.zeros(len(column) + 1, np.int64)
    np.cumsum(pc.list_value_length(column).to_numpy(), out=starts[1:])
    values = pc.list_flatten(column)
    return starts, values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _parse_lists(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Cells of a CSV: a JSON list, or words separated by spaces."""
    lists = []
    for cell in column.to_pylist():
        try:
            words = None if cell is None else json.loads(cell) if cell.startswith("[") else cell.split()
        except json.JSONDecodeError:
            raise UserError(f"{where} holds {cell[:60]!r}; expected a JSON list, or ids separated by spaces") from None
        lists.append(None if words is None else [None if word is None else str(word) for word in words])
    return pa.array(lists, pa.list_(pa.large_string()))


def _ticks(values: pa.Array, where: str) -> np.ndarray:
    """Times as int64 in the column's own unit: events are sorted by these."""
    if values.null_count:
        raise UserError(f"{where} holds {values.null_count} null times; fill them, or leave data.sequences.times empty")
    kind = values.type
    if not (pa.types.is_large_string(kind) or pa.types.is_integer(kind) or pa.types.is_timestamp(kind)):
        raise UserError(f"{where} holds times of type {kind}; expected integers or timestamps")
    try:
        return values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds a time that is not an int64 number ({error}); expected Unix seconds") from None


def _seconds(ticks: np.ndarray, kind: pa.DataType) -> np.ndarray:
    return ticks // TICKS_PER_SECOND[kind.unit] if pa.types.is_timestamp(kind) else ticks
