"""Histories from the store, packed for the model: training batches of target windows, and evaluation blocks.

A training window is a run of targets; the input of each target is the event before it, and the target that is a
history's first event is predicted from the start position. ``last`` takes the last ``max_length`` targets of a user,
``all`` partitions all of them, counted from the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.data.order import WINDOW_BLOCKS, Order
from fmrl_dist.data.store import Store


@dataclass(frozen=True)
class Packed:
    """Histories side by side: N items, B histories or windows."""

    users: Tensor  # int64 [B], internal ids
    items: Tensor  # int64 [N], oldest first
    starts: Tensor  # int64 [B+1], first row of each history and, last, N
    from_start: Tensor  # bool [B], whether a start position stands before the first item
    targets: Tensor  # int64: training one per position [N + from_start.sum()], evaluation one per history [B]

    def to(self, device: torch.device) -> Self:
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class RankingBlock(Packed):
    """Users to rank the catalogue for: the model reads their last events, and masking needs all of them."""

    seen: Tensor  # int64, items of the whole histories, those before the cut too
    seen_starts: Tensor  # int64 [B+1], first row of each history in ``seen``


class TrainStream:
    """Training batches of a store, in the order that :class:`Order` computes."""

    def __init__(self, store: Store, order: Order, max_length: int, windows: str, predict_first: bool) -> None:
        self.order = order
        self._blocks = store.manifest.splits["train"]
        self._max_length, self._windows, self._predict_first = max_length, windows, predict_first
        self._read = lru_cache(maxsize=order.lanes * WINDOW_BLOCKS)(lambda b: store.read_block(self._blocks[b]))

    def batch(self, epoch: int, step: int, lanes: Sequence[int]) -> Packed:
        """The windows of the given lanes at ``step`` of ``epoch``; may be empty."""
        pairs = np.concatenate([self.order.batch(epoch, step, lane) for lane in lanes])
        users, events, begins, ends = self._gather(pairs)
        owner, first, last = target_windows(ends - begins, self._max_length, self._windows, self._predict_first)
        first, last = first + begins[owner], last + begins[owner]  # rows in events
        from_start = first == begins[owner]
        input_first = first - ~from_start  # of each target the event before it; item 1 has only the start position
        lengths = last - 1 - input_first
        return Packed(
            users=torch.from_numpy(users[owner]),
            items=torch.from_numpy(events[ragged_rows(input_first, lengths)]),
            starts=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
            from_start=torch.from_numpy(from_start),
            targets=torch.from_numpy(events[ragged_rows(first, last - first)]),
        )

    def _gather(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Users and the begin and end of each one's events, for (block, row) pairs, over the blocks' joint events."""
        blocks, which = np.unique(pairs[:, 0], return_inverse=True)
        arrays = [self._read(int(b)) for b in blocks]
        events = np.concatenate([np.empty(0, np.int64), *(a["items"] for a in arrays)])
        users, begins, ends = (np.empty(len(pairs), np.int64) for _ in range(3))
        base = 0
        for i, block in enumerate(arrays):
            chosen = which == i
            rows = pairs[chosen, 1]
            users[chosen] = block["users"][rows]
            begins[chosen] = base + block["starts"][rows]
            ends[chosen] = base + block["starts"][rows + 1]
            base += len(block["items"])
        return users, events, begins, ends


def target_windows(
    lengths: np.ndarray, max_length: int, windows: str, predict_first: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of targets of histories of ``lengths`` events.

    Returns:
        owner, first, last, each int64 [W]: the history of each window, and its targets first … last - 1, counted in
        events from the history's begin. Windows without targets are left out.
    """
    skipped = 0 if predict_first else 1
    num_targets = np.maximum(lengths - skipped, 0)
    num_windows = -(-num_targets // max_length)
    if windows == "last":
        num_windows = np.minimum(num_windows, 1)
    owner = np.repeat(np.arange(len(lengths)), num_windows)
    back = ragged_rows(np.zeros_like(num_windows), num_windows)  # 0 is the window that ends the history
    last = lengths[owner] - back * max_length
    return owner, np.maximum(last - max_length, skipped), last


def ragged_rows(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows first … first + length - 1 of each run, one after the other, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - (ends - lengths), lengths)


def evaluation_blocks(
    store: Store, split: str, max_length: int, block_numbers: Sequence[int], num_users: int = 0
) -> Iterator[RankingBlock]:
    """The users of some blocks of ``split``: whole histories' last ``max_length`` events, the next item as target.

    Args:
        store: an open store.
        split: "valid" or "test".
        max_length: events kept.
        block_numbers: blocks to read.
        num_users: size of a fixed, evenly spread subset of the split's users; 0 for all.
    """
    blocks = store.manifest.splits[split]
    total = sum(block.count for block in blocks)
    wanted = num_users or total
    begins = np.cumsum([0, *(block.count for block in blocks)])
    for number in block_numbers:
        arrays = store.read_block(blocks[number])
        positions = begins[number] + np.arange(blocks[number].count)
        rows = np.flatnonzero((positions + 1) * wanted // total > positions * wanted // total)
        begin, target = arrays["starts"][rows], arrays["starts"][rows + 1] - 1
        whole = target - begin
        lengths = np.minimum(whole, max_length)
        yield RankingBlock(
            users=torch.from_numpy(arrays["users"][rows]),
            items=torch.from_numpy(arrays["items"][ragged_rows(target - lengths, lengths)]),
            starts=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
            from_start=torch.zeros(len(rows), dtype=torch.bool),
            targets=torch.from_numpy(arrays["items"][target]),
            seen=torch.from_numpy(arrays["items"][ragged_rows(begin, whole)]),
            seen_starts=torch.from_numpy(np.concatenate(([0], np.cumsum(whole)))),
        )
