"""The item table that a config names: its columns checked, read with what the texts of the features need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import require
from fmrl_dist.base.id_columns import as_ids
from fmrl_dist.config.features import TextFeature
from fmrl_dist.config.sections import DataConfig
from shards.encoders.item_text import number_columns, parts_for, template_columns
from shards.tables.column_kinds import require_ids, require_text, require_title
from shards.tables.item_ids import ItemIds, check_unique
from shards.tables.raw_tables import read_table, table_columns, table_types


@dataclass(frozen=True)
class RawItems:
    """The item table, in its own order."""

    table: pa.Table
    ids: ItemIds
    titles: pa.ChunkedArray | None
    # row of the item table of each item, int64 [V], -1 for items that it lacks; None: the items are its rows
    source_rows: np.ndarray | None = None
    num_source_rows: int = 0  # of the item table
    fitted: np.ndarray | None = None  # bool [V], which items a feature may be fitted to; None: all

    def take(self, rows: np.ndarray, ids: pa.Array, fitted: np.ndarray | None) -> RawItems:
        """The items of some ``rows`` [V] of the table, in that order; -1 is an item without anything but its id."""
        indices = pa.array(rows, mask=rows < 0)
        table = self.table.take(indices)
        titles = None if self.titles is None else self.titles.take(indices)
        return RawItems(table, ItemIds(ids), titles, rows, self.table.num_rows, fitted)

    @classmethod
    def empty(cls, data: DataConfig) -> RawItems:
        """Where there is no item table."""
        require(
            not data.items.title and not _text_parts(data),
            "data.items.path is empty, so items have no titles and no texts; set it, or leave these out",
        )
        return cls(pa.table({data.items.id: pa.array([], pa.large_string())}), ItemIds(pa.array([])), None)


def check_raw_items(data: DataConfig) -> None:
    """Refuse a table whose columns cannot serve, without reading its rows; a CSV's types are only known afterwards.

    Raises:
        UserError: missing file or column, or a column of a type that cannot serve.
    """
    path, parts = _path(data), _text_parts(data)
    _check_kinds(data, table_types(path, _columns(data, parts)), template_columns(parts))


def read_raw_items(data: DataConfig, text_ids: bool = False) -> RawItems:
    """Read the table.

    Args:
        data: the config's section.
        text_ids: whether the ids of a CSV are text, whatever they look like; else they are integers if all look so.

    Raises:
        UserError: as :func:`check_raw_items`; or ids are null, or not unique.
    """
    path, parts, title = _path(data), _text_parts(data), data.items.title
    columns = _columns(data, parts)
    as_written = [name for name in columns if name == title or name not in number_columns(parts)]
    as_written += [data.items.id] if text_ids else []
    table = read_table(path, columns, text=as_written, ids=[] if text_ids else [data.items.id])
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    _check_kinds(data, kinds, template_columns(parts))
    where = f"column {data.items.id!r} of {path}"
    ids = ItemIds(as_ids(table[data.items.id], where))
    check_unique(ids.external, where)
    return RawItems(table, ids, table[title] if title else None)


def _path(data: DataConfig) -> Path:
    return Path(data.root) / data.items.path


def _columns(data: DataConfig, parts: Sequence[str]) -> list[str]:
    return [data.items.id, *([data.items.title] if data.items.title else []), *template_columns(parts)]


def _text_parts(data: DataConfig) -> list[str]:
    """Parts of all texts that are made of the table."""
    given = [feature.text or data.text for feature in data.features.values() if isinstance(feature, TextFeature)]
    known = table_columns(_path(data)) if () in given and data.items.path else []
    return [part for parts in given for part in parts_for(parts, known)]


def _check_kinds(data: DataConfig, types: Mapping[str, pa.DataType], texts: Sequence[str]) -> None:
    for name, kind in types.items():
        where = f"column {name!r} of {_path(data)}"
        if name == data.items.id:
            require_ids(kind, where)
        if name == data.items.title:
            require_title(kind, where)
        if name in texts:
            require_text(kind, where)
