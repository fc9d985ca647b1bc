"""Whether features tell the items of a store apart: those that all items share give figures of 0, not an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.feature_scale import FeatureParts, block_parts
from fmrl_dist.data.item_table import ItemTable, feature_dims
from fmrl_dist.data.store.reader import Store

COMPARED_AT_ONCE = 4096  # items; nearly always, these are all that is read
SAMPLED_BLOCKS = 4  # of the items of an inline store


def check_items_differ(store: Store, features: Sequence[str] | None, table: ItemTable | None) -> None:
    """Refuse features that are the same for all items; for a model without an id table.

    Args:
        store: to train or evaluate on.
        features: that the model reads; None for all of the store's.
        table: these features of all items, read up to the first item that differs; None: a sample of the item blocks.

    Raises:
        UserError: no item differs from the first one.
    """
    parts: Iterable[FeatureParts]
    if table is not None:
        names, begins = list(table.dims), range(0, len(table.values), COMPARED_AT_ONCE)
        parts = ((table.values[i : i + COMPARED_AT_ONCE], table.present[i : i + COMPARED_AT_ONCE]) for i in begins)
    else:
        dims, items = feature_dims(store, features), store.manifest.items
        numbers = np.unique(np.linspace(0, len(items) - 1, SAMPLED_BLOCKS).astype(int))
        names, parts = list(dims), block_parts(store, [items[number] for number in numbers], dims)
    first: FeatureParts | None = None
    for values, present in parts:
        first = first or (values[0], present[0])
        if not (torch.equal(values, first[0].expand_as(values)) and torch.equal(present, first[1].expand_as(present))):
            return
    raise UserError(
        f"all items of store {store.location} have the same features ({', '.join(names)}), and the model has no id "
        "table: nothing tells items apart; turn model.id_table on, or build the store with features that differ"
    )
