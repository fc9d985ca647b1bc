"""Users in the order of the input: batches, and the parts of the output that they belong to.

A part is a run of users by their place in the input, and a batch a run of users of one part. Neither depends on
who works on them, nor on the files' own row groups and sizes: so each product that makes scores has the same shape, and
the output the same bytes, for any number of processes, before and after a kill.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

BATCH_USERS = 2048


@dataclass(frozen=True)
class UserBatch:
    """Histories of ``n`` consecutive users."""

    first: int  # place of the first of them in the whole input
    users: pa.Array  # external ids, int64 or large_string [n]
    histories: list[np.ndarray]  # rows of items, int64
    num_unknown: int = 0  # ids that were left out

    @property
    def end(self) -> int:
        """Place after the last user."""
        return self.first + len(self.users)

    @classmethod
    def joined(cls, batches: list[UserBatch]) -> UserBatch:
        """Batches that follow each other, as one."""
        if len(batches) == 1:
            return batches[0]
        users = pa.concat_arrays([batch.users for batch in batches])
        histories = [rows for batch in batches for rows in batch.histories]
        return cls(batches[0].first, users, histories, sum(batch.num_unknown for batch in batches))


@dataclass(frozen=True)
class Share:
    """The parts that one process writes."""

    part_users: int  # of each part but the last
    parts: frozenset[int] | None = None  # None: all

    def has(self, part: int) -> bool:
        return self.parts is None or part in self.parts

    def spans(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The users of this share among those from ``first`` to before ``end``, as (first, end) for each part."""
        for part in range(first // self.part_users, -(-end // self.part_users)):
            if self.has(part):
                yield max(first, part * self.part_users), min(end, (part + 1) * self.part_users)

    def num_users(self, total: int) -> int:
        """How many of all users are in this share."""
        return sum(end - first for first, end in self.spans(0, total))

    def batch_end(self, user: int) -> int:
        """Place after the last user of the batch that ``user`` is in."""
        part = user // self.part_users * self.part_users
        return min(part + ((user - part) // BATCH_USERS + 1) * BATCH_USERS, part + self.part_users)


def batched(pieces: Iterable[UserBatch], share: Share) -> Iterator[UserBatch]:
    """Pieces of any length, none of which crosses a part's end, as batches."""
    kept: list[UserBatch] = []
    for piece in pieces:
        taken = 0
        while taken < len(piece.users):
            begin = kept[0].first if kept else piece.first + taken
            end = min(piece.end, share.batch_end(begin)) - piece.first
            whole = taken == 0 and end == len(piece.users)
            kept.append(
                piece
                if whole
                else UserBatch(
                    piece.first + taken,
                    piece.users[taken:end],
                    piece.histories[taken:end],
                    piece.num_unknown if taken == 0 else 0,  # of the piece; only their sum matters
                )
            )
            taken = end
            if kept[-1].end == share.batch_end(begin):
                yield UserBatch.joined(kept)
                kept = []
    if kept:
        yield UserBatch.joined(kept)
