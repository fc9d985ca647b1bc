"""What the demo's items are, beneath their texts and images.

Shapes: V items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.demo.words import LEAF_PATHS

NUM_LEAVES, LEAVES_PER_GROUP, LEAVES_PER_DEPARTMENT = len(LEAF_PATHS), 4, 16
NUM_TIERS = 3
NUM_HUES = 8
MOTIFS = ("disc", "square", "triangle", "ring", "bars")
POPULARITY_SIGMA = 0.8  # of the log-normal weights


@dataclass(frozen=True)
class Attributes:
    """The attributes of all items. Every array is [V]."""

    leaf: NDArray[np.int64]  # index into LEAF_PATHS
    tier: NDArray[np.int64]  # 0 cheap … 2 expensive
    hue: NDArray[np.int64]  # position on the wheel of NUM_HUES
    motif: NDArray[np.int64]  # index into MOTIFS
    popularity: NDArray[np.float64]  # weight of the item besides its attributes


def make_attributes(items: int, seed: int) -> Attributes:
    """Draw the latent attributes of ``items`` items; leaf sizes differ by at most one."""
    rng = np.random.default_rng([seed, 0])
    return Attributes(
        leaf=rng.permutation(np.arange(items) % NUM_LEAVES),
        tier=rng.integers(NUM_TIERS, size=items),
        hue=rng.integers(NUM_HUES, size=items),
        motif=rng.integers(len(MOTIFS), size=items),
        popularity=rng.lognormal(0.0, POPULARITY_SIGMA, size=items),
    )
