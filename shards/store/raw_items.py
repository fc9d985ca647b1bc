"""The item table that a config names: its columns checked, read with what the texts of the features need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.config.data_section import DataConfig
from fmrl_dist.config.features import NpyFeature, TextFeature
from shards.encoders.item_text import as_text, cell_values, number_columns, parts_for, template_columns
from shards.tables.bad_rows import MEND_BAD_ROWS, check_bad_rows
from shards.tables.column_kinds import is_text, require_ids, require_text, require_title
from shards.tables.formats.choice import bad_items_of, with_plain_items
from shards.tables.item_ids import ItemIds, check_unique, check_whole, raw_ids
from shards.tables.raw_tables import PARQUET, RawTable, read_table, table_columns, table_types

NO_ID = "no id"  # why a row is left out


@dataclass(frozen=True)
class RawItems:
    """The item table, in its own order."""

    table: pa.Table  # of the id column and what titles and texts need; of the ids alone where there is no table
    ids: ItemIds
    titles: pa.ChunkedArray | None
    bad: dict[str, int] = field(default_factory=dict)  # cause -> rows that were left out
    # row of the item table of each item, int64 [V], -1 for items that it lacks; None: the items are its rows
    source_rows: np.ndarray | None = None
    num_source_rows: int = 0  # of the item table
    fitted: np.ndarray | None = None  # bool [V], which items a feature may be fitted to; None: all

    def take(self, rows: np.ndarray, ids: pa.Array, fitted: np.ndarray | None) -> RawItems:
        """The items of some ``rows`` [V] of the table, in that order; -1 is an item without anything but its id."""
        indices = pa.array(rows, mask=rows < 0)
        table = self.table.take(indices)
        titles = None if self.titles is None else self.titles.take(indices)
        return RawItems(table, ItemIds(ids), titles, self.bad, rows, self.table.num_rows, fitted)


def check_raw_items(data: DataConfig, downloads: Path | None = None) -> None:
    """Refuse a table whose columns cannot serve, without reading its rows; only those of Parquet have types.

    Raises:
        UserError: missing file or column, or a column of a type that cannot serve.
    """
    data = with_plain_items(data, downloads)
    table = item_table(data, downloads)
    parts = _text_parts(data, table)
    _check_kinds(data, table, table_types(table, _columns(data, parts)), template_columns(parts))


def read_raw_items(data: DataConfig, downloads: Path | None = None, mend: str = MEND_BAD_ROWS) -> RawItems:
    """Read the table; rows without an id, and lines that cannot be read, are left out and counted.

    Args:
        data: the config's section.
        downloads: folder for copies of URLs; None: there may be none.
        mend: what else can be done about too many rows that cannot be used.

    Raises:
        UserError: as :func:`check_raw_items`; or ids are not unique or not of their kind, or more rows than
            ``data.dirt.max_bad_rows`` allows cannot be used, or any where a feature is an array.
    """
    raw, data = data, with_plain_items(data, downloads)
    source, title = item_table(data, downloads), data.items.title
    parts = _text_parts(data, source)
    columns = _columns(data, parts)
    formatted = number_columns(parts) - {title}
    as_written = [name for name in columns if name not in formatted]
    bad = Counter[str]()
    table = read_table(source, columns, text=as_written, ids=[data.items.id], bad=bad)
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    _check_kinds(data, source, kinds, template_columns(parts))
    if source.file_kind != PARQUET:
        _check_formatted(table.select(sorted(formatted)), str(source))
    where = f"column {data.items.id!r} of {source}"
    num_rows = len(table) + bad.total()
    external = raw_ids(table[data.items.id], where, data.item_ids)
    if external.null_count:
        bad[NO_ID] = external.null_count
        table = table.filter(external.is_valid())
        external = external.drop_null()
    check_bad_rows(bad, num_rows, str(source), data.dirt.max_bad_rows, mend=mend)
    require(len(external) > 0, f"table {source} has no row that can be used")
    check_unique(external, where)
    check_whole(external, where)
    titles = as_titles(table[title], f"column {title!r} of {source}") if title else None
    bad.update(bad_items_of(raw, data))
    _check_arrays(data, bad, str(source))
    return RawItems(table, ItemIds(external), titles, dict(sorted(bad.items())))


def _check_arrays(data: DataConfig, bad: Counter[str], table: str) -> None:
    """An array's rows are those of the table's file: with rows left out, all behind them would be another item's."""
    names = [name for name, feature in data.features.items() if isinstance(feature, NpyFeature)]
    causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(bad.items()) if count)
    require(
        not (names and causes),
        f"table {table} has rows that cannot be used ({causes}), and feature {', '.join(names)} is an array with a row "
        "for each of its rows; mend these rows, or remove them from the table and the array",
    )


