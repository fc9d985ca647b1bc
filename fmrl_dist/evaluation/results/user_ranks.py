"""Every user's target rank in a Parquet file, so that runs can be compared user by user.

Columns: ``user`` (external id, as text), ``history`` (events before the target), ``target`` (the item's external id, as
text), and for each size M ``rank@M`` and ``masked_rank@M``: the target's rank among all items, and among those that the
user has not seen; infinity if the model gave no score. ``vectors-M`` in place of M is of vectors cut to M. Rows are in
the order of the store's users.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import write_atomically
from fmrl_dist.data.store.manifest import USERS_FILE, VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.vocabulary import external_ids
from fmrl_dist.evaluation.rank_counts import RankedUsers
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

ORIGIN = b"fmrl_dist"  # key of the file's metadata
VECTORS = "vectors-"
PREFIXES = {ALL: "rank@", UNSEEN: "masked_rank@"}


def row_names(sizes: Iterable[object], vector_sizes: Iterable[object]) -> list[str]:
    """Names of an evaluation's rows: its sizes (or baselines), then its cut vectors."""
    return [*map(str, sizes), *(f"{VECTORS}{size}" for size in vector_sizes)]


@dataclass(frozen=True)
class UserRanks:
    """The content of such a file: n users."""

    users: pa.Array  # external ids, text [n]
    targets: pa.Array  # external ids, text [n]
    lengths: np.ndarray  # int64 [n]
    ranks: Mapping[tuple[int, str], np.ndarray]  # (ALL or UNSEEN, name of the row) → float64 [n]
    origin: Mapping[str, Any]


def write_user_ranks(
    path: Path, ranked: RankedUsers, names: Sequence[object], store: Store, origin: Mapping[str, Any]
) -> None:
    """Write the file.

    Args:
        path: of the file.
        ranked: users, sorted; ranks [2, S, n].
        names: of the S sizes, cut vectors or baselines.
        store: whose users they are.
        origin: what model and store the ranks are of.
    """
    columns = {
        "user": external_ids(store.read_table(USERS_FILE), USERS_FILE).take(pa.array(ranked.users.numpy())),
        "history": pa.array(ranked.lengths.numpy()),
        "target": external_ids(store.read_table(VOCAB_FILE), VOCAB_FILE).take(pa.array(ranked.targets.numpy())),
    }
    for which, prefix in PREFIXES.items():
        for name, ranks in zip(names, ranked.ranks[which], strict=True):
            columns[f"{prefix}{name}"] = pa.array(ranks.numpy())
    table = pa.table(columns).replace_schema_metadata({ORIGIN: json.dumps(dict(origin))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue())


def read_user_ranks(path: Path) -> UserRanks:
    """Read the file.

    Raises:
        UserError: it is missing or is no such file.
    """
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()), use_threads=False)
        ranks = {
            (which, name.removeprefix(prefix)): table.column(name).to_numpy()
            for which, prefix in PREFIXES.items()
            for name in table.column_names
            if name.startswith(prefix)
        }
        users, targets = (table.column(name).combine_chunks() for name in ("user", "target"))
        origin = json.loads(table.schema.metadata[ORIGIN])
        return UserRanks(users, targets, table.column("history").to_numpy(), ranks, origin)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write it with python -m fmrl_dist.evaluate --per-user") from None
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({problem}); evaluate again") from None
