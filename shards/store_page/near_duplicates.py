"""Items that an encoder can hardly tell apart: pairs whose feature rows have a cosine above :data:`NEAR`.

Every pair among at most :data:`MOST_ITEMS` items is compared, a tile of products at a time. Item blocks hold the
catalogue in a permuted order, so the items of the first blocks are a uniform sample of a larger one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fmrl_dist.base.progress import Progress
from fmrl_dist.data.store.manifest import Feature
from fmrl_dist.data.store.reader import Store

NEAR = 0.999  # float16 rows that are equal differ from a cosine of 1 by less than a tenth of what is left
MOST_ITEMS = 16_384
MOST_ROW_BYTES = 128 << 20  # of one feature's rows, float32
TILE_ROWS = 512
NUM_PAIRS_SHOWN = 10


@dataclass(frozen=True)
class NearDuplicates:
    """Near-duplicates of one feature."""

    feature: str
    num_compared: int  # items
    num_present: int  # items of the catalogue that have the feature
    num_pairs: int
    num_items: int  # that are in at least one pair
    examples: tuple[tuple[int, int, float], ...]  # two items and their cosine; no item twice

    @property
    def is_sample(self) -> bool:
        return self.num_compared < self.num_present


def near_duplicates(store: Store) -> list[NearDuplicates]:
    """For each feature of the store that holds vectors.

    Raises:
        UserError: a block is damaged.
    """
    features = [feature for feature in store.manifest.features if not feature.num_codes]
    limits = {one.name: min(MOST_ITEMS, one.present, MOST_ROW_BYTES // (4 * one.dim)) for one in features}
    rows = _item_rows(store, features, limits)
    progress = Progress("item", sum(limits.values()), name="near-duplicates")
    found = []
    for feature in features:
        ids, half = rows.pop(feature.name)
        found.append(_compare(feature, ids, half, progress))
    progress.close()
    return found


def _item_rows(
    store: Store, features: Sequence[Feature], limits: dict[str, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ids int64 [n] and rows float16 [n, dim] of the first ``limits`` items that have each feature."""
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in limits}
    missing = dict(limits)
    for arrays in store.read_each(store.manifest.items) if any(missing.values()) else ():
        if arrays is None:
            continue
        for name in kept:
            mask = arrays.get(f"{name}.mask")
            there = np.flatnonzero(mask) if mask is not None else np.arange(len(arrays["ids"]))
            there = there[: missing[name]]
            kept[name].append((arrays["ids"][there], arrays[name][there]))
            missing[name] -= len(there)
        if not any(missing.values()):
            break
    found = {}
    for one in features:
        ids, rows = [np.empty(0, np.int64)], [np.empty((0, one.dim), np.float16)]
        for part_ids, part_rows in kept[one.name]:
            ids.append(part_ids)
            rows.append(part_rows)
        found[one.name] = np.concatenate(ids), np.concatenate(rows)
    return found


def _compare(feature: Feature, ids: np.ndarray, half: np.ndarray, progress: Progress) -> NearDuplicates:
    rows = half.astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    num_pairs, is_near, shown = 0, np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    examples: list[tuple[int, int, float]] = []
    for low in range(0, len(rows), TILE_ROWS):
        tile = rows[low : low + TILE_ROWS]
        cosines = tile @ rows[low:].T  # [t, n - low]
        pairs = np.triu(cosines > NEAR, 1)  # each pair once, and none with itself
        num_pairs += int(np.count_nonzero(pairs))
        is_near[low : low + len(tile)] |= pairs.any(axis=1)
        is_near[low:] |= pairs.any(axis=0)
        for a, b in _some_pairs(pairs, shown[low:], NUM_PAIRS_SHOWN - len(examples)):
            examples.append((int(ids[low + a]), int(ids[low + b]), min(float(cosines[a, b]), 1.0)))
        progress.advance(len(tile))
    return NearDuplicates(feature.name, len(rows), feature.present, num_pairs, int(is_near.sum()), tuple(examples))


def _some_pairs(pairs: np.ndarray, shown: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """At most ``most`` pairs of a tile, none with an item that was ``shown``; marks theirs."""
    for a in np.flatnonzero(pairs.any(axis=1)).tolist() if most > 0 else ():
        partners = np.flatnonzero(pairs[a] & ~shown)
        if not shown[a] and len(partners):
            b = int(partners[0])
            shown[[a, b]] = True
            yield a, b
            most -= 1
            if not most:
                return
