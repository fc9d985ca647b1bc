"""Histories from the store, packed for the model: training batches of target windows, and evaluation blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.data.negatives import NegativeSampler
from fmrl_dist.data.order import WINDOW_BLOCKS, Order
from fmrl_dist.data.store import Store
from fmrl_dist.data.windows import ragged_rows, target_windows


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
class SampledBatch(Packed):
    """Windows to train on against sampled items, in G groups of positions that share their negatives."""

    position_starts: Tensor  # int64 [G+1], first position of each group and, last, the number of positions
    negatives: Tensor  # int64 [K'], with repetition
    log_expected: Tensor  # float32 [K'], how often each was to be expected among its group's negatives
    negative_starts: Tensor  # int64 [G+1], first negative of each group and, last, K'


@dataclass(frozen=True)
class RankingBlock(Packed):
    """Users to rank the catalogue for: the model reads their last events, and masking needs all of them."""

    seen: Tensor  # int64, items of the whole histories, those before the cut too
    seen_starts: Tensor  # int64 [B+1], first row of each history in ``seen``


class TrainStream:
    """Training batches of a store, in the order that :class:`Order` computes.

    Args:
        store: an open store.
        order: of its training users.
        max_length, windows, predict_first: which windows of a user's history are taken.
        sampler: of negatives; None for the full softmax.
        share_negatives: all positions of the global batch share the negatives of all lanes; else each lane has its own.
    """

    def __init__(
        self,
        store: Store,
        order: Order,
        max_length: int,
        windows: str,
        predict_first: bool,
        sampler: NegativeSampler | None = None,
        share_negatives: bool = False,
    ) -> None:
        self.order = order
        self._blocks = store.manifest.splits["train"]
        self._max_length, self._windows, self._predict_first = max_length, windows, predict_first
        self._sampler, self._share_negatives = sampler, share_negatives
        self._read = lru_cache(maxsize=order.lanes * WINDOW_BLOCKS)(lambda b: store.read_block(self._blocks[b]))

    def batch(self, epoch: int, step: int, lanes: Sequence[int]) -> Packed:
        """The windows of the given lanes at ``step`` of ``epoch``; may be empty.

        With a sampler a :class:`SampledBatch`, one group a lane, or one in all.
        """
        packed, position_starts = self._windows_of(epoch, step, lanes)
        if self._sampler is None:
            return packed
        run_step = epoch * self.order.steps_per_epoch + step
        targets = packed.targets.numpy()
        if self._share_negatives:
            everyone = range(self.order.lanes)
            drawn = np.concatenate([self._sampler.lane(run_step, lane) for lane in everyone])
            if self._sampler.needs_targets and len(lanes) < self.order.lanes:  # other ranks': the order tells them
                targets = self._windows_of(epoch, step, everyone)[0].targets.numpy()
            position_starts = position_starts[[0, -1]]
            groups = [self._sampler.negatives(drawn, targets)]
        else:
            bounds = zip(lanes, position_starts[:-1], position_starts[1:], strict=True)
            groups = [
                self._sampler.negatives(self._sampler.lane(run_step, lane), targets[begin:end])
                for lane, begin, end in bounds
            ]
        return SampledBatch(
            **{f.name: getattr(packed, f.name) for f in fields(packed)},
            position_starts=torch.from_numpy(position_starts),
            negatives=torch.from_numpy(np.concatenate([ids for ids, _ in groups])),
            log_expected=torch.from_numpy(np.concatenate([log_expected for _, log_expected in groups])),
            negative_starts=torch.from_numpy(np.cumsum([0, *(len(ids) for ids, _ in groups)])),
        )

    def _windows_of(self, epoch: int, step: int, lanes: Sequence[int]) -> tuple[Packed, np.ndarray]:
        """The windows of some lanes, and the first position of each lane (and, last, the number of positions)."""
        pairs_of_lanes = [self.order.batch(epoch, step, lane) for lane in lanes]
        users, events, begins, ends = self._gather(np.concatenate(pairs_of_lanes))
        owner, first, last = target_windows(ends - begins, self._max_length, self._windows, self._predict_first)
        first, last = first + begins[owner], last + begins[owner]  # rows in events
        from_start = first == begins[owner]
        input_first = first - ~from_start  # of each target the event before it; item 1 has only the start position
        lengths = last - 1 - input_first
        packed = Packed(
            users=torch.from_numpy(users[owner]),
            items=torch.from_numpy(events[ragged_rows(input_first, lengths)]),
            starts=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
            from_start=torch.from_numpy(from_start),
            targets=torch.from_numpy(events[ragged_rows(first, last - first)]),
        )
        user_ends = np.cumsum([0, *(len(pairs) for pairs in pairs_of_lanes)])
        positions = np.concatenate(([0], np.cumsum(last - first)))
        return packed, positions[np.searchsorted(owner, user_ends)]

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
