"""Parquet of unknown origin, read in pieces whose size is known before they are made.

On disk, a run or a repeated value costs nothing: a file of some kilobytes can claim billions of rows, or one long text
in each of millions. So what a file claims is compared with this machine's memory before it is decoded. Text and bytes
stay a dictionary, which holds each value once, until the length of what they stand for is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError

VALUE_BYTES = 8  # of a number in memory; text takes more
MAX_CELL_BYTES = 64_000_000  # of one text or image
BATCH_SHARE = 1 / 4  # of the memory, that one batch may take
TABLE_SHARE = 1 / 2  # of the memory, that a whole table may take


def memory_bytes() -> int:
    """Size of this machine's memory."""
    return int(psutil.virtual_memory().total)


@contextmanager
def open_parquet(source: Path | pa.Buffer, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose text columns are read as dictionaries; pass it to :func:`bounded_batches`.

    Raises:
        UserError: it claims more rows than this machine's memory can hold; ``name`` begins the message.
        pa.ArrowException, OSError: it cannot be read.
    """
    with pq.ParquetFile(_opened(source)) as file:
        schema, rows = file.schema, file.metadata.num_rows
        leaves = [schema.column(i) for i in range(len(schema))]
        paths = [
            c.path for c in leaves if c.physical_type == "BYTE_ARRAY" and c.logical_type.type in ("STRING", "NONE")
        ]
    if rows * VALUE_BYTES > TABLE_SHARE * memory_bytes():
        raise UserError(
            f"{name} claims {rows:,} rows, more than this machine's memory can hold ({memory_bytes():,} bytes); is it "
            "what you think it is?"
        )
    with pq.ParquetFile(_opened(source), read_dictionary=paths) as file:
        yield file


def column_types(file: pq.ParquetFile) -> dict[str, pa.DataType]:
    """Types of the columns of a file of :func:`open_parquet`, as :func:`bounded_batches` gives them."""
    return {field.name: _without_dictionary(field.type) for field in file.schema_arrow}


def bounded_batches(
    file: pq.ParquetFile, columns: Sequence[str], rows_at_once: int, name: str, use_threads: bool = True
) -> Iterator[pa.Table]:
    """``columns`` of a file of :func:`open_parquet`, at most ``rows_at_once`` rows at a time; text is ``large_string``.

    Raises:
        UserError: rows that would take more memory than this machine has for a batch, or a text or image that is longer
            than :data:`MAX_CELL_BYTES`; ``name`` begins the message.
        pa.ArrowException, OSError: it cannot be read.
    """
    limit = int(BATCH_SHARE * memory_bytes())
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        values = max((c.num_values for c in chunks if c.path_in_schema.split(".")[0] in columns), default=0)
        if values * VALUE_BYTES > limit:
            raise UserError(f"{name} claims {values:,} values in its row group {number}; {_TOO_MUCH}")
    for batch in file.iter_batches(rows_at_once, columns=list(columns), use_threads=use_threads):
        num_bytes = batch.nbytes
        for column in batch.columns:
            longest, total = _text_bytes(column)
            num_bytes += total
            if longest > MAX_CELL_BYTES:
                raise UserError(f"{name} holds a value of {longest:,} bytes; expected at most {MAX_CELL_BYTES:,}")
        if num_bytes > limit:
            raise UserError(f"{name} has {len(batch):,} rows that unpack to {num_bytes:,} bytes; {_TOO_MUCH}")
        table = pa.Table.from_batches([batch])
        yield table.cast(pa.schema([(field.name, _without_dictionary(field.type)) for field in table.schema]))


def bounded_table(batches: Iterable[pa.Table], name: str) -> pa.Table:
    """All batches together.

    Raises:
        UserError: they take more than this machine's memory can hold; ``name`` begins the message.
    """
    kept, num_bytes = [], 0
    for batch in batches:
        kept.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > TABLE_SHARE * memory_bytes():
            raise UserError(f"{name} unpacks to more than {num_bytes:,} bytes; {_TOO_MUCH}")
    return pa.concat_tables(kept)


_TOO_MUCH = "that is more than this machine's memory can hold at once; is the file what you think it is?"


def _opened(source: Path | pa.Buffer) -> Path | pa.BufferReader:
    return source if isinstance(source, Path) else pa.BufferReader(source)


def _text_bytes(column: pa.Array) -> tuple[int, int]:
    """Length of the longest text in a column's dictionary, and of all texts that the column stands for."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    if not (pa.types.is_dictionary(column.type) and _is_text(column.type.value_type)) or not len(column.dictionary):
        return 0, 0
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return pc.max(lengths).as_py() or 0, pc.sum(lengths.take(column.indices)).as_py() or 0


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string))


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_without_dictionary(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_without_dictionary(kind.value_type))
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return pa.large_binary() if pa.types.is_binary(kind.value_type) else pa.large_string()
    return kind
