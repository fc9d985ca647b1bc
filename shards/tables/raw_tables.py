"""Raw tables: Parquet or CSV in, checked columns and ids out.

Ids are compared in the item table's type (integers as int64, anything else as text), so a CSV and a Parquet file of the
same rows give the same store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError

BATCH_ROWS = 65_536


def read_table(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> pa.Table:
    """Read ``columns`` of a whole table; the columns of ``text`` are not given a type by guessing in a CSV.

    Raises:
        UserError: missing file, neither Parquet nor CSV, missing column, no rows.
    """
    columns = list(dict.fromkeys(columns))
    try:
        if _ending(path) == ".parquet":
            with open_parquet(path, columns) as file:
                return file.read(columns=columns)
        table = _read_csv(path, columns, text)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if table.num_rows == 0:
        raise UserError(f"table {path} is empty; expected at least one row")
    return table


def iter_table(
    path: Path, columns: Sequence[str], text: Sequence[str] = (), rows_at_once: int = BATCH_ROWS
) -> Iterator[pa.Table]:
    """Like :func:`read_table`, a batch of rows at a time (a CSV is read whole, since its types are guessed)."""
    if _ending(path) == ".csv":
        yield read_table(path, columns, text)
        return
    with open_parquet(path, columns) as file:
        try:
            for batch in file.iter_batches(rows_at_once, columns=list(columns)):
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None


def open_parquet(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    """Open a Parquet file that has rows and these columns, to be read in batches.

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
    return UserError(f"table {path} cannot be read: {' '.join(str(error).split())}; is it complete and of that format?")


def _check_columns(path: Path, found: Sequence[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            raise UserError(f"table {path} has no column {column!r}; it has: {', '.join(found)}")


def _read_csv(path: Path, columns: list[str], text: Sequence[str]) -> pa.Table:
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        _check_columns(path, reader.schema.names, columns)
    convert = pyarrow.csv.ConvertOptions(
        include_columns=columns,
        column_types={column: pa.large_string() for column in text},
        null_values=[""],  # an item called "NA" is an item
        strings_can_be_null=True,
    )
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


def as_ids(column: pa.ChunkedArray | pa.Array, where: str) -> pa.Array:
    """``column`` as int64 or large_string without nulls.

    Raises:
        UserError: nulls, or a type that is neither integer nor text.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null ids; remove or fill these rows")
    if pa.types.is_integer(kind):
        target: pa.DataType = pa.int64()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        target = pa.large_string()
    else:
        raise UserError(f"{where} holds ids of type {kind}; expected integers or text")
    try:
        column = column.cast(kind).cast(target)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds ids that do not fit int64 ({error}); store them as text") from None
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def check_unique(ids: pa.Array, where: str) -> None:
    """Refuse an id that stands twice."""
    counts = pc.value_counts(ids)
    if len(counts) == len(ids):
        return
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    raise UserError(
        f"{where} holds {len(twice)} ids more than once, the first {twice.field('values')[0].as_py()!r}; "
        "expected one row each"
    )


@dataclass(frozen=True)
class ItemIds:
    """External item ids in table order: the internal id of an item is its row."""

    external: pa.Array  # [V], int64 or large_string

    def find(self, values: pa.Array) -> np.ndarray:
        """Internal ids, int64; -1 where the item is unknown. One pass over the catalogue per call."""
        try:
            rows = pc.index_in(values.cast(self.external.type), value_set=self.external)
        except pa.ArrowInvalid:  # text that is no number, among integer ids
            rows = pc.index_in(values.cast(pa.large_string()), value_set=self.external.cast(pa.large_string()))
        return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def lookup(self, values: pa.Array, where: str) -> np.ndarray:
        """Internal ids, int64.

        Raises:
            UserError: an item is not in the table.
        """
        rows = self.find(values)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise UserError(
                f"{where} names items that are not in the item table, the first {values[unknown[0]].as_py()!r}; "
                "add them there or drop these events"
            )
        return rows


def content_sha256(table: pa.Table) -> str:
    """Digest of a table's column names and rows, whatever wrote the file that holds them."""
    digest = hashlib.sha256(json.dumps(table.column_names).encode())
    for batch in table.to_batches(BATCH_ROWS):
        columns = [column.to_pylist() for column in batch.columns]
        digest.update("".join(json.dumps(row) + "\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()
