"""The order of training users is arithmetic: batch(epoch, step, lane) is a pure function of the seed and block sizes.

An epoch's permutation shuffles the blocks, cuts them into pools, and shuffles the users within each pool, so a
reader needs few blocks at a time. The permutation is cut into L lanes of equal length (±1); a step takes the next
batch_size / L users of every lane, and a rank takes the lanes rank, rank + world, …. So every user occurs once per
epoch, every rank has the same number of steps, the global batch does not depend on the number of ranks, and resuming at
a step replays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCKS, USERS = 0, 1  # separate the random streams of the two kinds of shuffle


class Order:
    """The users of every global batch.

    Args:
        block_counts: users in each training block, in manifest order.
        batch_size: users in a global batch.
        lanes: L, a divisor of ``batch_size``.
        seed: for all shuffles.
        pool_blocks: blocks whose users are shuffled together; a reader holds this many per lane.
    """

    def __init__(
        self, block_counts: Sequence[int], batch_size: int, lanes: int, seed: int, pool_blocks: int = 64
    ) -> None:
        assert batch_size % lanes == 0, "the configuration checks that lanes divide the batch"
        self.block_counts = np.asarray(block_counts, dtype=np.int64)
        self.num_users = int(self.block_counts.sum())
        self.lanes, self.users_per_lane, self.seed = lanes, batch_size // lanes, seed
        self.pool_blocks = pool_blocks
        self._pool = lru_cache(maxsize=lanes + 1)(self._shuffle_pool)
        self._blocks = lru_cache(maxsize=2)(self._shuffle_blocks)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; in the last step some lanes may be short or empty."""
        longest = -(-self.num_users // self.lanes)
        return -(-longest // self.users_per_lane)

    def batch(self, epoch: int, step: int, lane: int) -> np.ndarray:
        """Users of one lane at ``step`` of ``epoch``: int64 [n, 2] pairs (block, row), n ≤ batch_size / L."""
        parts = [self.pool(epoch, pool)[first:last] for pool, first, last in self.spans(epoch, step, lane)]
        return np.concatenate([np.empty((0, 2), np.int64), *parts])

    def spans(self, epoch: int, step: int, lane: int) -> list[tuple[int, int, int]]:
        """:meth:`batch` as runs of positions in :meth:`pool`: (pool, first, last), usually just one."""
        lane_begin = lane * self.num_users // self.lanes
        lane_end = (lane + 1) * self.num_users // self.lanes
        begin = min(lane_begin + step * self.users_per_lane, lane_end)
        end = min(begin + self.users_per_lane, lane_end)
        _, pool_starts = self._blocks(epoch)
        result = []
        pool = int(np.searchsorted(pool_starts, begin, side="right")) - 1
        while begin < end:
            first, last = int(pool_starts[pool]), int(pool_starts[pool + 1])
            if begin < last:
                result.append((pool, begin - first, min(end, last) - first))
                begin = min(end, last)
            pool += 1
        return result

    def pool(self, epoch: int, pool: int) -> np.ndarray:
        """Users of one pool in their shuffled order: int64 [n, 2] pairs (block, row)."""
        return self._pool(epoch, pool)

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's block order, and each pool's first position in the permutation, then U."""
        blocks = self._random(BLOCKS, epoch).permutation(len(self.block_counts))
        ends = np.cumsum(self.block_counts[blocks])
        return blocks, np.concatenate(([0], ends[self.pool_blocks - 1 : -1 : self.pool_blocks], ends[-1:]))

    def _shuffle_pool(self, epoch: int, pool: int) -> np.ndarray:
        blocks = self._blocks(epoch)[0][pool * self.pool_blocks :][: self.pool_blocks]
        pairs = np.concatenate(
            [np.stack((np.full(n, b), np.arange(n)), 1) for b, n in zip(blocks, self.block_counts[blocks], strict=True)]
        )
        return self._random(USERS, epoch, pool).permutation(pairs)

    def _random(self, *place: int) -> np.random.Generator:
        """A separate random stream for every place.

        A spawn key is not padded with zeros; a tuple of entropy is, so that (seed, epoch) would equal (seed, epoch, 0).
        """
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=place))
