"""Histories on disk, between the engine and the store: Parquet, a user a row, written and read some users at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import written_aside
from fmrl_dist.base.progress import Progress
from shards.interactions.funnel import Funnel
from shards.tables.engine import quiet
from shards.tables.histories import Histories, HistoryBatches, num_repeated_events

EVENTS_AT_ONCE = 1 << 18
USERS_AT_ONCE = 65_536
NUM_PERIODS = 3


def write_histories(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    new_items: np.ndarray,
    ticks_per_second: int | None,
    has_periods: bool,
    funnel: Funnel,
) -> None:
    """Sort the table ``kept`` and write it.

    Columns: ``user`` (external id), ``items`` (list of internal ids, oldest first), ``times`` (list of Unix seconds) if
    there are times, and ``train``, ``valid`` (numbers of events of these periods, which come first) if there are
    periods.

    Args:
        connection: to the engine, with ``kept`` and ``users``.
        path: of the file, which appears when it is complete.
        new_items: internal id of each item code, int64 [items].
        ticks_per_second: of ``t``; None if it is no time.
        has_periods: whether ``p`` says more than that all events are the history's.
        funnel: takes the counts.
    """
    has_times = ticks_per_second is not None
    ids = "SELECT id FROM users WHERE u IN (SELECT u FROM kept) ORDER BY u"
    external = _Ids(quiet(connection.cursor()).sql(ids).to_arrow_reader(USERS_AT_ONCE))
    events = connection.sql("SELECT u, i, t, p FROM kept ORDER BY u, p, t, tie, i").to_arrow_reader(EVENTS_AT_ONCE)
    progress = Progress("event", funnel.events, name="histories")
    schema = _schema(external.type, has_times, has_periods)
    with written_aside(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for users, item_codes, times, periods in _whole_users(events):
            starts = np.concatenate(([0], np.flatnonzero(np.diff(users)) + 1, [len(users)]))
            if has_times:
                _count_ties(funnel, starts, times, periods, has_periods)
                funnel.repeated_events += num_repeated_events(users, times, item_codes)
            columns = [external.take(len(starts) - 1), _lists(starts, new_items[item_codes].astype(np.int32))]
            if ticks_per_second is not None:
                columns.append(_lists(starts, times // ticks_per_second))
            if has_periods:
                for period in (0, 1):
                    of_period = np.add.reduceat(periods == period, starts[:-1], dtype=np.int32)
                    columns.append(pa.array(of_period))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=USERS_AT_ONCE)
            progress.advance(len(users))
    progress.close()


class _Ids:
    """External ids of users, in the order of the events."""

    def __init__(self, batches: pa.RecordBatchReader) -> None:
        self._batches, self._left = batches, pa.array([], batches.schema.field(0).type)
        self.type = pa.int64() if pa.types.is_integer(self._left.type) else pa.large_string()

    def take(self, num_users: int) -> pa.Array:
        """The next ``num_users``."""
        parts = [self._left]
        while sum(map(len, parts)) < num_users:
            parts.append(self._batches.read_next_batch().column(0))
        ids = pa.concat_arrays(parts)
        self._left = ids[num_users:]
        return ids[:num_users].cast(self.type)


def _schema(ids: pa.DataType, has_times: bool, has_periods: bool) -> pa.Schema:
    fields = [("user", ids), ("items", pa.list_(pa.int32()))]
    fields += [("times", pa.list_(pa.int64()))] if has_times else []
    fields += [("train", pa.int32()), ("valid", pa.int32())] if has_periods else []
    return pa.schema(fields)


def _whole_users(batches: pa.RecordBatchReader) -> Iterator[list[np.ndarray]]:
    """Columns of the events, cut where a user ends."""
    pending: list[list[np.ndarray]] = []
    for batch in batches:
        if not len(batch):
            continue
        columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
        changes = np.flatnonzero(np.diff(columns[0]))
        if len(changes) or (pending and pending[-1][0][-1] != columns[0][0]):
            # All but the last user of this batch is whole; if the batch begins a user, so is what was pending.
            end = int(changes[-1]) + 1 if len(changes) else 0
            pending.append([column[:end] for column in columns])
            yield [np.concatenate(parts) for parts in zip(*pending, strict=True)]
            pending = []
            columns = [column[end:] for column in columns]
        pending.append(columns)
    if pending:
        yield [np.concatenate(parts) for parts in zip(*pending, strict=True)]


def _lists(starts: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), pa.array(values))


def _count_ties(funnel: Funnel, starts: np.ndarray, times: np.ndarray, periods: np.ndarray, has_periods: bool) -> None:
    """Events next to one of the same user and time, and users of whom that could decide what is held out."""
    same = np.diff(times) == 0
    same[starts[1:-1] - 1] = False  # the last event of a user and the first of the next
    tied = np.zeros(len(times), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    funnel.tied_events += int(tied.sum())
    before = np.concatenate(([False], same))  # whether an event has the time of the one before it
    if has_periods:
        crossing = before & np.concatenate(([False], np.diff(periods) != 0))
        funnel.users_tied_at_split += int((np.add.reduceat(crossing, starts[:-1], dtype=np.int64) > 0).sum())
        return
    last = starts[1:][np.diff(starts) >= NUM_PERIODS] - 1
    funnel.users_tied_at_split += int((before[last] | before[last - 1]).sum())


def read_prepared(path: Path) -> HistoryBatches:
    """What :func:`write_histories` wrote, some users at a time.

    Raises:
        UserError: it was removed meanwhile.
    """
    try:
        return HistoryBatches(pq.read_metadata(path).num_rows, _read(path))
    except FileNotFoundError:
        raise UserError(f"{path} was removed while it was needed; build again") from None


def _read(path: Path) -> Iterator[Histories]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        for batch in file.iter_batches(USERS_AT_ONCE, use_threads=False):
            items = batch.column("items")
            yield Histories(
                users=batch.column("user"),
                starts=items.offsets.to_numpy().astype(np.int64) - items.offsets[0].as_py(),
                items=items.flatten().to_numpy().astype(np.int64),
                times=batch.column("times").flatten().to_numpy() if "times" in names else None,
                train=batch.column("train").to_numpy().astype(np.int64) if "train" in names else None,
                valid=batch.column("valid").to_numpy().astype(np.int64) if "valid" in names else None,
            )
