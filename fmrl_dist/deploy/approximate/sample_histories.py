"""Histories to measure recall with, where none of users are given: items drawn by how often they were trained on.

What is measured on the outputs after them is the search, not the model. Outputs of such histories stand out less from
the catalogue than those of users, so they need margins that are a little wider, and recall on users is a little higher:
the model's own continuations of an item stand out more, and promised too much.
"""

from __future__ import annotations

import numpy as np

MAX_EVENTS = 12
SEED = 0


def sample_histories(train_counts: np.ndarray, number: int, max_length: int) -> list[np.ndarray]:
    """Histories of rows, int64, of 1 to :data:`MAX_EVENTS` items; the same for the same arguments."""
    generator = np.random.default_rng(SEED)
    weights = train_counts + 1.0  # any item may be in a history
    lengths = generator.integers(1, min(MAX_EVENTS, max_length), number, endpoint=True)
    rows = generator.choice(len(weights), int(lengths.sum()), p=weights / weights.sum())
    return np.split(rows, lengths.cumsum()[:-1])
