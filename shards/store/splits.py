"""Cutting histories into training, validation and test.

Leave-one-out: a history's last item is its test target, the one before it its validation target. Otherwise a history
says how many of its events are for training and for validation; what is held out has one target, and all events before
it are its history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shards.store.user_blocks import UserBlocks
from shards.tables.histories import Histories

MIN_EVENTS = 2  # of leave-one-out: shorter histories have nothing to predict and are dropped
MIN_EVAL_EVENTS = 3  # shorter ones are for training only


@dataclass(frozen=True)
class SplitBlocks:
    """Where the users of each split are packed."""

    train: UserBlocks
    valid: UserBlocks
    test: UserBlocks


@dataclass(frozen=True)
class Slices:
    """Where each history's slice of each split ends; all begin where the history does. int64 [n]; 0: no slice."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def slices_of(histories: Histories, target: str) -> Slices:
    """The slices of some histories, in events from their begin.

    Args:
        histories: cut by leave-one-out if they say no numbers of events.
        target: "first" or "last" of what is held out, where they do.
    """
    lengths = np.diff(histories.starts)
    if histories.train is None or histories.valid is None:
        evaluated = lengths >= MIN_EVAL_EVENTS
        train = np.where(evaluated, lengths - 2, np.where(lengths >= MIN_EVENTS, lengths, 0))
        return Slices(train, np.where(evaluated, lengths - 1, 0), np.where(evaluated, lengths, 0))
    train, before_test = histories.train, histories.train + histories.valid
    ends = {}
    for name, before, end in (("valid", train, before_test), ("test", before_test, lengths)):
        wanted = before + 1 if target == "first" else end
        ends[name] = np.where((end > before) & (wanted > 1), wanted, 0)  # a target, and a history before it
    return Slices(train, ends["valid"], ends["test"])


class SplitWriter:
    """Cuts each history into its slices and packs these."""

    def __init__(self, blocks: SplitBlocks, num_items: int, target: str) -> None:
        self._blocks, self._target = blocks, target
        self._external: list[pa.Array] = []
        self.train_count = np.zeros(num_items, np.int64)  # train events of each item
        self.num_users = self.num_dropped_users = self.num_events = 0
        self.num_sorted_users = self.num_repeated_events = 0

    def add(self, histories: Histories) -> None:
        """Cut and pack the histories; those without any slice are dropped and counted."""
        slices = slices_of(histories, self._target)
        low = histories.starts[:-1]
        keep = np.flatnonzero(slices.train + slices.valid + slices.test)
        self._external.append(histories.users.take(pa.array(keep)))
        self.num_dropped_users += len(low) - len(keep)
        self.num_sorted_users += histories.num_sorted
        self.num_repeated_events += histories.num_repeated
        users = np.full(len(low), -1)
        users[keep] = self.num_users + np.arange(len(keep))
        self.num_users += len(keep)
        self.num_events += int(np.diff(histories.starts)[keep].sum())
        events = [histories.items, *([histories.times] if histories.times is not None else [])]
        for name in ("train", "valid", "test"):
            end = getattr(slices, name)
            chosen = np.flatnonzero(end)
            getattr(self._blocks, name).add(users[chosen], low[chosen], low[chosen] + end[chosen], events)
        self.train_count += _counts(histories.items, low, low + slices.train, len(self.train_count))

    def finish(self) -> pa.Array:
        """Write the last blocks; returns the external ids of the users kept, row = internal id."""
        for blocks in (self._blocks.train, self._blocks.valid, self._blocks.test):
            blocks.flush()
        return pa.chunked_array(self._external).combine_chunks()


def train_counts(histories: Histories, num_items: int, target: str) -> np.ndarray:
    """How often each item occurs in the training slices of these histories, int64 [V]."""
    low = histories.starts[:-1]
    return _counts(histories.items, low, low + slices_of(histories, target).train, num_items)


def _counts(items: np.ndarray, low: np.ndarray, high: np.ndarray, num_items: int) -> np.ndarray:
    """How often each item occurs in the slices ``low:high`` of ``items``, which do not overlap: int64 [V]."""
    edges = np.bincount(low, minlength=len(items) + 1) - np.bincount(high, minlength=len(items) + 1)
    inside = np.cumsum(edges)[: len(items)] > 0
    return np.bincount(items[inside], minlength=num_items)
