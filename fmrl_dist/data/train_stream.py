"""Training batches of a store, in the order that :class:`Order` computes: a pure function of step and lanes.

A reader takes whole lanes and returns their windows as :class:`LaneWindows`; those of all readers together make a
batch. So the batch is the same however the lanes are divided among processes. In an inline store, the features of the
items are stored with the histories and travel with the windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch

from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.data.item_rows import ItemRows, block_rows, merge, pick
from fmrl_dist.data.negatives import NegativeSampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.streamed_negatives import StreamedNegatives
from fmrl_dist.data.windows import WindowRule, ragged_rows, target_windows


@dataclass(frozen=True)
class LaneWindows:
    """Windows of some lanes at one step, lane by lane: NumPy arrays, sent between processes without shared memory.

    A window has ``lengths`` items and ``lengths + from_start`` targets.
    """

    lanes: np.ndarray  # int64 [B], lane of each window
    users: np.ndarray  # int64 [B]
    items: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [B]
    from_start: np.ndarray  # bool [B]
    targets: np.ndarray  # int64 [P]
    drawn_lanes: np.ndarray  # int64 [n], lanes for which negatives were drawn
    drawn: np.ndarray  # int64 [n, K]
    damaged: np.ndarray  # int64, blocks that could not be read and were skipped
    feature_ids: np.ndarray  # int64 [n], sorted: all items above if features are inline, else empty
    feature_values: np.ndarray  # float16 [n, F]
    feature_present: np.ndarray  # bool [n, M]

    def take(self, windows: np.ndarray) -> LaneWindows:
        """Some of the windows, in the given order."""
        num_targets = self.lengths + self.from_start
        first_item, first_target = np.cumsum(self.lengths) - self.lengths, np.cumsum(num_targets) - num_targets
        return replace(
            self,
            lanes=self.lanes[windows],
            users=self.users[windows],
            items=self.items[ragged_rows(first_item[windows], self.lengths[windows])],
            lengths=self.lengths[windows],
            from_start=self.from_start[windows],
            targets=self.targets[ragged_rows(first_target[windows], num_targets[windows])],
        )


@dataclass(frozen=True)
class ShuffledUsers:
    """Complete histories of a pool of blocks, in an epoch's order."""

    users: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n], number of events of each
    present: np.ndarray  # bool [n], false for users of skipped blocks
    starts: np.ndarray  # int64 [n + 1]
    events: np.ndarray  # int64, items of all histories, concatenated
    damaged: np.ndarray  # int64, blocks that could not be read
    features: ItemRows | None  # of all their items, if features are inline

    def take(self, first: int, last: int) -> ShuffledUsers:
        """Positions ``first`` … ``last - 1``, without users of skipped blocks."""
        present, begin, end = self.present[first:last], self.starts[first], self.starts[last]
        users, lengths = self.users[first:last][present], self.lengths[first:last][present]
        events = self.events[begin:end]
        return ShuffledUsers(users, lengths, present[present], _starts(lengths), events, self.damaged, self.features)


