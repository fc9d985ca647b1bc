"""Histories: from a table of sequences or of interactions to blocks of users in CSR form.

``n`` users of a batch, their events laid end to end: user ``i`` owns events ``starts[i]:starts[i + 1]``, oldest first.
A table of sequences streams through; a table of interactions is held once, to be sorted by (user, time), stably.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.sections import SequenceTableConfig
from shards.tables.tables import ItemIds, as_ids, iter_table, read_table
from shards.tables.writer import BlockWriter

MIN_EVENTS = 2  # shorter histories have nothing to predict and are dropped
MIN_EVAL_EVENTS = 3  # shorter ones are for training only
ItemFields = dict[str, np.ndarray]  # fields of a block, by name
TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class Histories:
    """Whole histories of ``n`` users."""

    users: pa.Array  # [n], external ids
    starts: np.ndarray  # int64 [n + 1]
    items: np.ndarray  # int64 [events], internal ids
    times: np.ndarray | None  # int64 [events], Unix seconds where the table has timestamps


def read_histories(path: Path, table: SequenceTableConfig, ids: ItemIds) -> Iterator[Histories]:
    """All histories of the table, users in order of their (first) row.

    Raises:
        UserError: the table cannot be read, holds nulls or an unknown item, or its times do not fit its items.
    """
    if table.layout == "interactions":
        yield _read_interactions(path, table, ids)
        return
    columns = [table.user, table.items, *([table.times] if table.times else [])]
    for batch in iter_table(path, columns, text=columns[1:]):
        starts, values = _flatten(batch[table.items], f"column {table.items!r} of {path}")
        times = None
        if table.times:
            where = f"column {table.times!r} of {path}"
            time_starts, time_values = _flatten(batch[table.times], where)
            if not np.array_equal(starts, time_starts):
                raise UserError(f"{where} has lists of other lengths than {table.items!r}; expected a time per event")
            times = _seconds(_ticks(time_values, where), time_values.type)
        items = ids.lookup(as_ids(values, f"column {table.items!r} of {path}"), f"column {table.items!r} of {path}")
        yield Histories(as_ids(batch[table.user], f"column {table.user!r} of {path}"), starts, items, times)


def _read_interactions(path: Path, table: SequenceTableConfig, ids: ItemIds) -> Histories:
    columns = [table.user, table.items, *([table.times] if table.times else [])]
    events = read_table(path, columns, text=[table.items])
    users = as_ids(events[table.user], f"column {table.user!r} of {path}").dictionary_encode()
    where = f"column {table.items!r} of {path}"
    items = ids.lookup(as_ids(events[table.items], where), where)
    rows = users.indices.to_numpy()  # numbered by first appearance
    if table.times:
        column = events[table.times].combine_chunks()
        ticks = _ticks(column, f"column {table.times!r} of {path}")
        order = np.lexsort((ticks, rows))  # stable: events of one time keep the table's order
        times = _seconds(ticks, column.type)[order]
    else:
        order, times = np.argsort(rows, kind="stable"), None
    starts = np.zeros(len(users.dictionary) + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(users.dictionary)), out=starts[1:])
    return Histories(users.dictionary, starts, items[order], times)


def _flatten(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, pa.Array]:
    """Starts int64 [n + 1] and the flat values of a column of lists."""
    if pa.types.is_large_string(column.type) or pa.types.is_string(column.type):
        column = pa.chunked_array([_parse_lists(column, where)])
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise UserError(f"{where} is of type {column.type}; expected lists (or data.sequences.layout: interactions)")
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null lists; remove these rows or leave the column out")
    starts = np.zeros(len(column) + 1, np.int64)
    np.cumsum(pc.list_value_length(column).to_numpy(), out=starts[1:])
    values = pc.list_flatten(column)
    return starts, values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _parse_lists(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Cells of a CSV: a JSON list, or words between spaces."""
    lists = []
    for cell in column.to_pylist():
        try:
            words = None if cell is None else json.loads(cell) if cell.startswith("[") else cell.split()
        except json.JSONDecodeError:
            raise UserError(f"{where} holds {cell[:60]!r}; expected a JSON list or ids between spaces") from None
        lists.append(None if words is None else [None if word is None else str(word) for word in words])
    return pa.array(lists, pa.list_(pa.large_string()))


def _ticks(values: pa.Array, where: str) -> np.ndarray:
    """Times as int64 in the column's own unit, which is what they are ordered by."""
    if values.null_count:
        raise UserError(f"{where} holds {values.null_count} null times; fill them or leave data.sequences.times empty")
    kind = values.type
    if not (pa.types.is_large_string(kind) or pa.types.is_integer(kind) or pa.types.is_timestamp(kind)):
        raise UserError(f"{where} holds times of type {kind}; expected integers or timestamps")
    try:
        return values.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds a time that is no int64 number ({error}); expected Unix seconds") from None


