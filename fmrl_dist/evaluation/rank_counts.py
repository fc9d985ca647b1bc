"""Target ranks of users, and how often each rank occurs.

C cells of segments (:mod:`fmrl_dist.evaluation.segments`), S sizes, U users, K the last rank that is counted. Of two
rows of ranks the first is among all items, the second among those that the user has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RankedUsers:
    """Target ranks of U users."""

    users: Tensor  # int64 [U], internal ids
    targets: Tensor  # int64 [U], items
    lengths: Tensor  # int64 [U], events before the target
    ranks: Tensor  # float64 [2, S, U]
    lists: Tensor | None = None  # int64 [2, S, U, k], items recommended, the best first, -1 for none

    @property
    def table(self) -> Tensor:
        """All of it but the lists, float64 [U, 3 + 2·S]: exact for ids below 2^53."""
        columns = torch.stack((self.users, self.targets, self.lengths), 1).double()
        return torch.cat((columns, self.ranks.flatten(0, 1).T), 1)

    @classmethod
    def of_table(cls, table: Tensor, num_sizes: int) -> RankedUsers:
        users, targets, lengths = table[:, :3].T.long()
        return cls(users, targets, lengths, table[:, 3:].T.reshape(2, num_sizes, len(table)))


@dataclass(frozen=True)
class RankCounts:
    """How often each target rank occurs, and, if they are kept, each user's ranks."""

    histograms: Tensor  # int64 [C, 2, S, 2·K + 1] of 2·target rank (see :mod:`fmrl_dist.evaluation.metrics`)
    users: RankedUsers | None = None  # sorted by user
    exposures: Tensor | None = None  # int32 [K, 2, S, V], how often each item is in a list, for each length of lists
    rotation: str = ""  # sha256 of what cut vectors were rotated with

    @property
    def all_users(self) -> Tensor:
        """Histograms of the users of all cells, int64 [2, S, 2·K + 1]."""
        return self.histograms.sum(0)

    @property
    def num_users(self) -> int:
        return int(self.all_users[0, 0].sum())


def sorted_users(tables: Sequence[Tensor], num_sizes: int) -> RankedUsers:
    """The users of several :attr:`RankedUsers.table`, by internal id."""
    table = torch.cat(list(tables))
    return RankedUsers.of_table(table[table[:, 0].argsort()], num_sizes)


def join_sizes(counts: Sequence[RankCounts]) -> RankCounts:
    """Counts of several rankings of the same users, as if they were sizes of one model."""
    histograms = torch.cat([each.histograms for each in counts], 2)
    listed = [each.exposures for each in counts if each.exposures is not None]
    exposures = torch.cat(listed, 2) if listed else None
    kept = [each.users for each in counts if each.users is not None]
    if not kept:
        return RankCounts(histograms, exposures=exposures)
    first = kept[0]
    ranks = torch.cat([users.ranks for users in kept], 1)
    return RankCounts(histograms, RankedUsers(first.users, first.targets, first.lengths, ranks), exposures)