def items_of_ids(ids: pa.Array, data: DataConfig, fitted: np.ndarray | None = None) -> RawItems:
    """Items without a table: their ids, int64 or large_string, are all that is known of them.

    Raises:
        UserError: the config asks for titles, or for a feature of texts or arrays, which a table's rows would have.
    """
    needy = [name for name, feature in data.features.items() if isinstance(feature, TextFeature | NpyFeature)]
    needy += ["data.items.title"] * bool(data.items.title)
    require(not needy, f"data.items.path is empty, but {', '.join(needy)} need a table of items; name one")
    return RawItems(pa.table({data.items.id: ids}), ItemIds(ids), None, fitted=fitted)


def item_table(data: DataConfig, downloads: Path | None = None) -> RawTable:
    """Where the item table is; of a data set's format, the plain one that is made of it.

    Raises:
        UserError: it cannot be made.
    """
    data = with_plain_items(data, downloads)
    return RawTable.at(data.root, data.items.path, data.items.csv, downloads)


def as_titles(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Lists of words, as some tables have them, joined by ", "; numbers as item texts have them.

    Raises:
        UserError: a date or timestamp that Arrow cannot write; ``where`` begins the message.
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        texts = column.cast(pa.large_string())
        far = texts.filter(pc.starts_with(texts, "<value out of range"))  # Arrow's text for it
        require(not len(far), f"{where} holds the title {far[:1].to_pylist()}: a date of no calendar; mend it")
    if pa.types.is_floating(column.type):
        values = [None if value is None else as_text(value) for value in cell_values(column, where)]
        return pa.chunked_array([pa.array(values, pa.large_string())])
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return column
    titles = [None if words is None else ", ".join(map(str, filter(None, words))) for words in column.to_pylist()]
    return pa.chunked_array([pa.array(titles, pa.large_string())])


def _check_formatted(table: pa.Table, where: str) -> None:
    """Columns that are formatted as numbers or dates are still text if not all of their cells are such."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        cells = column.drop_null()
        if is_text(column.type) and len(cells):
            raise UserError(
                f"column {name!r} of {where} holds {_first_misfit(cells)!r}, and data.text formats it as a number or "
                "date; leave such cells empty, or name the column without a format"
            )


def _first_misfit(cells: pa.ChunkedArray) -> str:
    """The first text that is no number; where none is a number, the first that is no time."""
    for kind in (pa.float64(), pa.timestamp("us")):
        fits = [_casts(cell, kind) for cell in cells]
        if any(fits) and not all(fits):
            return str(cells[fits.index(False)])
    return str(cells[0])


def _casts(cell: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        cell.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _columns(data: DataConfig, parts: Sequence[str]) -> list[str]:
    return [data.items.id, *([data.items.title] if data.items.title else []), *template_columns(parts)]


def _text_parts(data: DataConfig, table: RawTable) -> list[str]:
    """Parts of all texts that are made of the table."""
    given = [feature.text or data.text for feature in data.features.values() if isinstance(feature, TextFeature)]
    known = table_columns(table) if () in given else []
    return [part for parts in given for part in parts_for(parts, known)]


def _check_kinds(data: DataConfig, table: RawTable, types: Mapping[str, pa.DataType], texts: Sequence[str]) -> None:
    for name, kind in types.items():
        where = f"column {name!r} of {table}"
        if name == data.items.id:
            require_ids(kind, where)
        if name == data.items.title:
            require_title(kind, where)
        if name in texts:
            require_text(kind, where)
