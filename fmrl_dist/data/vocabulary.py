"""Which items a store's rows are: items are their external ids, not their rows.

A store that is built again can hold the same items in another order, or others. Whatever pairs a model with a store
compares the ids first. V items.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.data.store.tables import table_batches

SHOWN = 3  # unknown ids in a message


def external_ids(vocabulary: bytes, where: str) -> pa.Array:
    """External ids of a ``vocab.parquet``, in the order of the rows, as text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        table = bounded_table(table_batches(vocabulary, where, ["external_id"]), where)
        ids = pc.cast(table.column("external_id"), pa.large_string())  # pa.string() ends at 2 GiB
        return ids.combine_chunks()
    except (OSError, pa.ArrowException, LookupError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"the vocabulary {where} cannot be read ({problem}); build the store again") from None


def rows_of(wanted: pa.Array, known: pa.Array, wanted_by: str, known_to: str) -> np.ndarray | None:
    """Where each wanted item stands among the known ones, int64 [V]; None if all stand in the same rows.

    Raises:
        UserError: an item is not known.
    """
    if wanted.equals(known):
        return None
    rows = pc.index_in(wanted, value_set=known)
    unknown = wanted.filter(pc.is_null(rows))
    require(
        len(unknown) == 0,
        f"{wanted_by} has {len(unknown):,} items that {known_to} does not know, such as "
        f"{', '.join(map(repr, unknown[:SHOWN].to_pylist()))}; use the store that it belongs to",
    )
    return rows.to_numpy(zero_copy_only=False).astype(np.int64)
