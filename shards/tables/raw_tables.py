"""Raw tables of every kind of file, read whole or in batches of rows, columns checked.

Parquet keeps its types. CSV and TSV give text; JSON Lines give text, or lists of it. So that the same rows give the
same store, callers name the columns that are ids or text; what is left, numbers and dates, is guessed from all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.base.table_files import ENDINGS, MEND, partition_keys, rooted, shown_places, table_files, table_kind
from fmrl_dist.config.tables import CsvConfig, TablePath
from shards.tables.csv_files import csv_batches, csv_names
from shards.tables.json_lines import json_batches, json_names
from shards.tables.parquet_files import opened_parquet, parquet_batches, parquet_names, type_of

BATCH_ROWS = 65_536
PARQUET, JSON = ".parquet", ".jsonl"
GUESSES = (pa.int64(), pa.float64(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC"))  # in this order


@dataclass(frozen=True)
class RawTable:
    """Where a table is, and how its files are written."""

    places: tuple[str, ...]  # files, folders, patterns, URLs
    csv: CsvConfig = field(default_factory=CsvConfig)
    downloads: Path | None = None  # folder for copies of URLs; None: there may be none
    kind: str = ""  # such as .csv, of files whose names do not say it; "": by their names

    @classmethod
    def at(
        cls, root: str | Path, path: TablePath, csv: CsvConfig | None = None, downloads: Path | None = None
    ) -> RawTable:
        """The table that a config's path names below ``root``."""
        return cls(rooted(root, path), csv or CsvConfig(), downloads)

    def __str__(self) -> str:
        return shown_places(self.places)

    @cached_property
    def files(self) -> list[Path]:
        """Its files in order."""
        return table_files(self.places, ENDINGS, MEND, self.downloads, any_ending=bool(self.kind or self.csv.delimiter))

    @cached_property
    def file_kind(self) -> str:
        """One of ``.parquet``, ``.csv``, ``.tsv``, ``.jsonl``; with a delimiter, files of other endings are CSV."""
        if self.kind:
            return self.kind
        kinds = {kind if (kind := table_kind(file)) in ENDINGS else ".csv" for file in self.files}
        require(len(kinds) == 1, f"table {self} holds {' and '.join(sorted(kinds))} files; expected one kind")
        return kinds.pop()


class TableBatches(NamedTuple):
    """A table that is read a batch of rows at a time."""

    num_rows: int | None  # of the whole table; None where only reading tells
    batches: Iterator[pa.Table]


def as_table(table: RawTable | Path) -> RawTable:
    """A path as a table."""
    return table if isinstance(table, RawTable) else RawTable((str(table),))


def read_table(
    table: RawTable | Path,
    columns: Sequence[str],
    text: Sequence[str] = (),
    ids: Sequence[str] = (),
    bad: Counter[str] | None = None,
) -> pa.Table:
    """Read ``columns`` of a whole table.

    Args:
        table: where it is.
        columns: their names; ``a.b`` is field ``b`` of column ``a``, unless a column is named so.
        text: columns that are taken as they are written, where files do not tell a column's type.
        ids: columns of ids, likewise, which may hold text and whole numbers only.
        bad: gets the number of rows that cannot be read, by cause; without it they are refused.

    Raises:
        UserError: missing file, none of the kinds, missing column, no rows, text that is not of its encoding, parts
            whose columns differ, or more than this machine's memory can hold.
    """
    table = as_table(table)
    batches = read_batches(table, columns, text, ids, bad=bad).batches
    if table.file_kind == PARQUET:
        return bounded_table(batches, f"table {table}")
    whole = bounded_table(_alike(batches), f"table {table}")
    require(len(whole) > 0, f"table {table} is empty; expected at least one row")
    for number, name in enumerate(whole.column_names):
        if name not in {*text, *ids}:
            whole = whole.set_column(number, name, _guessed(whole[name]))
    return whole


def read_batches(
    table: RawTable | Path,
    columns: Sequence[str],
    text: Sequence[str] = (),
    ids: Sequence[str] = (),
    rows_at_once: int = BATCH_ROWS,
    bad: Counter[str] | None = None,
    lists: Sequence[str] = (),
) -> TableBatches:
    """Like :func:`read_table`, in batches: of Parquet at most ``rows_at_once`` rows; text is not guessed.

    Texts of the columns ``lists`` become lists, here where JSON Lines have arrays beside them, else by
    :func:`shards.tables.list_columns.as_lists`.
    """
    table = as_table(table)
    columns = list(dict.fromkeys(columns))
    if table.file_kind == PARQUET:
        num_rows = _check_parts(table, columns)
        return TableBatches(num_rows, parquet_batches(table.files, columns, rows_at_once))
    _check_text(table, columns)
    return TableBatches(None, _text_batches(table, columns, ids, lists, bad))


