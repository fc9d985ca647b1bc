"""The two Parquet tables of a store, vocabulary and users: the digest of their rows, checked when they are read."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError

ROWS_AT_ONCE = 65_536
MAX_CHECKED_ROWS = 2_000_000  # a larger table takes more than a few seconds: only shards.verify checks it


def rows_sha256(table: pa.Table) -> str:
    """Digest of a table's column names and rows. It does not depend on the program that wrote the file."""
    digest = hashlib.sha256(json.dumps(table.column_names).encode())
    for batch in table.to_batches(ROWS_AT_ONCE):
        columns = [column.to_pylist() for column in batch.columns]
        digest.update("".join(json.dumps(row) + "\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()


def checked_table(data: bytes, expected_sha256: str) -> bytes:
    """A table's file, if its rows are those that were written.

    Raises:
        UserError: it cannot be read, or holds other rows.
    """
    try:
        # Without threads: one that still holds these bytes as Python ends takes the process down (apache/arrow#34314).
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            if file.metadata.num_rows > MAX_CHECKED_ROWS:
                return data
            found = rows_sha256(file.read(use_threads=False))
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"cannot be read ({' '.join(str(error).split())[:200]}); build the store again") from None
    if found != expected_sha256:
        raise UserError("its rows are not those that were written; build the store again")
    return data