def _seconds(ticks: np.ndarray, kind: pa.DataType) -> np.ndarray:
    return ticks // TICKS_PER_SECOND[kind.unit] if pa.types.is_timestamp(kind) else ticks


class UserBlocks:
    """Packs users into blocks of ``users_per_block``, in the order they come, whatever batches they come in.

    ``of_items`` gives fields to add to a block, from its items; None adds none.
    """

    def __init__(
        self,
        writer: BlockWriter,
        users_per_block: int,
        of_items: Callable[[np.ndarray], ItemFields] | None = None,
    ) -> None:
        self._writer, self._of_items = writer, of_items
        self._users_per_block = users_per_block
        self._pending: list[tuple[np.ndarray, ...]] = []  # users, lengths, items and, if any, times
        self._num_pending = 0

    def add(self, users: np.ndarray, low: np.ndarray, high: np.ndarray, events: list[np.ndarray]) -> None:
        """Add ``users`` int64 [n], whose slices are ``low:high`` of each array of ``events`` (items, times)."""
        lengths = high - low
        first = np.repeat(low - (np.cumsum(lengths) - lengths), lengths)
        index = first + np.arange(len(first))
        self._pending.append((users, lengths, *(values[index] for values in events)))
        self._num_pending += len(users)
        if self._num_pending >= self._users_per_block:
            self._write(self._num_pending - self._num_pending % self._users_per_block)

    def flush(self) -> None:
        """Write what is left as a last, smaller block."""
        self._write(self._num_pending)

    def _write(self, num_users: int) -> None:
        """Write the first ``num_users`` of the pending users, keep the rest."""
        if num_users == 0:
            return
        users, lengths, *events = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        starts = np.concatenate(([0], np.cumsum(lengths)))
        for low in range(0, num_users, self._users_per_block):
            high = min(low + self._users_per_block, num_users)
            arrays = {"users": users[low:high], "starts": starts[low : high + 1] - starts[low]}
            for name, values in zip(("items", "times"), events, strict=False):
                arrays[name] = values[starts[low] : starts[high]]
            if self._of_items is not None:
                arrays |= self._of_items(arrays["items"])
            self._writer.write(arrays, count=high - low, events=int(starts[high] - starts[low]))
        rest = slice(starts[num_users], None)
        self._pending = [(users[num_users:], lengths[num_users:], *(values[rest] for values in events))]
        self._num_pending -= num_users


class SplitWriter:
    """Leave-one-out: the last item of a history is its test target, the one before its validation target."""

    def __init__(self, train: UserBlocks, valid: UserBlocks, test: UserBlocks, num_items: int) -> None:
        self._train, self._valid, self._test = train, valid, test
        self._external: list[pa.Array] = []
        self.train_count = np.zeros(num_items, np.int64)  # train events of each item
        self.num_users = self.num_dropped_users = self.num_events = 0

    def add(self, histories: Histories) -> None:
        """Cut the histories into their three slices and pack these; drop those of fewer than 2 events."""
        low, high = histories.starts[:-1], histories.starts[1:]
        keep = np.flatnonzero(high - low >= MIN_EVENTS)
        self._external.append(histories.users.take(pa.array(keep)))
        self.num_dropped_users += len(low) - len(keep)
        users = self.num_users + np.arange(len(keep))
        self.num_users += len(keep)
        low, high = low[keep], high[keep]
        self.num_events += int((high - low).sum())
        events = [histories.items, *([histories.times] if histories.times is not None else [])]
        evaluated = high - low >= MIN_EVAL_EVENTS
        self._train.add(users, low, np.where(evaluated, high - 2, high), events)
        self._valid.add(users[evaluated], low[evaluated], high[evaluated] - 1, events)
        self._test.add(users[evaluated], low[evaluated], high[evaluated], events)
        self.train_count += train_counts(histories, len(self.train_count))

    def finish(self) -> pa.Array:
        """Write the last blocks; returns the external ids of the users kept, row = internal id."""
        for blocks in (self._train, self._valid, self._test):
            blocks.flush()
        return pa.chunked_array(self._external).combine_chunks()


def train_counts(histories: Histories, num_items: int) -> np.ndarray:
    """How often each item stands in what these histories give to training, int64 [V]."""
    low, high, items = histories.starts[:-1], histories.starts[1:], histories.items
    kept = high - low >= MIN_EVENTS
    low, high = low[kept], np.where(high - low >= MIN_EVAL_EVENTS, high - 2, high)[kept]
    edges = np.bincount(low, minlength=len(items) + 1) - np.bincount(high, minlength=len(items) + 1)
    inside = np.cumsum(edges)[: len(items)] > 0
    return np.bincount(items[inside], minlength=num_items)
