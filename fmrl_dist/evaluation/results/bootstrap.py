"""Paired bootstrap over users: how sure a mean, or a difference of two models on the same users, is.

A metric takes few distinct values, since it is a function of the rank. Resampling n users with replacement is the same
as drawing how often each distinct value occurs, which is multinomial: so the cost does not grow with the number of
users (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWN_AT_ONCE = 2**22  # numbers
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over users."""

    mean: float
    low: float  # ends of the interval of LEVEL, percentiles of the resampled means
    high: float
    p: float  # two-sided p value of a mean of 0, at least 1 / (samples + 1)


def bootstrap(values: np.ndarray, num_samples: int, seed: Sequence[int]) -> Estimate:
    """The mean of ``values``, float64 [n], one per user, and how it varies over users.

    >>> estimate = bootstrap(np.array([0.0] * 50 + [1.0] * 50), 2000, [0])
    >>> estimate.mean, round(estimate.low, 1), round(estimate.high, 1)
    (0.5, 0.4, 0.6)
    """
    distinct, counts = np.unique(values, return_counts=True)
    generator, n = np.random.default_rng(list(seed)), len(values)
    at_once = max(DRAWN_AT_ONCE // len(distinct), 1)
    means = np.concatenate(
        [
            generator.multinomial(n, counts / n, size=min(at_once, num_samples - done)) @ distinct / n
            for done in range(0, num_samples, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    extreme = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (extreme + 1) / (num_samples + 1))
    return Estimate(float(distinct @ counts / n), float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values that hold for all comparisons together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = running
    return corrected
