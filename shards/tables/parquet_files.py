"""Parquet files of a raw table: columns, and fields of nested ones, by dotted names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parquet import BoundedParquet, open_parquet


def parquet_names(file: Path) -> list[str]:
    """Names of a file's columns, then those of nested ones with dots."""
    with opened_parquet(file) as opened:
        paths = (path for name in opened.names for path in _paths(name, opened.types[name]))
        return [*opened.names, *(path for path in paths if path not in opened.names)]


def type_of(opened: BoundedParquet, column: str) -> pa.DataType:
    """Type of a column, or of a field."""
    first, *fields = _keys(opened, column)
    kind = opened.types[first]
    for name in fields:
        kind = kind.field(name).type
    return kind


def parquet_batches(files: Sequence[Path], columns: Sequence[str], rows_at_once: int) -> Iterator[pa.Table]:
    """Columns of files in order, at most ``rows_at_once`` rows at a time."""
    for file in files:
        with opened_parquet(file) as opened, _readable(file):
            yield from column_batches(opened, columns, rows_at_once)


def column_batches(
    opened: BoundedParquet, columns: Sequence[str], rows_at_once: int, groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """Columns of an open file, ``a.b`` for field b of column a; of all row groups or of some."""
    keys = {column: _keys(opened, column) for column in columns}
    whole = list(dict.fromkeys(first for first, *_ in keys.values()))
    for batch in opened.batches(whole, rows_at_once, groups=groups):
        yield pa.table([_field(batch[first], fields) for first, *fields in keys.values()], names=list(columns))


def _field(column: pa.ChunkedArray, fields: Sequence[str]) -> pa.ChunkedArray:
    return pc.struct_field(column, fields) if fields else column


@contextmanager
def opened_parquet(file: Path) -> Iterator[BoundedParquet]:
    """A file to read; what is wrong with it is said in one line."""
    with _readable(file), open_parquet(file, f"table {file}") as opened:
        yield opened


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Say in one line why a Parquet file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        if isinstance(error, UnicodeDecodeError) or "UTF8" in what:
            raise UserError(f"table {file} is not UTF-8 text ({what}); write its texts as UTF-8") from None
        raise UserError(f"table {file} cannot be read: {what}; is the file complete, and in that format?") from None


def _paths(name: str, kind: pa.DataType) -> Iterator[str]:
    for inner in kind if pa.types.is_struct(kind) else ():
        yield f"{name}.{inner.name}"
        yield from _paths(f"{name}.{inner.name}", inner.type)


def _keys(opened: BoundedParquet, column: str) -> list[str]:
    """A column's own name, then those of the fields that lead to what ``column`` means."""
    if column in opened.names:
        return [column]
    outer = [name for name in opened.names if column.startswith(f"{name}.")]
    first = max(outer, key=len, default=column)  # a column's own name may have dots
    return [first, *column[len(first) + 1 :].split(".")] if first != column else [column]
