"""Segments of users: by how often their target was trained on, and by how long their history is.

    cold    the target is in no training history
    tail    it is, but it is none of the head
    head    the items with the most training events: a fifth of those with any (items that have as many as the first
            item outside belong to the tail)

A fifth is the usual short head (Abdollahpouri et al., "The Unfairness of Popularity Bias in Recommendation", 2019).
A history's length is the number of its events before the target, including those that the model does not read.
V items. A cell is one popularity with one length; every user is in one cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POPULARITIES = ("cold", "tail", "head")
HEAD_SHARE = 0.2
LENGTHS = {"1-4": 1, "5-9": 5, "10-19": 10, "20-49": 20, "50 or more": 50}  # name → least length
NUM_CELLS = len(POPULARITIES) * len(LENGTHS)


@dataclass(frozen=True)
class Segments:
    """The segments of a store's users."""

    train_counts: np.ndarray  # int64 [V], may be memory-mapped
    head_above: int  # training events that all items of the head exceed

    @classmethod
    def of(cls, train_counts: np.ndarray) -> Segments:
        known = np.sort(train_counts[train_counts > 0])
        outside = len(known) - int(HEAD_SHARE * len(known))
        return cls(train_counts, int(known[outside - 1]) if len(known) else 0)

    def cells(self, targets: Tensor, lengths: Tensor) -> Tensor:
        """The cell of each user, int64 [U], from targets and history lengths, int64 [U]."""
        counts = torch.from_numpy(np.asarray(self.train_counts[targets.cpu().numpy()])).to(targets.device)
        popularity = (counts > 0).long() + (counts > self.head_above).long()
        bounds = torch.tensor(list(LENGTHS.values())[1:], device=lengths.device)
        return popularity * len(LENGTHS) + torch.searchsorted(bounds, lengths, right=True)


def users_by_length(lengths: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each group of history lengths that has users: its name, and which they are, bool [U]; ``lengths`` int64 [U]."""
    groups = np.searchsorted(list(LENGTHS.values())[1:], lengths, side="right")
    for place, name in enumerate(LENGTHS):
        if (groups == place).any():
            yield name, groups == place


def segments_of_cells() -> Iterator[tuple[str, list[int]]]:
    """Name and cells of each segment."""
    cells = np.arange(NUM_CELLS).reshape(len(POPULARITIES), len(LENGTHS))
    yield from ((f"{name} target", row.tolist()) for name, row in zip(POPULARITIES, cells, strict=True))
    yield from ((f"history {name}", row.tolist()) for name, row in zip(LENGTHS, cells.T, strict=True))
