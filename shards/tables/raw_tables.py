"""Raw tables: Parquet or CSV, one file or a folder of parts, read whole or in batches of rows, columns checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import BoundedParquet, bounded_table, open_parquet
from fmrl_dist.base.table_files import partition_keys, table_files

BATCH_ROWS = 65_536
NOT_UTF8 = "convert the file, for example with iconv --from-code LATIN1 --to-code UTF-8"


def read_table(path: Path, columns: Sequence[str], text: Sequence[str] = (), ids: Sequence[str] = ()) -> pa.Table:
    """Read ``columns`` of a whole table.

    In a CSV, the columns of ``text`` are read as text. Those of ``ids`` are integers if each value is written as Python
    would print it, else text: ``0042``, ``0x1A`` and ``1E5`` stay what they are. Other types are guessed.

    Raises:
        UserError: missing file, neither Parquet nor CSV, missing column, no rows, a CSV that is not UTF-8, parts whose
            columns differ, or more than this machine's memory can hold.
    """
    columns = list(dict.fromkeys(columns))
    files = table_files(path)
    if files[0].suffix == ".csv":
        return _read_csv_files(path, files, columns, text, ids)
    return bounded_table(read_batches(path, columns).batches, f"table {path}")


class TableBatches(NamedTuple):
    """A table that is read a batch of rows at a time."""

    num_rows: int  # of the whole table
    batches: Iterator[pa.Table]


def read_batches(
    path: Path,
    columns: Sequence[str],
    text: Sequence[str] = (),
    ids: Sequence[str] = (),
    rows_at_once: int = BATCH_ROWS,
) -> TableBatches:
    """Like :func:`read_table`, at most ``rows_at_once`` rows at a time. A CSV is one batch: its types are guessed."""
    files = table_files(path)
    if files[0].suffix == ".csv":
        table = read_table(path, columns, text, ids)
        return TableBatches(table.num_rows, iter([table]))
    columns = list(dict.fromkeys(columns))
    num_rows = _check_parts(path, files, columns)
    return TableBatches(num_rows, _parquet_batches(files, columns, rows_at_once))


def table_types(path: Path, columns: Sequence[str]) -> dict[str, pa.DataType]:
    """Types of ``columns``, without a row read; none for a CSV, whose types are guessed from its rows.

    Raises:
        UserError: missing file, neither Parquet nor CSV, missing column, or no rows.
    """
    files = table_files(path)
    if files[0].suffix == ".csv":
        for file in files:
            _check_columns(path, file, _csv_names(file), columns)
        return {}
    _check_parts(path, files, columns)
    with _opened(files[0]) as opened:
        return {name: opened.types[name] for name in columns}


def table_columns(path: Path) -> list[str]:
    """Names of a table's columns."""
    file = table_files(path)[0]
    if file.suffix == ".csv":
        return _csv_names(file)
    with _opened(file) as opened:
        return opened.names


def _check_parts(path: Path, files: Sequence[Path], columns: Sequence[str]) -> int:
    """The number of rows; all files must have the columns, of the same types."""
    num_rows, types = 0, dict[str, pa.DataType]()
    for file in files:
        with _opened(file) as opened:
            _check_columns(path, file, opened.names, columns)
            num_rows += opened.num_rows
            for name, kind in opened.types.items():
                if name not in columns:
                    continue
                first = types.setdefault(name, kind)
                require(
                    kind == first, f"table {path}: column {name!r} is {kind} in {file.name}, {first} in {files[0].name}"
                )
    if num_rows == 0:
        raise UserError(f"table {path} is empty; expected at least one row")
    return num_rows


def _parquet_batches(files: Sequence[Path], columns: Sequence[str], rows_at_once: int) -> Iterator[pa.Table]:
    for file in files:
        with _opened(file) as opened, _readable(file):
            yield from opened.batches(columns, rows_at_once)


@contextmanager
def _opened(file: Path) -> Iterator[BoundedParquet]:
    with _readable(file), open_parquet(file, f"table {file}") as opened:
        yield opened


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Say in one line why a file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        mend = NOT_UTF8 if path.suffix == ".csv" else "write its texts as UTF-8"
        return UserError(f"table {path} is not UTF-8 text ({' '.join(str(error).split())}); {mend}")
    return UserError(
        f"table {path} cannot be read: {' '.join(str(error).split())}; is the file complete, and in that format?"
    )


def _check_columns(path: Path, file: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column in found:
            require(
                list(found).count(column) == 1, f"table {file} has several columns {column!r}; give each its own name"
            )
            continue
        if path.is_dir() and column in partition_keys(path, [file]):
            raise UserError(f"table {path} has {column!r} only in the names of its folders; write it into the files")
        raise UserError(f"table {file} has no column {column!r}; it has: {', '.join(found)}")


def _csv_names(file: Path) -> list[str]:
    with _readable(file), pyarrow.csv.open_csv(file, parse_options=_csv_format()) as reader:
        return list(reader.schema.names)


def _csv_format() -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(newlines_in_values=True)


def _read_csv_files(
    path: Path, files: Sequence[Path], columns: list[str], text: Sequence[str], ids: Sequence[str]
) -> pa.Table:
    table = None
    for file in files:
        _check_columns(path, file, _csv_names(file), columns)
        with _readable(file):
            part = _read_csv(file, columns, {*text, *ids})
        try:  # a number may be whole in one part and not in another; no column may be text and number
            table = part if table is None else pa.concat_tables([table, part], promote_options="permissive")
        except pa.ArrowTypeError:
            raise UserError(
                f"table {path}: {file.name} has a column of another type than the parts before it"
            ) from None
    if table is None or table.num_rows == 0:
        raise UserError(f"table {path} is empty; expected at least one row")
    for number, name in enumerate(table.column_names):
        if name in ids:
            table = table.set_column(number, name, _integers(table[name]))
    return table


def _read_csv(file: Path, columns: list[str], text: set[str]) -> pa.Table:
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(text, pa.large_string()),
        null_values=[""],  # an item called "NA" is an item
        strings_can_be_null=True,
    )
    table = pyarrow.csv.read_csv(file, parse_options=_csv_format(), convert_options=convert)
    for field in table.schema:
        if pa.types.is_binary(field.type):  # what text that is not UTF-8 is guessed to be
            raise UserError(f"column {field.name!r} of table {file} is not UTF-8 text; {NOT_UTF8}")
    return table


def _integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """``column``, text, as int64 if each value is written as an int64 is printed, else as it is."""
    written_so = pc.match_substring_regex(column, r"^(0|-?[1-9][0-9]*)$")
    if not pc.all(written_so).as_py():
        return column
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:  # more digits than an int64 has
        return column
