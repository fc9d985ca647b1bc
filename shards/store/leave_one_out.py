"""The leave-one-out split: a history's last item is its test target, the one before it its validation target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shards.store.user_blocks import UserBlocks
from shards.tables.histories import Histories

MIN_EVENTS = 2  # shorter histories have nothing to predict and are dropped
MIN_EVAL_EVENTS = 3  # shorter ones are for training only


@dataclass(frozen=True)
class SplitBlocks:
    """Where the users of each split are packed."""

    train: UserBlocks
    valid: UserBlocks
    test: UserBlocks


class LeaveOneOutWriter:
    """Cuts each history into its three slices and packs these."""

    def __init__(self, blocks: SplitBlocks, num_items: int) -> None:
        self._blocks = blocks
        self._external: list[pa.Array] = []
        self.train_count = np.zeros(num_items, np.int64)  # train events of each item
        self.num_users = self.num_dropped_users = self.num_events = 0
        self.num_sorted_users = self.num_repeated_events = 0

    def add(self, histories: Histories) -> None:
        """Cut and pack the histories; those with fewer than 2 events are dropped and counted."""
        low, high = histories.starts[:-1], histories.starts[1:]
        keep = np.flatnonzero(high - low >= MIN_EVENTS)
        self._external.append(histories.users.take(pa.array(keep)))
        self.num_dropped_users += len(low) - len(keep)
        self.num_sorted_users += histories.num_sorted
        self.num_repeated_events += histories.num_repeated
        users = self.num_users + np.arange(len(keep))
        self.num_users += len(keep)
        low, high = low[keep], high[keep]
        self.num_events += int((high - low).sum())
        events = [histories.items, *([histories.times] if histories.times is not None else [])]
        evaluated = high - low >= MIN_EVAL_EVENTS
        self._blocks.train.add(users, low, np.where(evaluated, high - 2, high), events)
        self._blocks.valid.add(users[evaluated], low[evaluated], high[evaluated] - 1, events)
        self._blocks.test.add(users[evaluated], low[evaluated], high[evaluated], events)
        self.train_count += train_counts(histories, len(self.train_count))

    def finish(self) -> pa.Array:
        """Write the last blocks; returns the external ids of the users kept, row = internal id."""
        for blocks in (self._blocks.train, self._blocks.valid, self._blocks.test):
            blocks.flush()
        return pa.chunked_array(self._external).combine_chunks()


def train_counts(histories: Histories, num_items: int) -> np.ndarray:
    """How often each item occurs in the training slices of these histories, int64 [V]."""
    low, high, items = histories.starts[:-1], histories.starts[1:], histories.items
    kept = high - low >= MIN_EVENTS
    low, high = low[kept], np.where(high - low >= MIN_EVAL_EVENTS, high - 2, high)[kept]
    edges = np.bincount(low, minlength=len(items) + 1) - np.bincount(high, minlength=len(items) + 1)
    inside = np.cumsum(edges)[: len(items)] > 0
    return np.bincount(items[inside], minlength=num_items)
