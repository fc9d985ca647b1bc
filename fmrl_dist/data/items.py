"""The item table: every item's frozen features in one matrix, from the store's item shards.

V items, F features' total dim, M features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.data.store import Store
from fmrl_dist.errors import UserError


@dataclass(frozen=True)
class ItemTable:
    """Features of the whole catalogue."""

    dims: Mapping[str, int]  # feature → dim, in the order of the columns
    values: Tensor  # float16 [V, F]; absent features are zero
    present: Tensor  # bool [V, M]


def load_item_table(store: Store, features: Sequence[str] | None) -> ItemTable:
    """Unpack the item shards.

    Args:
        store: an open store.
        features: names to take, in this order; None takes all of the store's.

    Raises:
        UserError: a feature is not in the store, or a shard is damaged.
    """
    known = {feature.name: feature.dim for feature in store.manifest.features}
    names = list(known) if features is None else list(features)
    for name in names:
        if name not in known:
            raise UserError(
                f"model.features names {name!r}; the store {store.location} has: {', '.join(known) or 'none'}"
            )
    num_items = store.manifest.num_items
    values = np.zeros((num_items, sum(known[name] for name in names)), dtype=np.float16)
    present = np.zeros((num_items, len(names)), dtype=np.bool_)
    for block in store.manifest.items:
        arrays = store.read_block(block)
        ids = arrays["ids"]
        if names:
            values[ids] = np.concatenate([arrays[name] for name in names], 1)
            present[ids] = np.stack([arrays.get(f"{name}.mask", np.ones(len(ids), np.bool_)) for name in names], 1)
    return ItemTable({name: known[name] for name in names}, torch.from_numpy(values), torch.from_numpy(present))


def feature_affine(table: ItemTable, scale: str | float) -> tuple[Tensor, Tensor]:
    """Shift [F] and scale [F] with which a feature enters the model as (x - shift)·scale, from present rows only.

    Args:
        table: the catalogue.
        scale: "none"; a number, by which every feature is multiplied; or "standardize": each dimension's mean is
            taken off and each feature divided by one number, so that its mean variance is 1.
    """
    total = table.values.shape[1]
    shift, factor = torch.zeros(total), torch.ones(total)
    if isinstance(scale, float):
        return shift, factor * scale
    if scale == "standardize":
        begin = 0
        for column, dim in enumerate(table.dims.values()):
            rows = table.values[table.present[:, column], begin : begin + dim].float()
            if len(rows) > 1:
                shift[begin : begin + dim] = rows.mean(0)
                factor[begin : begin + dim] = rows.var(0).mean().clamp_min(1e-12).rsqrt()
            begin += dim
    return shift, factor