def table_types(table: RawTable | Path, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """Types of ``columns``, without a row read; none unless the table is Parquet: text files do not tell.

    Raises:
        UserError: missing file, none of the kinds, missing column, or no rows.
    """
    table = as_table(table)
    if table.file_kind != PARQUET:
        _check_text(table, columns)
        return {}
    _check_parts(table, columns)
    with opened_parquet(table.files[0]) as opened:
        return {name: type_of(opened, name) for name in columns}


def table_columns(table: RawTable | Path) -> list[str]:
    """Names of a table's columns; with dots those of nested ones."""
    table = as_table(table)
    return _names(table, table.files[0])


def _names(table: RawTable, file: Path) -> list[str]:
    if table.file_kind == PARQUET:
        return parquet_names(file)
    return json_names(file) if table.file_kind == JSON else csv_names(file, table.file_kind, table.csv)


def _check_parts(table: RawTable, columns: Sequence[str]) -> int:
    """The number of rows; all files must have the columns, of the same types."""
    num_rows, types = 0, dict[str, pa.DataType]()
    for file in table.files:
        _check_columns(table, file, _names(table, file), columns)
        with opened_parquet(file) as opened:
            num_rows += opened.num_rows
            for name in columns:
                kind = type_of(opened, name)
                first = types.setdefault(name, kind)
                require(
                    kind == first,
                    f"table {table}: column {name!r} is {kind} in {file.name}, {first} in {table.files[0].name}",
                )
    if num_rows == 0:
        raise UserError(f"table {table} is empty; expected at least one row")
    return num_rows


def _check_text(table: RawTable, columns: Sequence[str]) -> None:
    """Each file of a CSV must have the columns; of JSON Lines one of them: objects may lack what they do not know."""
    if table.file_kind == JSON:
        names = list(dict.fromkeys(name for file in table.files for name in _names(table, file)))
        _check_columns(table, table.files[0], names, columns)
        return
    for file in table.files:
        _check_columns(table, file, _names(table, file), columns)


def _text_batches(
    table: RawTable, columns: Sequence[str], ids: Sequence[str], lists: Sequence[str], bad: Counter[str] | None
) -> Iterator[pa.Table]:
    for file in table.files:
        found: Counter[str] = Counter()
        batches = (
            json_batches(file, columns, ids, lists, found)
            if table.file_kind == JSON
            else csv_batches(file, table.file_kind, table.csv, columns, found)
        )
        yield from batches
        if bad is not None:
            bad.update(found)
        elif found:
            raise UserError(
                f"table {file} holds {found.total():,} lines that cannot be read: of another number of columns, or no "
                "JSON objects; mend or remove them"
            )


def _check_columns(table: RawTable, file: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    lower = Counter(name.lower() for name in dict.fromkeys(found))
    for column in columns:
        if column in found:
            is_once = list(found).count(column) == 1
            require(is_once, f"table {file} has several columns {column!r}; give each its own name")
            require(
                lower[column.lower()] == 1,
                f"table {file} has columns that differ from {column!r} only by case; give each its own name",
            )
            continue
        folder = Path(table.places[0])
        if len(table.places) == 1 and folder.is_dir() and column in partition_keys(folder, [file]):
            raise UserError(f"table {table} has {column!r} only in the names of its folders; write it into the files")
        other = next((name for name in found if name.lower() == column.lower()), None)
        hint = f"; it has {other!r}: names of columns differ by case" if other else f"; it has: {', '.join(found)}"
        raise UserError(f"table {file} has no column {column!r}{hint}")


def _alike(batches: Iterable[pa.Table]) -> list[pa.Table]:
    """Batches of the same types: where one has lists, texts of the others become lists of one."""
    found = list(batches)
    for number in range(found[0].num_columns if found else 0):
        depth = max(_depth(batch.schema.types[number]) for batch in found)
        for at, batch in enumerate(found):
            column, name = batch.column(number), batch.column_names[number]
            for _ in range(depth - _depth(column.type)):
                column = _wrapped(column)
            found[at] = batch.set_column(number, name, column)
    return found


def _depth(kind: pa.DataType) -> int:
    return 1 + _depth(kind.value_type) if pa.types.is_large_list(kind) else 0


def _wrapped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    lists = [None if value is None else [value] for value in column.to_pylist()]
    return pa.chunked_array([pa.array(lists, pa.large_list(column.type))])


def _guessed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as numbers, dates or times, if all of it is."""
    if not pa.types.is_large_string(column.type) or column.null_count == len(column):
        return column
    for kind in GUESSES:
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    return column
