"""The two Parquet tables of a store, the vocabulary and the users."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def vocab_table(external_ids: pa.Array, train_count: np.ndarray, titles: pa.ChunkedArray | None) -> pa.Table:
    """``item, external_id, train_count`` and, if there are titles, ``title``; row = internal id."""
    columns = {"item": np.arange(len(external_ids)), "external_id": external_ids, "train_count": train_count}
    if titles is not None:
        columns["title"] = titles.cast(pa.large_string())
    return pa.table(columns)


def users_table(external_ids: pa.Array) -> pa.Table:
    """``user, external_id``; row = internal id."""
    return pa.table({"user": np.arange(len(external_ids)), "external_id": external_ids})
