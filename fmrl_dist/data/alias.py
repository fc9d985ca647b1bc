"""Walker's alias table: draws from any distribution over V items in constant time, from a table that may stay on disk.

A draw takes a row at random and keeps it with the row's threshold, else takes the row's alias. The usual construction
pairs rows one by one; here the rows below the mean stand on one line with their deficits, those above it on another
with their excesses, and two searches in the prefix sums pair them all: 10 million rows take seconds.
"""

from __future__ import annotations

import numpy as np

ROW = np.dtype([("threshold", np.float32), ("alias", np.int32), ("log_share", np.float32)])


def alias_table(weights: np.ndarray) -> np.ndarray:
    """The table of a distribution.

    Args:
        weights: [V], positive, not normalised.

    Returns:
        Rows of dtype ``ROW`` [V]; ``log_share`` is the logarithm of each item's probability.
    """
    shares = weights / weights.sum(dtype=np.float64)
    scaled = shares * len(weights)
    table = np.empty(len(weights), ROW)
    table["threshold"], table["alias"] = 1, np.arange(len(weights))
    table["log_share"] = np.log(shares)
    mean = min(1.0, scaled.max())  # 1, but where weights are equal and rounding leaves all of them just below it
    below, above = np.flatnonzero(scaled < mean), np.flatnonzero(scaled >= mean)
    deficits, excesses = np.cumsum(1 - scaled[below]), np.cumsum(np.maximum(scaled[above] - 1, 0))
    # Row k below the mean is filled by the first row above it that has not yet given all of its excess away.
    given_before = np.concatenate(([0.0], deficits[:-1]))[: len(below)]
    fills = np.minimum(np.searchsorted(excesses, given_before), len(above) - 1)
    table["threshold"][below], table["alias"][below] = scaled[below], above[fills]
    # A row above the mean gives more than its excess to the last one it fills, and is filled up by the next above.
    last = np.searchsorted(deficits, excesses, side="right")
    overdrawn = np.flatnonzero(last[:-1] < len(deficits))
    table["threshold"][above[overdrawn]] = 1 - np.minimum(deficits[last[overdrawn]] - excesses[overdrawn], 1)
    table["alias"][above[overdrawn]] = above[overdrawn + 1]
    return table


def draw(table: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """``count`` items, int64, with repetition; reads that many rows of ``table``."""
    rows = generator.integers(len(table), size=count)
    drawn = table[rows]
    return np.where(generator.random(count, np.float32) < drawn["threshold"], rows, drawn["alias"]).astype(np.int64)
