"""Walker's alias table: draws from any distribution over V items in constant time, from a table that may stay on disk.

A draw picks a row at random, keeps it with probability ``threshold``, and otherwise returns the row's alias. The usual
construction pairs rows one by one. Here the deficits of the rows below the mean and the excesses of those above it are
summed cumulatively, and two searches in these prefix sums pair all rows: 10 million rows take seconds.
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
    mean = min(1.0, scaled.max())  # 1, unless weights are equal and rounding leaves all of them just below it
    below, above = np.flatnonzero(scaled < mean), np.flatnonzero(scaled >= mean)
    deficits, excesses = np.cumsum(1 - scaled[below]), np.cumsum(np.maximum(scaled[above] - 1, 0))
    # Row k below the mean is filled by the first row above it that still has excess left.
    given_before = np.concatenate(([0.0], deficits[:-1]))[: len(below)]
    fills = np.minimum(np.searchsorted(excesses, given_before), len(above) - 1)
    table["threshold"][below], table["alias"][below] = scaled[below], above[fills]
    # A row above the mean gives more than its excess to the last row it fills; the next row above the mean refills it.
    last = np.searchsorted(deficits, excesses, side="right")
    overdrawn = np.flatnonzero(last[:-1] < len(deficits))
    table["threshold"][above[overdrawn]] = 1 - np.minimum(deficits[last[overdrawn]] - excesses[overdrawn], 1)
    table["alias"][above[overdrawn]] = above[overdrawn + 1]
    return table


def draw(table: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """``count`` items, int64, with replacement; reads that many rows of ``table``."""
    rows = generator.integers(len(table), size=count)
    drawn = table[rows]
    return np.where(generator.random(count, np.float32) < drawn["threshold"], rows, drawn["alias"]).astype(np.int64)
