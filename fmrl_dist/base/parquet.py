"""Parquet of unknown origin, read in pieces whose size is known before they are made.

On disk, a run or a repeated value costs nothing: a file of some kilobytes can claim billions of rows, or one long text
in each of millions. So what a file claims is compared with this machine's memory before it is decoded, and the longest
value of a row group's dictionary says how many rows are decoded at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError, require

VALUE_BYTES = 8  # of a number in memory
MAX_CELL_BYTES = 64_000_000  # of one text or image
MAX_BATCH_BYTES = 1 << 30  # pyarrow's text ends at 2 GiB
BATCH_SHARE, TABLE_SHARE = 1 / 4, 1 / 2  # of the memory, that one batch or row, and a whole table, may take
STREAMED: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}  # hold no whole row group in memory


def memory_bytes() -> int:
    """Size of this machine's memory."""
    return int(psutil.virtual_memory().total)


class BoundedParquet:
    """An open Parquet file; :func:`open_parquet` makes one.

    Args:
        source: where it is.
        file: open.
        name: begins messages.
    """

    def __init__(self, source: Path | pa.Buffer, file: pq.ParquetFile, name: str) -> None:
        self._source, self._file, self._name = source, file, name
        self.num_rows = int(file.metadata.num_rows)
        self.types = {field.name: _plain(field.type) for field in file.schema_arrow}  # of the columns
        self.names: list[str] = list(file.schema_arrow.names)

    @property
    def group_rows(self) -> list[int]:
        """Number of rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(
        self,
        columns: Sequence[str],
        rows_at_once: int,
        use_threads: bool = True,
        groups: Sequence[int] | None = None,
    ) -> Iterator[pa.Table]:
        """``columns``, at most ``rows_at_once`` rows at a time, of all row groups or of some.

        Raises:
            UserError: values that this machine's memory cannot hold, or longer than :data:`MAX_CELL_BYTES`.
            pa.ArrowException, OSError: it cannot be read.
        """
        schema = pa.schema([(column, self.types[column]) for column in columns])
        for group in range(self._file.num_row_groups) if groups is None else groups:
            rows = min(rows_at_once, self._rows_that_fit(group, columns))
            for batch in self._file.iter_batches(
                rows, row_groups=[group], columns=list(columns), use_threads=use_threads
            ):
                batch.validate(full=True)  # Parquet promises neither UTF-8 nor lists that lie within their values
                found = [_with_text_of_uuids(batch.column(column)) for column in columns]
                table = pa.table(found, names=list(columns)).cast(schema)
                for column in table.columns:
                    self._check_longest(_longest(column))
                yield table

    def _rows_that_fit(self, group: int, columns: Sequence[str]) -> int:
        """How many rows of a row group can be decoded at once, whatever its dictionaries stand for."""
        metadata, rows = self._file.metadata.row_group(group), self._file.metadata.row_group(group).num_rows
        limit = int(BATCH_SHARE * memory_bytes())
        fit = max(rows, 1)
        for leaf in map(metadata.column, range(metadata.num_columns)):
            if leaf.path_in_schema.split(".")[0] not in columns or not rows:
                continue
            longest = self._longest_in_dictionary(group, leaf)
            self._check_longest(longest)
            value_bytes = max(longest, VALUE_BYTES)
            if "." in leaf.path_in_schema and leaf.num_values * value_bytes > limit:  # one row may hold them all
                raise UserError(
                    f"{self._name} claims {leaf.num_values:,} values of {value_bytes:,} bytes in lists of "
                    f"{leaf.path_in_schema.split('.')[0]!r}; {TOO_MUCH}"
                )
            row_bytes = max(value_bytes * leaf.num_values / rows, leaf.total_uncompressed_size / rows)
            fit = min(fit, int(min(limit, MAX_BATCH_BYTES) / row_bytes))
        return max(fit, 1)

    def _longest_in_dictionary(self, group: int, leaf: pq.ColumnChunkMetaData) -> int:
        """Length in bytes of the longest text that a column's dictionary holds; 0 if it has none."""
        if leaf.physical_type != "BYTE_ARRAY" or not leaf.has_dictionary_page:
            return 0
        rows, last, column = 1, self._file.metadata.row_group(group).num_rows, leaf.path_in_schema.split(".")[0]
        while True:  # the dictionary comes with the first value, which may be behind many rows without one
            with pq.ParquetFile(_opened(self._source), read_dictionary=[leaf.path_in_schema], **STREAMED) as file:
                batch = next(file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False))
            values = _flat(batch.column(0))
            if not pa.types.is_dictionary(values.type):
                return 0
            if len(values.dictionary) or rows >= last:
                return _longest(values.dictionary)
            rows *= 16

    def _check_longest(self, num_bytes: int) -> None:
        require(
            num_bytes <= MAX_CELL_BYTES,
            f"{self._name} holds a value of {num_bytes:,} bytes; expected at most {MAX_CELL_BYTES:,}",
        )


