"""Batches of events from tables of interactions or of sequences: a row per event, ids and numbers in Arrow's types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import require
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.tables import SequenceTableConfig
from shards.tables.column_kinds import (
    as_float64,
    is_text,
    require_ids,
    require_lists,
    require_rating,
    require_times,
    require_word,
)
from shards.tables.formats.choice import event_source
from shards.tables.item_ids import raw_ids
from shards.tables.list_columns import as_lists, lengths_of
from shards.tables.raw_tables import RawTable, read_batches, table_types
from shards.tables.times import parsed_columns, time_columns

ROWS_AT_ONCE = 1 << 18
SPLIT_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
NO_LIST, LENGTHS = "no list of items", "lists of items and times differ in length"  # causes of rows that give no event


@dataclass(frozen=True)
class EventTable:
    """A table of histories, or of those of one split."""

    raw: RawTable
    sequences: SequenceTableConfig  # names of its columns
    split: str = ""  # of all its events; "" where there is none, or a column of it


def event_tables(data: DataConfig, downloads: Path | None) -> list[EventTable]:
    """The tables that ``data.sequences`` and ``data.split`` name.

    Raises:
        UserError: a file is of two splits.
    """
    paths = {"": data.sequences.path}
    is_given = data.split.by == "given" and bool(data.split.valid)
    if is_given:
        paths = {"train": data.sequences.path, "valid": data.split.valid, "test": data.split.test}
    tables = []
    for split, path in paths.items():
        raw, columns = event_source(data, path, downloads)
        tables.append(EventTable(raw, replace(columns, split="") if is_given else columns, split))
    if is_given:
        _check_apart(tables)
    return tables


def _check_apart(tables: list[EventTable]) -> None:
    keys = {"train": "data.sequences.path", "valid": "data.split.valid", "test": "data.split.test"}
    split_of: dict[Path, str] = {}
    for table in tables:
        for file in table.raw.files:
            before = split_of.setdefault(file.resolve(), table.split)
            require(
                before == table.split,
                f"{keys[before]} and {keys[table.split]} both name {file}: its events would be of two splits; give "
                "each split files of its own",
            )


def check_event_table(table: EventTable) -> None:
    """Refuse a table that lacks a column, or has one of a type that cannot serve, without reading a row.

    Raises:
        UserError: likewise, or the table cannot be read.
    """
    names = table.sequences
    types = table_types(table.raw, _columns(names))
    if not types:
        return
    where = {column: f"column {column!r} of {table.raw}" for column in types}
    is_list = names.layout == "sequences"
    require_ids(types[names.user], where[names.user])
    items, where_items = types[names.items], where[names.items]
    require_ids(require_lists(items, where_items) if is_list else items, where_items)
    if names.times:
        times, where_times = types[names.times], where[names.times]
        require_times(require_lists(times, where_times) if is_list else times, where_times)
    if names.rating:
        require_rating(types[names.rating], where[names.rating])
    for column in filter(None, (names.event, names.split)):
        require_word(types[column], where[column])


def optional_columns(table: EventTable) -> set[str]:
    """Those of the columns of its events that a table can have: its times', which depend on their type, and others.

    Raises:
        UserError: as :func:`check_event_table`.
    """
    check_event_table(table)
    names = table.sequences
    found = {name for name in ("rating", "event", "split") if getattr(names, name)} | (
        {"split"} if table.split else set()
    )
    if names.times:
        kind = table_types(table.raw, [names.times]).get(names.times, pa.large_string())
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        found |= parsed_columns(kind.value_type if is_list else kind)
    return found


class EventBatch(NamedTuple):
    """Some events of a table."""

    events: pa.Table
    owners: pa.Array | None  # of a table of sequences: the user of each row whose lists can be used, null or ids
    num_empty: int  # of these rows, those whose list is empty


def event_batches(table: EventTable, data: DataConfig, first_row: int, bad: Counter[str]) -> Iterator[EventBatch]:
    """Events of a table in order.

    Their columns: ``user`` and ``item``, int64 or large_string, null where there is none; ``time``, or some of
    ``whole``, ``part``, ``moment`` and ``nanos`` (:mod:`shards.tables.times`); ``rating``, or ``rating_text``;
    ``event`` and ``split``; those that the table lacks are absent; ``row`` int64, counted from ``first_row``;
    ``cause``, why a row gives no event.

    Args:
        table: to read, that was checked.
        data: the config's section.
        first_row: number of the first event.
        bad: gets the number of lines that cannot be read.

    Raises:
        UserError: the table cannot be read, or an id is not of its kind.
    """
    names = table.sequences
    columns = _columns(names)
    found = read_batches(
        table.raw,
        columns,
        text=columns,
        ids=[names.user, names.items],
        rows_at_once=ROWS_AT_ONCE,
        bad=bad,
        lists=[names.items, names.times] if names.layout == "sequences" else [],
    )
    for batch in found.batches:
        owners, num_empty = None, 0
        if names.layout == "sequences":
            events, owners, num_empty = _flat_sequences(batch, table, data)
        else:
            events = _interactions(batch, table, data)
        if table.split:
            events["split"] = pa.array([table.split] * len(events["user"]), pa.large_string())
        events["row"] = pa.array(np.arange(first_row, first_row + len(events["user"])))
        first_row += len(events["user"])
        yield EventBatch(pa.table(events), owners, num_empty)


def _columns(names: SequenceTableConfig) -> list[str]:
    wanted = (names.user, names.items, names.times, names.rating, names.event, names.split)
    return list(dict.fromkeys(filter(None, wanted)))


def _interactions(batch: pa.Table, table: EventTable, data: DataConfig) -> dict[str, pa.Array]:
    names = table.sequences
    events = {
        "user": raw_ids(batch[names.user], f"column {names.user!r} of {table.raw}", data.user_ids),
        "item": raw_ids(batch[names.items], f"column {names.items!r} of {table.raw}", data.item_ids),
        "cause": pa.nulls(len(batch), pa.large_string()),
    }
    if names.times:
        require_times(batch[names.times].type, f"column {names.times!r} of {table.raw}")
        events |= time_columns(batch[names.times])
    if names.rating:
        rating = batch[names.rating]
        require_rating(rating.type, f"column {names.rating!r} of {table.raw}")
        as_text = is_text(rating.type)
        events["rating_text" if as_text else "rating"] = rating if as_text else as_float64(rating)
    for name, column in (("event", names.event), ("split", names.split)):
        if column:
            require_word(batch[column].type, f"column {column!r} of {table.raw}")
            events[name] = batch[column].cast(pa.large_string())
    return events


def _flat_sequences(batch: pa.Table, table: EventTable, data: DataConfig) -> tuple[dict[str, pa.Array], pa.Array, int]:
    """An event for each item of a list, and one with a cause for each row whose lists cannot be used; the other rows'
    users, and how many of their lists are empty."""
    names = table.sequences
    users = raw_ids(batch[names.user], f"column {names.user!r} of {table.raw}", data.user_ids)
    where = f"column {names.items!r} of {table.raw}"
    items = as_lists(batch[names.items], where, as_ids=True)
    lengths = lengths_of(items)
    causes = np.where(lengths < 0, NO_LIST, "").astype(object)
    times = None
    if names.times:
        time_where = f"column {names.times!r} of {table.raw}"
        times = as_lists(batch[names.times], time_where)
        require_times(times.type.value_type, time_where)
        causes[(lengths >= 0) & (lengths_of(times) != lengths)] = LENGTHS
    good, spoilt = pa.array(causes == ""), np.flatnonzero(causes != "")
    lengths = lengths[causes == ""]
    owners = np.repeat(np.flatnonzero(causes == ""), lengths)
    events = {
        "user": pa.concat_arrays([users.take(pa.array(owners)), users.take(pa.array(spoilt))]),
        "item": _with_nulls(raw_ids(items.filter(good).flatten(), where, data.item_ids), len(spoilt)),
        "cause": pa.array([None] * len(owners) + causes[spoilt].tolist(), pa.large_string()),
    }
    if times is not None:
        found = time_columns(times.filter(good).flatten())
        events |= {name: _with_nulls(column, len(spoilt)) for name, column in found.items()}
    return events, users.filter(good), int((lengths == 0).sum())


def _with_nulls(column: pa.Array, number: int) -> pa.Array:
    return pa.concat_arrays([column, pa.nulls(number, column.type)])
