"""Packing users into blocks in CSR form, whatever batches they come in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shards.store.block_writer import BlockWriter

BlockFields = dict[str, np.ndarray]  # arrays of a block, by field name


class UserBlocks:
    """Packs users into blocks of ``users_per_block``, in the order in which they come.

    Args:
        writer: of the split.
        users_per_block: the last block may have fewer.
        item_fields: from the items of a block, fields to add to the block; None adds none.
    """

    def __init__(
        self,
        writer: BlockWriter,
        users_per_block: int,
        item_fields: Callable[[np.ndarray], BlockFields] | None = None,
    ) -> None:
        self._writer, self._item_fields = writer, item_fields
        self._users_per_block = users_per_block
        self._pending: list[tuple[np.ndarray, ...]] = []  # users, lengths, items and, if any, times
        self._num_pending = 0

    def add(self, users: np.ndarray, low: np.ndarray, high: np.ndarray, events: list[np.ndarray]) -> None:
        """Add ``users`` int64 [n], whose slices are ``low:high`` of each array of ``events`` (items, times)."""
        lengths = high - low
        first = np.repeat(low - (np.cumsum(lengths) - lengths), lengths)
        index = first + np.arange(len(first))
        self._pending.append((users, lengths, *(values[index] for values in events)))
        self._num_pending += len(users)
        if self._num_pending >= self._users_per_block:
            self._write(self._num_pending - self._num_pending % self._users_per_block)

    def flush(self) -> None:
        """Write the remaining users as a last, smaller block."""
        self._write(self._num_pending)

    def _write(self, num_users: int) -> None:
        """Write the first ``num_users`` of the pending users, keep the others."""
        if num_users == 0:
            return
        users, lengths, *events = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        starts = np.concatenate(([0], np.cumsum(lengths)))
        for low in range(0, num_users, self._users_per_block):
            high = min(low + self._users_per_block, num_users)
            arrays = {"users": users[low:high], "starts": starts[low : high + 1] - starts[low]}
            for name, values in zip(("items", "times"), events, strict=False):
                arrays[name] = values[starts[low] : starts[high]]
            if self._item_fields is not None:
                arrays |= self._item_fields(arrays["items"])
            self._writer.write(arrays, count=high - low, events=int(starts[high] - starts[low]))
        rest = slice(starts[num_users], None)
        self._pending = [(users[num_users:], lengths[num_users:], *(values[rest] for values in events))]
        self._num_pending -= num_users
