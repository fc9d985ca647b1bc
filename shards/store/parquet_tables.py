"""The two Parquet tables of a store, the vocabulary and the users, and the digest of their rows."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa

ROWS_AT_ONCE = 65_536


def vocab_table(external_ids: pa.Array, train_count: np.ndarray, titles: pa.ChunkedArray | None) -> pa.Table:
    """``item, external_id, train_count`` and, if there are titles, ``title``; row = internal id."""
    columns = {"item": np.arange(len(external_ids)), "external_id": external_ids, "train_count": train_count}
    if titles is not None:
        columns["title"] = titles.cast(pa.large_string())
    return pa.table(columns)


def users_table(external_ids: pa.Array) -> pa.Table:
    """``user, external_id``; row = internal id."""
    return pa.table({"user": np.arange(len(external_ids)), "external_id": external_ids})


def rows_sha256(table: pa.Table) -> str:
    """Digest of a table's column names and rows. It does not depend on the program that wrote the file."""
    digest = hashlib.sha256(json.dumps(table.column_names).encode())
    for batch in table.to_batches(ROWS_AT_ONCE):
        columns = [column.to_pylist() for column in batch.columns]
        digest.update("".join(json.dumps(row) + "\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()
