"""The items that a model recommends: the best of all items for each user, collected tile by tile.

U users, S sizes, V items, k the longest list. Of two rows the first is of lists among all items, the second of those
without items that the user has seen. Items scored equal stand in the order of their ids; if more than fit are equal
within one tile, which of them are listed is up to the product's top list. NaN scores are listed last.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TopLists:
    """The best items of each user of a block at every size, with their scores."""

    def __init__(self, num_sizes: int, num_users: int, length: int, like: Tensor) -> None:
        self.length = length
        self.scores = like.new_full((2, num_sizes, num_users, length), -torch.inf)
        self.items = torch.full((2, num_sizes, num_users, length), -1, dtype=torch.int64, device=like.device)

    def add(self, j: int, ids: Tensor, scores: Tensor, seen_rows: Tensor, seen_columns: Tensor) -> None:
        """Merge the items of a tile at size j: ids int64 [v], scores [U, v], and what users have seen of them."""
        ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        for which in range(2):
            if which:
                ranked[seen_rows, seen_columns] = -torch.inf
            best = ranked.topk(min(self.length, len(ids)), sorted=False)
            found = torch.where(best.values == -torch.inf, -1, ids[best.indices])
            values = torch.cat((self.scores[which, j], best.values), 1)
            self._keep(which, j, values, torch.cat((self.items[which, j], found), 1))

    def _keep(self, which: int, j: int, scores: Tensor, items: Tensor) -> None:
        """Keep the best of more than enough, [U, more]: by score, then by id."""
        order = items.argsort(dim=1, stable=True)
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.length]
        self.scores[which, j], self.items[which, j] = scores.gather(1, order), items.gather(1, order)

    @property
    def table(self) -> Tensor:
        """All of it, float64 [U, 2·S·k·2]: exact for ids below 2^53."""
        return torch.stack((self.scores.double(), self.items.double())).permute(3, 0, 1, 2, 4).flatten(1)

    def join(self, tables: Tensor) -> None:
        """Take the best of what W processes found for these users, each a :attr:`table`, [W, U, ·]."""
        num_sizes, num_users = self.scores.shape[1:3]
        scores, items = tables.unflatten(2, (2, 2, num_sizes, self.length)).permute(2, 3, 4, 1, 0, 5).flatten(4)
        for which in range(2):
            for j in range(num_sizes):
                self._keep(which, j, scores[which, j].to(self.scores.dtype), items[which, j].long())


def exposures(items: Tensor, cutoffs: list[int], num_items: int) -> Tensor:
    """How often each item is among the first k of a list, int32 [K, ..., V], from lists [..., U, length]."""
    counts = []
    for cutoff in cutoffs:
        listed = items[..., :cutoff].flatten(-2)
        listed = torch.where(listed < 0, num_items, listed)  # lists that are shorter than the catalogue is small
        count = torch.zeros(*listed.shape[:-1], num_items + 1, dtype=torch.int32, device=items.device)
        counts.append(count.scatter_add_(-1, listed, torch.ones_like(listed, dtype=torch.int32))[..., :num_items])
    return torch.stack(counts)