@contextmanager
def open_parquet(source: Path | pa.Buffer, name: str) -> Iterator[BoundedParquet]:
    """A Parquet file that claims no more rows than this machine's memory can hold; ``name`` begins messages.

    Raises:
        UserError: it claims more.
        pa.ArrowException, OSError: it cannot be read.
    """
    with pq.ParquetFile(_opened(source), **STREAMED) as file:
        opened = BoundedParquet(source, file, name)
        require(
            opened.num_rows * VALUE_BYTES <= TABLE_SHARE * memory_bytes(),
            f"{name} claims {opened.num_rows:,} rows; {TOO_MUCH}",
        )
        yield opened


def bounded_table(batches: Iterable[pa.Table], name: str) -> pa.Table:
    """All batches together.

    Raises:
        UserError: they take more than this machine's memory can hold; ``name`` begins the message.
    """
    kept, num_bytes = [], 0
    for batch in batches:
        kept.append(batch)
        num_bytes += batch.nbytes
        require(
            num_bytes <= TABLE_SHARE * memory_bytes(), f"{name} unpacks to more than {num_bytes:,} bytes; {TOO_MUCH}"
        )
    return pa.concat_tables(kept)


TOO_MUCH = "this machine's memory cannot hold that; is the file what you think it is?"


def _opened(source: Path | pa.Buffer) -> Path | pa.BufferReader:
    return source if isinstance(source, Path) else pa.BufferReader(source)


def _flat(column: pa.Array) -> pa.Array:
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten() if isinstance(column, pa.Array) else pc.list_flatten(column)
    return column


def _longest(column: pa.Array | pa.ChunkedArray) -> int:
    """Length in bytes of the longest text in a column, or in its lists; 0 for numbers."""
    values = _flat(column)
    return (pc.max(pc.binary_length(values)).as_py() or 0) if _is_text(values.type) else 0


def _is_text(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(kind) for is_kind in kinds)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type that values of a type are given in, which Arrow's functions know: categories and views of text are text,
    as are UUIDs."""
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type) if _is_text(_plain(kind.value_type)) else kind
    if isinstance(kind, pa.BaseExtensionType) and not _is_uuid(kind):  # such as JSON
        return _plain(kind.storage_type) if _is_text(_plain(kind.storage_type)) else kind
    if pa.types.is_string_view(kind) or _is_uuid(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


def _with_text_of_uuids(column: pa.Array) -> pa.Array:
    """UUIDs, or those in lists or structures, as text: 36 characters, in hexadecimal."""
    kind = column.type
    if _is_uuid(kind):
        return _uuid_text(column.storage)
    if pa.types.is_struct(kind) and _plain(kind) != kind:
        fields = [_with_text_of_uuids(field) for field in column.flatten()]
        return pa.StructArray.from_arrays(fields, names=[field.name for field in kind], mask=column.is_null())
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or _plain(kind) == kind:
        return column
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    starts = pa.array(np.concatenate(([0], np.cumsum(lengths))))
    return pa.LargeListArray.from_arrays(starts, _with_text_of_uuids(column.flatten()), mask=column.is_null())


def _uuid_text(column: pa.FixedSizeBinaryArray) -> pa.Array:
    data = np.frombuffer(column.buffers()[1] or b"", np.uint8)[16 * column.offset :][: 16 * len(column)]
    digits = np.frombuffer(data.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    text = np.full((len(digits), 36), ord("-"), np.uint8)
    text[:, [place for place in range(36) if place not in (8, 13, 18, 23)]] = digits
    ends = pa.py_buffer(np.arange(0, 36 * len(digits) + 1, 36, dtype=np.int64))
    return pc.if_else(column.is_valid(), pa.LargeStringArray.from_buffers(len(digits), ends, pa.py_buffer(text)), None)
