"""Training batches of a store, in the order that :class:`Order` computes: a pure function of step and lanes.

A reader takes whole lanes, and gives what it has read of them as :class:`LaneWindows`; those of several readers make a
batch. So lanes may be shared out among processes in any way: the batch is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from fmrl_dist.data.histories import Packed, SampledBatch
from fmrl_dist.data.negatives import NegativeSampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store import Store
from fmrl_dist.data.windows import ragged_rows, target_windows


@dataclass(frozen=True)
class LaneWindows:
    """Windows of some lanes at one step, lane by lane: NumPy arrays, to pass between processes without shared memory.

    A window has ``lengths`` items and ``lengths + from_start`` targets.
    """

    lanes: np.ndarray  # int64 [B], of each window
    users: np.ndarray  # int64 [B]
    items: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [B]
    from_start: np.ndarray  # bool [B]
    targets: np.ndarray  # int64 [P]
    drawn_lanes: np.ndarray  # int64 [n], for which negatives were drawn
    drawn: np.ndarray  # int64 [n, K]
    damaged: np.ndarray  # int64, blocks that could not be read and were left out

    def take(self, windows: np.ndarray) -> LaneWindows:
        """Some of the windows, in the order given."""
        num_targets = self.lengths + self.from_start
        first_item, first_target = np.cumsum(self.lengths) - self.lengths, np.cumsum(num_targets) - num_targets
        return LaneWindows(
            lanes=self.lanes[windows],
            users=self.users[windows],
            items=self.items[ragged_rows(first_item[windows], self.lengths[windows])],
            lengths=self.lengths[windows],
            from_start=self.from_start[windows],
            targets=self.targets[ragged_rows(first_target[windows], num_targets[windows])],
            drawn_lanes=self.drawn_lanes,
            drawn=self.drawn,
            damaged=self.damaged,
        )


class TrainStream:
    """Training batches of a store.

    Args:
        store: an open store.
        order: of its training users.
        max_length, windows, predict_first: which windows of a user's history are taken.
        sampler: of negatives; None for the full softmax.
        share_negatives: all positions of the global batch share the negatives of all lanes; else each lane has its own.
        skipped: blocks whose users are left out.
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
        skipped: Sequence[int] = (),
    ) -> None:
        self.order = order
        self._store, self._blocks = store, store.manifest.splits["train"]
        self._max_length, self._windows, self._predict_first = max_length, windows, predict_first
        self._sampler, self._share_negatives = sampler, share_negatives
        self._skipped = frozenset(skipped)
        self._read_block = lru_cache(maxsize=order.lanes * order.window_blocks)(self._read_block_once)

    def batch(self, epoch: int, step: int, lanes: Sequence[int]) -> Packed:
        """The windows of the given lanes at ``step`` of ``epoch``; may be empty.

        With a sampler a :class:`SampledBatch`, one group a lane, or one in all.
        """
        return self.pack([self.read(epoch, step, lanes)], lanes)

    def read(self, epoch: int, step: int, lanes: Sequence[int], reader: int = 0, num_readers: int = 1) -> LaneWindows:
        """What one of ``num_readers`` readers contributes to a batch of ``lanes``."""
        everyone = range(self.order.lanes)
        # Negatives that are shared are of all lanes, other ranks' too: the order tells them, nothing is sent.
        drawn_lanes = (everyone if self._share_negatives else lanes)[reader::num_readers] if self._sampler else ()
        needs_targets = self._sampler is not None and self._sampler.needs_targets
        read_lanes = (everyone if self._share_negatives and needs_targets else lanes)[reader::num_readers]
        run_step = epoch * self.order.steps_per_epoch + step
        drawn = np.empty((len(drawn_lanes), self._sampler.num_drawn if self._sampler else 0), np.int64)
        for row, lane in enumerate(drawn_lanes):
            drawn[row] = self._sampler.lane(run_step, lane)  # type: ignore[union-attr]  # no sampler, no lanes

        pairs_of_lanes = [self.order.batch(epoch, step, lane) for lane in read_lanes]
        lanes_of_users = np.repeat(np.asarray(read_lanes, np.int64), [len(pairs) for pairs in pairs_of_lanes])
        pairs = np.concatenate([np.empty((0, 2), np.int64), *pairs_of_lanes])
        kept, damaged = self._readable(pairs[:, 0])
        lanes_of_users, pairs = lanes_of_users[kept], pairs[kept]
        users, events, begins, ends = self._gather(pairs)
        owner, first, last = target_windows(ends - begins, self._max_length, self._windows, self._predict_first)
        first, last = first + begins[owner], last + begins[owner]  # rows in events
        from_start = first == begins[owner]
        input_first = first - ~from_start  # of each target the event before it; item 1 has only the start position
        lengths = last - 1 - input_first
        return LaneWindows(
            lanes=lanes_of_users[owner],
            users=users[owner],
            items=events[ragged_rows(input_first, lengths)],
            lengths=lengths,
            from_start=from_start,
            targets=events[ragged_rows(first, last - first)],
            drawn_lanes=np.asarray(drawn_lanes, np.int64),
            drawn=drawn,
            damaged=damaged,
        )

    def pack(self, parts: Sequence[LaneWindows], lanes: Sequence[int]) -> Packed:
        """The batch of ``lanes`` from what its readers contributed, whoever read what."""
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
        drawn = joint.drawn[np.argsort(joint.drawn_lanes)]
        if self._share_negatives:
            position_starts = np.array([0, len(own.targets)])
            groups = [self._sampler.negatives(drawn.ravel(), joint.targets)]
        else:
            window_bounds = np.searchsorted(own.lanes, [*lanes, self.order.lanes])
            position_starts = _starts(own.lengths + own.from_start)[window_bounds]
            groups = [
                self._sampler.negatives(drawn_of_lane, own.targets[begin:end])
                for drawn_of_lane, (begin, end) in zip(drawn, pairwise(position_starts), strict=True)
            ]
        return SampledBatch(
            **{f.name: getattr(packed, f.name) for f in fields(packed)},
            position_starts=torch.from_numpy(position_starts),
            negatives=torch.from_numpy(np.concatenate([ids for ids, _ in groups])),
            log_expected=torch.from_numpy(np.concatenate([log_expected for _, log_expected in groups])),
            negative_starts=torch.from_numpy(_starts(np.array([len(ids) for ids, _ in groups]))),
        )

    def _readable(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the users' blocks [n] are there: bool [n]; and the numbers of those that turned out damaged."""
        numbers = [int(b) for b in np.unique(blocks) if int(b) not in self._skipped]
        damaged = [b for b in numbers if self._read_block(b) is None]
        left_out = np.array([*self._skipped, *damaged], np.int64)
        return ~np.isin(blocks, left_out), np.array(damaged, np.int64)

    def _read_block_once(self, number: int) -> dict[str, np.ndarray] | None:
        return self._store.read_or_skip(self._blocks[number])

    def _gather(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Users and the begin and end of each one's events, for (block, row) pairs, over the blocks' joint events."""
        blocks, which = np.unique(pairs[:, 0], return_inverse=True)
        arrays = [block for b in blocks if (block := self._read_block(int(b))) is not None]
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


def _starts(lengths: np.ndarray) -> np.ndarray:
    """First row of each run and, last, the number of rows: int64 [n + 1]."""
    return np.concatenate(([0], np.cumsum(lengths)))
