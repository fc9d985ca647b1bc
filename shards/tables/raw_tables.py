"""Raw tables: Parquet or CSV files, read whole or in batches of rows, with their columns checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError

BATCH_ROWS = 65_536
NOT_UTF8 = "convert the file, for example with iconv --from-code LATIN1 --to-code UTF-8"


def read_table(path: Path, columns: Sequence[str], text: Sequence[str] = (), ids: Sequence[str] = ()) -> pa.Table:
    """Read ``columns`` of a whole table.

    In a CSV, the columns of ``text`` are read as text. Those of ``ids`` are integers if each value is written as Python
    would print it, else text: ``0042``, ``0x1A`` and ``1E5`` stay what they are. Other types are guessed.

    Raises:
        UserError: missing file, neither Parquet nor CSV, missing column, no rows, or a CSV that is not UTF-8.
    """
    columns = list(dict.fromkeys(columns))
    try:
        if _ending(path) == ".parquet":
            with open_parquet(path, columns) as file:
                return _valid(file.read(columns=columns))
        table = _read_csv(path, columns, text, ids)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    if table.num_rows == 0:
        raise UserError(f"table {path} is empty; expected at least one row")
    return table


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
    """Like :func:`read_table`, ``rows_at_once`` rows at a time. A CSV is one batch, since its types are guessed."""
    if _ending(path) == ".csv":
        table = read_table(path, columns, text, ids)
        return TableBatches(table.num_rows, iter([table]))
    with open_parquet(path, columns) as file:
        num_rows = file.metadata.num_rows
    return TableBatches(num_rows, _parquet_batches(path, columns, rows_at_once))


def _parquet_batches(path: Path, columns: Sequence[str], rows_at_once: int) -> Iterator[pa.Table]:
    with open_parquet(path, columns) as file:
        try:
            for batch in file.iter_batches(rows_at_once, columns=list(columns)):
                yield _valid(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None


def _valid(table: pa.Table) -> pa.Table:
    """``table``, if its texts are UTF-8 and its lists lie within their values: Parquet does not promise either.

    Raises:
        pa.ArrowInvalid: they are not.
    """
    table.validate(full=True)
    return table


def open_parquet(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    """Open a Parquet file that must have rows and these columns.

    Raises:
        UserError: missing file, not Parquet, missing column, no rows.
    """
    if _ending(path) != ".parquet":
        raise UserError(f"table {path} is a CSV; expected Parquet")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    _check_columns(path, file.schema_arrow.names, columns)
    if file.metadata.num_rows == 0:
        raise UserError(f"table {path} is empty; expected at least one row")
    return file


def _ending(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"table {path} does not exist; check data.root and the path in the config")
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"table {path} ends in {path.suffix!r}; expected .parquet or .csv")
    return path.suffix


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
        mend = NOT_UTF8 if path.suffix == ".csv" else "write its texts as UTF-8"
        return UserError(f"table {path} is not UTF-8 text ({' '.join(str(error).split())}); {mend}")
    return UserError(
        f"table {path} cannot be read: {' '.join(str(error).split())}; is the file complete, and in that format?"
    )


def _check_columns(path: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            raise UserError(f"table {path} has no column {column!r}; it has: {', '.join(found)}")


def _read_csv(path: Path, columns: list[str], text: Sequence[str], ids: Sequence[str]) -> pa.Table:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        _check_columns(path, reader.schema.names, columns)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types={column: pa.large_string() for column in (*text, *ids)},
        null_values=[""],  # an item called "NA" is an item
        strings_can_be_null=True,
    )
    table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    for number, name in enumerate(table.column_names):
        if pa.types.is_binary(table.schema.field(name).type):  # what text that is not UTF-8 is guessed to be
            raise UserError(f"column {name!r} of table {path} is not UTF-8 text; {NOT_UTF8}")
        if name in ids:
            table = table.set_column(number, name, _integers(table[name]))
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
