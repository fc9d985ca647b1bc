"""Inline features: those of the items that one batch, or one tile of the catalogue, needs.

F features' total dim, M features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ItemRows:
    """Features of ``n`` items."""

    ids: np.ndarray  # int64 [n], sorted, distinct
    values: np.ndarray  # float16 [n, F]; absent features are zero
    present: np.ndarray  # bool [n, M]


def block_rows(arrays: Mapping[str, np.ndarray], ids_field: str, dims: Mapping[str, int]) -> ItemRows:
    """The items of a block, sorted.

    Args:
        arrays: the block's.
        ids_field: the array of item ids: ``ids`` in an item block, ``block_items`` in an inline user block.
        dims: feature → dim, in the order of the columns.
    """
    ids = arrays[ids_field]
    order = np.argsort(ids)
    values, present = np.empty((len(ids), sum(dims.values())), np.float16), np.ones((len(ids), len(dims)), np.bool_)
    begin = 0
    for column, (name, dim) in enumerate(dims.items()):
        values[:, begin : begin + dim] = arrays[name][order]
        if f"{name}.mask" in arrays:
            present[:, column] = arrays[f"{name}.mask"][order]
        begin += dim
    return ItemRows(ids[order], values, present)


def merge(sources: Sequence[ItemRows], dims: Mapping[str, int]) -> ItemRows:
    """All items of several sources, without duplicates."""
    all_ids = np.concatenate([np.empty(0, np.int64), *(source.ids for source in sources)])
    ids, first = np.unique(all_ids, return_index=True)
    merged, base = _empty(ids, dims), 0
    for source in sources:
        mine = np.flatnonzero((first >= base) & (first < base + len(source.ids)))
        merged.values[mine], merged.present[mine] = (
            source.values[first[mine] - base],
            source.present[first[mine] - base],
        )
        base += len(source.ids)
    return merged


def pick(ids: np.ndarray, sources: Sequence[ItemRows], dims: Mapping[str, int]) -> ItemRows:
    """The items ``ids`` (sorted, distinct); each must be in some source."""
    picked, found = _empty(ids, dims), np.zeros(len(ids), np.bool_)
    for source in sources:
        if not len(source.ids):
            continue
        rows = np.searchsorted(source.ids, ids).clip(max=len(source.ids) - 1)
        here = np.flatnonzero(source.ids[rows] == ids)
        picked.values[here], picked.present[here], found[here] = (
            source.values[rows[here]],
            source.present[rows[here]],
            1,
        )
    assert found.all(), "every block is checked to contain the features of all its items"
    return picked


def _empty(ids: np.ndarray, dims: Mapping[str, int]) -> ItemRows:
    shape = len(ids), sum(dims.values())
    return ItemRows(ids, np.empty(shape, np.float16), np.empty((len(ids), len(dims)), np.bool_))
