"""Histories in CSR form, read from a table of sequences.

``n`` users of a batch, their events laid end to end: user ``i`` owns events ``starts[i]:starts[i + 1]``, oldest first.
The table streams through. If it has times, each user's events are sorted by them; events of one time keep the list's
order. Tables of single events go through :mod:`shards.interactions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.id_columns import as_ids
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.tables import SequenceTableConfig, TimeUnit
from shards.tables.event_batches import check_event_table, event_tables
from shards.tables.formats.choice import event_source
from shards.tables.item_ids import ItemIds, check_unique, check_whole, raw_ids
from shards.tables.list_columns import starts_and_values
from shards.tables.raw_tables import RawTable, TableBatches, read_batches
from shards.tables.times import UNITS, NumberCounts, ticks_of, unit_counts, unit_of


@dataclass(frozen=True)
class Histories:
    """Whole histories of ``n`` users."""

    users: pa.Array  # [n], external ids
    starts: np.ndarray  # int64 [n + 1]
    items: np.ndarray  # int64 [events], internal ids
    times: np.ndarray | None  # int64 [events], Unix seconds
    num_sorted: int = 0  # users of a table of sequences whose list was not in order of time
    num_repeated: int = 0  # events that an earlier event of the user equals, in item and time
    # how many of its first events are for training, and of the next for validation, int64 [n]; None: leave-one-out
    train: np.ndarray | None = None
    valid: np.ndarray | None = None


class HistoryBatches(NamedTuple):
    """All histories of a table, a batch of users at a time."""

    num_users: int | None  # of all batches; None where only reading tells
    batches: Iterator[Histories]


def read_histories(data: DataConfig, ids: ItemIds, downloads: Path | None = None) -> HistoryBatches:
    """All histories of a table of sequences, users in the order of their rows.

    Args:
        data: the config's section.
        ids: of the item table.
        downloads: folder for copies of URLs; None: there may be none.

    Raises:
        UserError: the table cannot be read, holds nulls or an unknown item, its times do not fit its items, or a user
            has two rows. What is wrong with a batch is raised when that batch is taken.
    """
    table, names = event_source(data, data.sequences.path, downloads)
    columns = [names.user, names.items, *([names.times] if names.times else [])]
    found = read_batches(table, columns, text=columns[1:], ids=columns[:2], lists=columns[1:])
    return HistoryBatches(found.num_rows, _parse_sequences(found, table, names, data, ids))


def check_histories(data: DataConfig, downloads: Path | None = None) -> None:
    """Refuse tables that lack a column, or have one of a type that cannot serve, without reading a row.

    Raises:
        UserError: likewise, or a table cannot be read.
    """
    for table in event_tables(data, downloads):
        check_event_table(table)


def _parse_sequences(
    found: TableBatches, table: RawTable, names: SequenceTableConfig, data: DataConfig, ids: ItemIds
) -> Iterator[Histories]:
    item_column = f"column {names.items!r} of {table}"
    unit = _list_unit(table, names) if names.times else "s"
    user_column, all_users = f"column {names.user!r} of {table}", list[pa.Array]()
    for batch in found.batches:
        starts, values = starts_and_values(batch[names.items], item_column, as_ids=True)
        items = ids.lookup(as_ids(raw_ids(values, item_column, data.item_ids), item_column), item_column)
        times, num_sorted, num_repeated = None, 0, 0
        if names.times:
            where = f"column {names.times!r} of {table}"
            time_starts, time_values = starts_and_values(batch[names.times], where)
            if not np.array_equal(starts, time_starts):
                raise UserError(f"{where} has lists of other lengths than {names.items!r}; expected a time per event")
            ticks, per_second = ticks_of(time_values, unit, where)
            rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            late = (np.diff(ticks) < 0) & (np.diff(rows) == 0)  # events that are older than the one before
            if num_sorted := len(np.unique(rows[1:][late])):
                order = np.lexsort((ticks, rows))
                ticks, items = ticks[order], items[order]
            num_repeated = num_repeated_events(rows, ticks, items)
            times = _seconds(ticks, per_second)
        all_users.append(as_ids(raw_ids(batch[names.user], user_column, data.user_ids), user_column))
        yield Histories(all_users[-1], starts, items, times, num_sorted, num_repeated)
    users = pa.chunked_array(all_users).combine_chunks()
    check_unique(users, user_column)
    check_whole(users, user_column)


def _list_unit(table: RawTable, names: SequenceTableConfig) -> TimeUnit:
    """The unit of times that are numbers: as chosen, or told by the sizes of all.

    Raises:
        UserError: they are told by their sizes, and some are too large for the unit of the others.
    """
    if names.time_unit != "auto":
        return names.time_unit
    counts = NumberCounts(np.zeros(len(UNITS), np.int64), np.zeros(len(UNITS), np.int64))
    where = f"column {names.times!r} of {table}"
    for batch in read_batches(table, [names.times], text=[names.times], lists=[names.times]).batches:
        _, values = starts_and_values(batch[names.times], where)
        if pa.types.is_timestamp(values.type):
            break
        counts = counts.plus(unit_counts(values))
    unit = unit_of(counts, 0, where)  # a single one of another unit is a row that cannot be used, which is refused here
    if too_large := counts.num_of_others(unit):
        raise UserError(
            f"{where}: {too_large:,} of {counts.sizes.sum():,} times are too large for {UNITS[unit]}, which the others "
            "are; mend them, or set data.sequences.time_unit"
        )
    return unit


def num_repeated_events(rows: np.ndarray, ticks: np.ndarray, items: np.ndarray) -> int:
    """How many events equal an earlier one in user, time and item; events are sorted by user and time."""
    same = (np.diff(rows) == 0) & (np.diff(ticks) == 0)
    tied = np.zeros(len(rows), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    rows, ticks, items = rows[tied], ticks[tied], items[tied]  # few, where times are fine
    order = np.lexsort((items, ticks, rows))
    return int(np.logical_and.reduce([np.diff(values[order]) == 0 for values in (rows, ticks, items)]).sum())


def _seconds(ticks: np.ndarray, per_second: int) -> np.ndarray:
    return (ticks // per_second).astype(np.int64)
