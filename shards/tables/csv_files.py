"""CSV and TSV files in batches: every column as text, as it is written; what is empty is null.

A row with too many or too few columns is left out and counted. Types are nobody's guess here.
"""

from __future__ import annotations

import codecs
import csv as python_csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.config.tables import CsvConfig
from shards.tables.quote_pairs import QUOTES_AS_THEY_ARE, PairedQuotes
from shards.tables.text_streams import STAND_IN, opened_text

BLOCK_BYTES = 1 << 23  # that are parsed at once; a row is no longer
UNREADABLE = "unreadable line"  # why a row is left out
HEADER_BYTES = 1 << 20


def csv_names(file: Path, kind: str, csv: CsvConfig) -> list[str]:
    """Names of a file's columns.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    return _header(file, kind, csv)[0]


def _header(file: Path, kind: str, csv: CsvConfig) -> tuple[list[str], int]:
    """Names of the columns, and how many rows come before the first of data: the header, and blank lines before it."""
    if csv.names:
        return list(csv.names), 0
    delimiter = _delimiter(kind, csv)
    sign = _sign(delimiter, csv)
    with readable_csv(file, csv), opened_text(file, csv.encoding, delimiter) as stream:
        start = stream.read(HEADER_BYTES).removeprefix(codecs.BOM_UTF8)
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    quoting = {"quotechar": csv.quote} if csv.quote else {"quoting": python_csv.QUOTE_NONE}
    rows = python_csv.reader(io.StringIO(text, newline=""), delimiter=sign, **quoting)
    try:
        num_blank, names = next(((number, row) for number, row in enumerate(rows) if row), (0, []))
    except python_csv.Error as error:
        raise UserError(f"table {file} has no line with the names of its columns: {error}") from None
    require(bool(names), f"table {file} is empty; expected a line with the names of its columns")
    return [name.replace(sign, delimiter) for name in names], num_blank + 1


def csv_batches(file: Path, kind: str, csv: CsvConfig, columns: Sequence[str], bad: Counter[str]) -> Iterator[pa.Table]:
    """Columns of a file as large_string, a batch of rows at a time.

    Args:
        file: to read.
        kind: ``.csv`` or ``.tsv``.
        csv: how it is written.
        columns: that it has.
        bad: gets the number of rows that are left out.

    Raises:
        UserError: it cannot be read, or is not of its encoding.
    """
    delimiter = _delimiter(kind, csv)
    names, num_before = _header(file, kind, csv)
    options = pyarrow.csv.ReadOptions(
        block_size=BLOCK_BYTES,
        column_names=[str(number) for number in range(len(names))],  # which differ, whatever the names do
        skip_rows_after_names=num_before,
    )
    wanted = [str(names.index(column)) for column in columns]
    convert = pyarrow.csv.ConvertOptions(
        include_columns=wanted,
        column_types=dict.fromkeys(wanted, pa.large_string()),
        null_values=[""],  # an item called "NA" is an item
        strings_can_be_null=True,
    )

    def leave_out(row: pyarrow.csv.InvalidRow) -> str:
        if "\n" in row.text:  # a quote without its pair would take all rows that follow with it
            return "error"
        bad[UNREADABLE] += 1
        return "skip"

    with readable_csv(file, csv), _opened_rows(file, csv, delimiter) as stream:
        reader = pyarrow.csv.open_csv(stream, options, _parse_options(delimiter, csv, leave_out), convert)
        for batch in reader:
            table = pa.Table.from_batches([batch]).rename_columns(list(columns))
            yield _with_delimiters(table, delimiter) if len(delimiter) > 1 else table


@contextmanager
def _opened_rows(file: Path, csv: CsvConfig, delimiter: str) -> Iterator[pa.NativeFile]:
    """The file's text, whose quotes are checked while it is read."""
    with opened_text(file, csv.encoding, delimiter) as stream:
        if not csv.quote:
            yield stream
            return
        checked = PairedQuotes(stream, csv.quote, _sign(delimiter, csv), BLOCK_BYTES, file)
        with pa.PythonFile(checked, mode="r") as rows:
            yield rows


@contextmanager
def readable_csv(file: Path, csv: CsvConfig) -> Iterator[None]:
    """Say in one line why a file cannot be read."""
    try:
        yield
    except (UnicodeDecodeError, UnicodeError) as error:
        raise _wrong_encoding(file, csv, str(error)) from None
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())
        if "UTF8" in what or "codec can't decode" in what:
            raise _wrong_encoding(file, csv, what) from None
        if "straddling" in what:
            raise UserError(
                f"table {file} has a row of more than {BLOCK_BYTES:,} bytes; expected shorter ones: is it a CSV file, "
                "with line breaks?"
            ) from None
        if "columns, got" in what:  # with the row's number or without
            raise UserError(
                f"table {file} has a row of many lines that does not fit its columns; is a quote without its pair? "
                f"{QUOTES_AS_THEY_ARE}"
            ) from None
        raise UserError(f"table {file} cannot be read: {what}; is the file complete, and in that format?") from None


def _wrong_encoding(file: Path, csv: CsvConfig, what: str) -> UserError:
    name = "UTF-8" if csv.encoding.lower().replace("_", "-") in ("utf-8", "utf8") else csv.encoding
    return UserError(
        f"table {file} is not {name} text ({' '.join(what.split())}); name its encoding, such as "
        "--data.sequences.csv.encoding latin-1 (--data.items.csv.encoding for the item table)"
    )


def _delimiter(kind: str, csv: CsvConfig) -> str:
    return csv.delimiter or ("\t" if kind == ".tsv" else ",")


def _sign(delimiter: str, csv: CsvConfig) -> str:
    """The one character that parts columns in what :func:`opened_text` gives."""
    sign = delimiter if len(delimiter) == 1 else STAND_IN
    require(
        sign.isascii() and sign not in "\r\n" and csv.quote.isascii() and sign != csv.quote,
        f"csv.delimiter is {delimiter!r}, csv.quote {csv.quote!r}; expected ASCII that differs, and no line break",
    )
    return sign


def _parse_options(
    delimiter: str, csv: CsvConfig, leave_out: Callable[[pyarrow.csv.InvalidRow], str]
) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(
        delimiter=_sign(delimiter, csv),
        quote_char=csv.quote or False,
        newlines_in_values=bool(csv.quote),
        invalid_row_handler=leave_out,
    )


def _with_delimiters(table: pa.Table, delimiter: str) -> pa.Table:
    """Give texts in quotes the delimiter back that the stand-in stands for."""
    columns = [pc.replace_substring(column, STAND_IN, delimiter) for column in table.columns]
    return pa.table(columns, names=table.column_names)
