"""Ids for items that training has not seen: each borrows that of the trained item whose features are most like its own.

Beside items with learned ids, features alone do not win: an id also says how much an item is wanted at all. "Like" is
the cosine of what features alone give, before ids are added. Not all of the id is borrowed: with the whole of it, other
users would lose more by new items, at small sizes, than those who want them gain.

n new items, V of the id table, D width, w of the table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.model.nested import add_prefix

SHARE = 0.8  # of an id that is borrowed: as many users' next items are then found as without new items' ids
NEW_AT_ONCE, KNOWN_AT_ONCE = 1024, 16_384  # whose cosines are in memory


@torch.no_grad()
def borrowed_ids(of_features: Tensor, id_table: Tensor, items: Tensor) -> Tensor:
    """``SHARE`` of a row of the id table for each new item.

    A row of zeros is of an item that training has not seen: nobody borrows it. Of equally near ones the first lends.

    Args:
        of_features: new items' embeddings without ids, float32 [n, D].
        id_table: float32 [V, w], w ≤ D.
        items: embeddings of the table's items, ids added, float32 [V, D].

    Returns:
        float32 [n, w]; zeros if no item has been trained.
    """
    borrowed = [id_table.new_zeros(0, id_table.shape[1])]
    for some in F.normalize(of_features).split(NEW_AT_ONCE):
        nearest = torch.full((len(some),), -torch.inf)
        rows = id_table.new_zeros(len(some), id_table.shape[1])
        for ids, known in zip(id_table.split(KNOWN_AT_ONCE), items.split(KNOWN_AT_ONCE), strict=True):
            is_trained = ids.any(1)
            if not is_trained.any():
                continue
            trained = ids[is_trained]
            cosine, place = (some @ F.normalize(add_prefix(known[is_trained], -trained)).T).max(1)
            is_nearer = cosine > nearest
            nearest[is_nearer], rows[is_nearer] = cosine[is_nearer], trained[place[is_nearer]]
        borrowed.append(rows)
    return torch.cat(borrowed) * SHARE
