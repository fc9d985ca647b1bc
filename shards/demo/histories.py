"""The demo's histories: a Markov chain over the items.

The weight of the next item is a product of

* a category transition: the next leaf in its group (kettle, teapot, infuser, …), or one of two companion leaves from
  anywhere;
* a step on the wheel of hues: the previous item's hue or, more often, the next one, which makes the order matter;
* the user's taste for a tier and for a motif, which drifts: from time to time it is drawn anew;
* the item's popularity, mildly long-tailed, so that most items have too few events to be learnt by their id alone.

No item occurs twice in a history. Each factor adds to the logarithm of the weight, as in a softmax over dot products of
a state with item embeddings: a small model can learn it. The 3,000 histories over 2,000 items take about three seconds
on one core.

Shapes: U users, V items, L leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.demo.catalogue import (
    LEAVES_PER_DEPARTMENT,
    LEAVES_PER_GROUP,
    MOTIFS,
    NUM_HUES,
    NUM_LEAVES,
    NUM_TIERS,
    Attributes,
)

# Weights of the next item, relative to an unrelated leaf, hue, tier or motif (1).
DEPARTMENT_WEIGHT, SAME_LEAF_WEIGHT, COMPANION_WEIGHT, SUCCESSOR_WEIGHT = 2.0, 8.0, 40.0, 80.0
NUM_COMPANIONS = 2
SAME_HUE_WEIGHT, NEXT_HUE_WEIGHT = 10.0, 40.0
TIER_WEIGHT, MOTIF_WEIGHT = 6.0, 3.0
TASTE_DRIFT = 0.06  # probability per event that a taste is drawn anew

MIN_EVENTS, MAX_EVENTS, MEAN_EXTRA_EVENTS = 5, 40, 6.5
FIRST_TIME_S, START_SPAN_S, MEAN_GAP_S = 1_600_000_000, 365 * 86_400, 5 * 86_400
USERS_AT_ONCE = 512  # bounds the [users, V] weights in memory

SEQUENCE_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("timestamps", pa.list_(pa.int64()))]
)


@dataclass(frozen=True)
class DemoHistories:
    """Whole histories, oldest event first; one array per user."""

    items: list[NDArray[np.int64]]  # rows of the item table
    times: list[NDArray[np.int64]]  # Unix seconds, increasing


def leaf_transitions(seed: int) -> NDArray[np.float64]:
    """Weights [L, L] of the leaf of the next item, given the leaf of the last one."""
    leaf = np.arange(NUM_LEAVES)
    place = leaf % LEAVES_PER_GROUP
    successor = leaf - place + (place + 1) % LEAVES_PER_GROUP
    rng = np.random.default_rng([seed, 1])
    companions = [rng.permutation(NUM_LEAVES) for _ in range(NUM_COMPANIONS)]
    department = leaf // LEAVES_PER_DEPARTMENT
    weights = np.where(department[:, None] == department, DEPARTMENT_WEIGHT, 1.0)
    weights[leaf, leaf] = SAME_LEAF_WEIGHT
    for companion in companions:
        weights[leaf, companion] = COMPANION_WEIGHT
    weights[leaf, successor] = SUCCESSOR_WEIGHT
    return weights


def hue_transitions() -> NDArray[np.float64]:
    """Weights [hues, hues] of the hue of the next item, given the hue of the last one."""
    identity = np.eye(NUM_HUES)
    return 1.0 + (SAME_HUE_WEIGHT - 1) * identity + (NEXT_HUE_WEIGHT - 1) * np.roll(identity, 1, axis=1)


def make_histories(attributes: Attributes, users: int, seed: int) -> DemoHistories:
    """Draw ``users`` histories of 5 to 40 items (mean about 11), never more than half of the catalogue."""
    rng = np.random.default_rng([seed, 2])
    longest = min(MAX_EVENTS, len(attributes.leaf) // 2)
    lengths = np.minimum(MIN_EVENTS + rng.exponential(MEAN_EXTRA_EVENTS, size=users).astype(np.int64), longest)
    transitions = leaf_transitions(seed)
    items: list[NDArray[np.int64]] = []
    for first in range(0, users, USERS_AT_ONCE):
        items += _draw_items(attributes, transitions, lengths[first : first + USERS_AT_ONCE], rng)
    gaps = [rng.exponential(MEAN_GAP_S, size=n).astype(np.int64) + 1 for n in lengths]
    starts = FIRST_TIME_S + rng.integers(START_SPAN_S, size=users)
    return DemoHistories(items, [start + np.cumsum(gap) for start, gap in zip(starts, gaps, strict=True)])


def _draw_items(
    attributes: Attributes, transitions: NDArray[np.float64], lengths: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Draw all histories of one group of users side by side, one event at a time."""
    by_leaf = transitions[:, attributes.leaf].astype(np.float32)  # [L, V]: weights by the last item's leaf
    by_hue = hue_transitions()[:, attributes.hue].astype(np.float32)
    by_tier = np.where(np.arange(NUM_TIERS)[:, None] == attributes.tier, TIER_WEIGHT, 1.0).astype(np.float32)
    by_motif = np.where(np.arange(len(MOTIFS))[:, None] == attributes.motif, MOTIF_WEIGHT, 1.0).astype(np.float32)
    unseen = np.tile(attributes.popularity.astype(np.float32), (len(lengths), 1))  # [U, V], 0 where seen
    tier = rng.integers(NUM_TIERS, size=len(lengths))
    motif = rng.integers(len(MOTIFS), size=len(lengths))
    drawn = np.zeros((len(lengths), lengths.max()), np.int64)
    for event in range(lengths.max()):
        active = np.flatnonzero(lengths > event)
        weights = unseen[active] * by_tier[tier[active]] * by_motif[motif[active]]
        if event > 0:
            last = drawn[active, event - 1]
            weights *= by_leaf[attributes.leaf[last]]
            weights *= by_hue[attributes.hue[last]]
        # The largest of weight / Exp(1) is a draw in proportion to the weights (exponential race).
        arrivals = np.maximum(rng.standard_exponential(weights.shape, np.float32), 1e-12)  # float32 draws can be 0
        drawn[active, event] = (weights / arrivals).argmax(axis=1)
        unseen[active, drawn[active, event]] = 0
        tier = np.where(rng.random(len(tier)) < TASTE_DRIFT, rng.integers(NUM_TIERS, size=len(tier)), tier)
        motif = np.where(rng.random(len(motif)) < TASTE_DRIFT, rng.integers(len(MOTIFS), size=len(motif)), motif)
    return [row[:length] for row, length in zip(drawn, lengths, strict=True)]


def sequence_table(histories: DemoHistories, ids: list[str]) -> pa.Table:
    """``user_id, item_ids, timestamps``, one row per user, oldest event first."""
    users = [f"user-{row:06d}" for row in range(len(histories.items))]
    item_ids = [[ids[row] for row in rows.tolist()] for rows in histories.items]
    times = [time.tolist() for time in histories.times]
    return pa.table({"user_id": users, "item_ids": item_ids, "timestamps": times}, schema=SEQUENCE_SCHEMA)
