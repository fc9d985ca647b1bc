"""The two Parquet tables of a store, vocabulary and users: the digest of their rows, checked when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.parquet import open_parquet

ROWS_AT_ONCE = 65_536
MAX_CHECKED_ROWS = 2_000_000  # the rows of a larger table take more than a few seconds: its file's hash is compared


def rows_sha256(batches: Iterable[pa.Table]) -> str:
    """Digest of a table's column names and rows. It does not depend on the program that wrote the file."""
    digest, names = hashlib.sha256(), None
    for table in batches:
        if names is None:
            names = table.column_names
            digest.update(json.dumps(names).encode())
        for batch in table.to_batches(ROWS_AT_ONCE):
            columns = [column.to_pylist() for column in batch.columns]
            digest.update("".join(json.dumps(row) + "\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()


def table_batches(data: bytes, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Rows of a table's file ``name``, within the memory of this machine.

    Threads of pyarrow are not used: one that still holds these bytes as Python ends takes the process down
    (apache/arrow#34314).

    Args:
        data: the file.
        name: of the file, for messages.
        columns: None for all.

    Raises:
        UserError: it claims more than the memory can hold.
        pa.ArrowException, OSError: it cannot be read.
    """
    with open_parquet(pa.py_buffer(data), name) as file:
        names = file.names if columns is None else list(columns)
        yield pa.schema([(column, file.types[column]) for column in names]).empty_table()
        yield from file.batches(names, ROWS_AT_ONCE, use_threads=False)


def checked_table(data: bytes, name: str, rows: str, file: str = "") -> bytes:
    """A table's file ``name``, if its rows are those that were written.

    Args:
        data: the file.
        name: for messages.
        rows: :func:`rows_sha256` of its rows.
        file: sha256 of the file, compared where there are more than :data:`MAX_CHECKED_ROWS`; "" if unknown.

    Raises:
        UserError: it cannot be read, or holds other rows.
    """
    try:
        with open_parquet(pa.py_buffer(data), name) as opened:
            is_large = opened.num_rows > MAX_CHECKED_ROWS
        if is_large:
            is_whole = not file or hashlib.sha256(data).hexdigest() == file
        else:
            is_whole = rows_sha256(table_batches(data, name)) == rows
    except UserError as error:
        raise UserError(f"{error}; build the store again") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError, LookupError) as error:
        raise UserError(f"cannot be read ({' '.join(str(error).split())[:200]}); build the store again") from None
    if not is_whole:
        raise UserError("its rows are not those that were written; build the store again")
    return data
