"""Negatives with their features: every lane walks through the item shards, K items per step.

One pass takes every item once, block after block, in its own order of blocks. Items are permuted when a store is built,
so the K items of a step are a uniform sample without replacement. What a lane takes at a step is a pure function of
(seed, lane, step) and needs one or two blocks: nothing is replayed, and only the block list grows with the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from fmrl_dist.data.item_rows import ItemRows, block_rows
from fmrl_dist.data.store.reader import Store

STREAM = 0x77616C6B  # "walk": a separate random stream
PASSES_KEPT = 64


class StreamedNegatives:
    """Uniform negatives with their features.

    It keeps the item blocks that the last step read.

    Args:
        store: an open store.
        dims: feature → dim, in the order of the columns.
        num_drawn: K per lane and step; 0 for none.
        seed: for all walks.
    """

    def __init__(self, store: Store, dims: Mapping[str, int], num_drawn: int, seed: int) -> None:
        self.dims, self.num_drawn = dims, num_drawn
        self._store, self._seed = store, seed
        self._counts = np.array([block.count for block in store.manifest.items], np.int64)
        self._pass = lru_cache(PASSES_KEPT)(self._shuffle_pass)
        self._held: dict[int, tuple[np.ndarray, ItemRows]] = {}  # per block: ids in stored order, and features

    def read(self, step: int, lanes: Sequence[int]) -> tuple[np.ndarray, list[ItemRows]]:
        """What ``lanes`` draw at ``step`` of the whole run: int64 [n, K], and the rows that hold their features."""
        spans = [list(self._spans(step, lane)) for lane in lanes]
        self._held = {
            block: self._held.get(block) or self._read_block(block)
            for block in sorted({block for of_lane in spans for block, _, _ in of_lane})
        }
        drawn = np.empty((len(lanes), self.num_drawn), np.int64)
        for row, of_lane in zip(drawn, spans, strict=True):
            parts = [self._held[block][0][first:last] for block, first, last in of_lane]
            row[:] = np.concatenate([np.empty(0, np.int64), *parts])
        return drawn, [rows for _, rows in self._held.values()]

    def _spans(self, step: int, lane: int) -> Iterator[tuple[int, int, int]]:
        """Runs of items of one lane at one step: block, first, last."""
        position, end, num_items = step * self.num_drawn, (step + 1) * self.num_drawn, int(self._counts.sum())
        while position < end:
            number, offset = divmod(position, num_items)
            blocks, starts = self._pass(lane, number)
            place = int(np.searchsorted(starts, offset, side="right")) - 1
            first = offset - int(starts[place])
            last = min(first + end - position, int(starts[place + 1] - starts[place]))
            yield int(blocks[place]), first, last
            position += last - first

    def _shuffle_pass(self, lane: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the blocks in one pass of one lane, and the position at which each begins, then V."""
        blocks = np.random.default_rng((STREAM, self._seed, lane, number)).permutation(len(self._counts))
        return blocks, np.concatenate(([0], np.cumsum(self._counts[blocks])))

    def _read_block(self, number: int) -> tuple[np.ndarray, ItemRows]:
        arrays = self._store.read_block(self._store.manifest.items[number])
        return arrays["ids"], block_rows(arrays, "ids", self.dims)