class TrainStream:
    """Training batches of a store.

    It keeps the pools of blocks that the last step read from, one or two per lane.

    Args:
        store: an open store.
        order: of its training users.
        rule: which windows of a user's history are used.
        sampler: of negatives; None for the full softmax.
        share_negatives: all positions of the global batch share the negatives of all lanes; else each lane has its own.
        skipped: blocks whose users are left out.
        streamed_negatives: draws the sampler's negatives from the item shards of an inline store and names its inline
            features; None if features are in a table.
    """

    def __init__(
        self,
        store: Store,
        order: Order,
        rule: WindowRule,
        sampler: NegativeSampler | None = None,
        share_negatives: bool = False,
        skipped: Sequence[int] = (),
        streamed_negatives: StreamedNegatives | None = None,
    ) -> None:
        self.order = order
        self._store, self._blocks = store, store.manifest.splits["train"]
        self._rule = rule
        self._sampler, self._share_negatives = sampler, share_negatives
        self._skipped, self._streamed = frozenset(skipped), streamed_negatives
        self._held: dict[tuple[int, int], ShuffledUsers] = {}  # by epoch and pool number

    def batch(self, epoch: int, step: int, lanes: Sequence[int]) -> Packed:
        """The windows of the given lanes at ``step`` of ``epoch``; may be empty.

        With a sampler, a :class:`SampledBatch` with one group per lane, or a single one if negatives are shared.
        """
        return self.pack([self.read(epoch, step, lanes)], lanes)

    def read(self, epoch: int, step: int, lanes: Sequence[int], reader: int = 0, num_readers: int = 1) -> LaneWindows:
        """What one of ``num_readers`` readers contributes to a batch of ``lanes``."""
        everyone = range(self.order.lanes)
        # Shared negatives come from all lanes, including other ranks': they are recomputed here, nothing is sent.
        drawn_lanes = (everyone if self._share_negatives else lanes)[reader::num_readers] if self._sampler else ()
        needs_targets = self._sampler is not None and self._sampler.needs_targets
        read_lanes = (everyone if self._share_negatives and needs_targets else lanes)[reader::num_readers]
        run_step = epoch * self.order.steps_per_epoch + step
        drawn, sources = self._draw(run_step, drawn_lanes)

        spans = [(lane, *span) for lane in read_lanes for span in self.order.spans(epoch, step, lane)]
        self._held = {  # keep the pools already read, drop those no longer needed
            key: self._held.get(key) or self._read_pool(*key) for key in {(epoch, span[1]) for span in spans}
        }
        parts = [self._held[epoch, pool].take(first, last) for _, pool, first, last in spans]
        lanes_of_users = np.repeat(np.array([span[0] for span in spans], np.int64), [len(part.users) for part in parts])
        users, lengths, events = (
            np.concatenate([np.empty(0, np.int64), *(getattr(part, name) for part in parts)])
            for name in ("users", "lengths", "events")
        )
        ends = np.cumsum(lengths)
        begins = ends - lengths
        owner, first, last = target_windows(lengths, self._rule)
        first, last = first + begins[owner], last + begins[owner]  # rows in events
        from_start = first == begins[owner]
        input_first = first - ~from_start  # the event before each target; item 1 has only the start position
        num_inputs = last - 1 - input_first
        items, targets = events[ragged_rows(input_first, num_inputs)], events[ragged_rows(first, last - first)]
        features = ItemRows(np.empty(0, np.int64), np.empty((0, 0), np.float16), np.empty((0, 0), np.bool_))
        if self._streamed is not None:
            sources += [pool.features for pool in self._held.values() if pool.features is not None]
            needed = np.unique(np.concatenate((items, targets, drawn.ravel())))
            features = pick(needed, sources, self._streamed.dims)
        return LaneWindows(
            lanes=lanes_of_users[owner],
            users=users[owner],
            items=items,
            lengths=num_inputs,
            from_start=from_start,
            targets=targets,
            drawn_lanes=np.asarray(drawn_lanes, np.int64),
            drawn=drawn,
            damaged=np.unique(np.concatenate([np.empty(0, np.int64), *(pool.damaged for pool in self._held.values())])),
            **{f"feature_{name}": value for name, value in vars(features).items()},
        )

    def pack(self, parts: Sequence[LaneWindows], lanes: Sequence[int]) -> Packed:
        """The batch of ``lanes`` (in order) from its readers' contributions, which may include other lanes."""
        names = [f.name for f in fields(LaneWindows)]
        joint = LaneWindows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
        joint = joint.take(np.argsort(joint.lanes, kind="stable"))
        own = joint.take(np.flatnonzero(np.isin(joint.lanes, lanes))) if len(lanes) < self.order.lanes else joint
        packed = Packed(
            users=torch.from_numpy(own.users),
            items=torch.from_numpy(own.items),
            starts=torch.from_numpy(_starts(own.lengths)),
            from_start=torch.from_numpy(own.from_start),
            targets=torch.from_numpy(own.targets),
        )
        if self._sampler is None:
            return packed
        order = np.argsort(joint.drawn_lanes)
        if self._share_negatives:
            position_starts = np.array([0, len(own.targets)])
            groups = [self._sampler.negatives(joint.drawn[order].ravel(), joint.targets)]
        else:
            drawn = joint.drawn[order[np.isin(joint.drawn_lanes[order], lanes)]]
            window_bounds = np.searchsorted(own.lanes, [*lanes, self.order.lanes])
            position_starts = _starts(own.lengths + own.from_start)[window_bounds]
            groups = [
                self._sampler.negatives(drawn_of_lane, own.targets[begin:end])
                for drawn_of_lane, (begin, end) in zip(drawn, pairwise(position_starts), strict=True)
            ]
        nothing = (np.empty(0, np.int64), np.empty(0, np.float32))  # for a rank, or a micro-batch, without lanes
        negatives, log_expected = (np.concatenate(parts) for parts in zip(nothing, *groups, strict=True))
        return SampledBatch(
            **packed.tensors | self._features(joint, own, negatives),
            position_starts=torch.from_numpy(position_starts),
            negatives=torch.from_numpy(negatives),
            log_expected=torch.from_numpy(log_expected),
            negative_starts=torch.from_numpy(_starts(np.array([len(ids) for ids, _ in groups]))),
        )

    def _draw(self, run_step: int, lanes: Sequence[int]) -> tuple[np.ndarray, list[ItemRows]]:
        """Negatives of some lanes, int64 [n, K], and their features if these are inline."""
        if self._streamed is not None:
            return self._streamed.read(run_step, lanes)
        drawn = np.empty((len(lanes), self._sampler.num_drawn if self._sampler else 0), np.int64)
        for row, lane in enumerate(lanes):
            drawn[row] = self._sampler.lane(run_step, lane)  # type: ignore[union-attr]  # no sampler, no lanes
        return drawn, []

    def _features(self, joint: LaneWindows, own: LaneWindows, negatives: np.ndarray) -> dict[str, torch.Tensor]:
        """Inline features of one batch's items, from the readers' contributions."""
        if self._streamed is None:
            return {}
        known, first = np.unique(joint.feature_ids, return_index=True)
        needed = np.unique(np.concatenate((own.items, own.targets, negatives)))
        rows = first[np.searchsorted(known, needed)]
        return {
            "feature_ids": torch.from_numpy(needed),
            "feature_values": torch.from_numpy(joint.feature_values[rows]),
            "feature_present": torch.from_numpy(joint.feature_present[rows]),
        }

    def _read_pool(self, epoch: int, pool: int) -> ShuffledUsers:
        """The blocks of a pool, their users in the epoch's order."""
        pairs = self.order.pool(epoch, pool)
        numbers, which = np.unique(pairs[:, 0], return_inverse=True)
        users, begins, lengths = (np.zeros(len(pairs), np.int64) for _ in range(3))
        present = np.zeros(len(pairs), np.bool_)
        events, features, damaged, base = [np.empty(0, np.int64)], [], [], 0
        wanted = [(i, number) for i, number in enumerate(numbers.tolist()) if number not in self._skipped]
        blocks = self._store.read_each([self._blocks[number] for _, number in wanted])
        for (i, number), block in zip(wanted, blocks, strict=True):
            if block is None:
                damaged.append(number)
                continue
            chosen = np.flatnonzero(which == i)
            rows = pairs[chosen, 1]
            users[chosen], begins[chosen], present[chosen] = block["users"][rows], base + block["starts"][rows], True
            lengths[chosen] = block["starts"][rows + 1] - block["starts"][rows]
            events.append(block["items"])
            base += len(block["items"])
            if self._streamed is not None:
                features.append(block_rows(block, "block_items", self._streamed.dims))
        shuffled = np.concatenate(events)[ragged_rows(begins, lengths)]
        merged = merge(features, self._streamed.dims) if self._streamed is not None else None
        return ShuffledUsers(users, lengths, present, _starts(lengths), shuffled, np.array(damaged, np.int64), merged)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """First row of each run, then the number of rows: int64 [n + 1]."""
    return np.concatenate(([0], np.cumsum(lengths)))
