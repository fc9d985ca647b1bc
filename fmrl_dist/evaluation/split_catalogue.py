"""The catalogue split over the ranks, to rank with: each has the embeddings of its own items, whole tiles of them.

W ranks, V items, v of them this rank's, D width, U users of a block, S sizes. The ranks go block by block, all at once:

    1. inputs     a rank asks the others for the embeddings of its block's items          [N, D]
    2. outputs    every rank's z, targets and hidden items go to all ranks                [U, D]
    3. ranking    each ranks its own tiles for everybody's users, as one process would
    4. joining    best scores and the target's go back to the rank whose users they are   [W, U, S, TOP + 1]

Tiles and blocks are those of :class:`fmrl_dist.evaluation.catalogue.EmbeddedCatalogue`, so every product has the same
shape and the figures are the same, digit for digit. A rank holds a W-th of [V, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.distributed.collectives import exchange_counts, exchange_rows, to_everyone
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, Group, add_tiles, tiles_of
from fmrl_dist.evaluation.target_ranks import TargetRanks

SHARED_BYTES = 2**30  # of embeddings: ranks share more than that even where each of them scores all items for its loss


@dataclass(frozen=True)
class SplitCatalogue:
    """This rank's items; see the module's docstring. Every rank has to rank with it, also one that has no users."""

    items: Tensor  # float32 [v, D]
    bounds: Sequence[int]  # the first item of each rank and, last, V
    users_at_once: int = 1
    inline_dims: None = None

    @classmethod
    def embed(cls, rank: int, num_ranks: int, num_items: int, embed: Callable[[int, int], Tensor]) -> SplitCatalogue:
        """The share of ``rank``, of what ``embed(begin, end)`` makes of items, [end - begin, D]."""
        bounds = tile_bounds(num_items, num_ranks)
        return cls(embed(bounds[rank], bounds[rank + 1]), bounds)

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        """One block at a time, and an empty one while others still have some."""
        blocks = (block for group in groups for block in group)
        while True:
            block = next(blocks, None)
            ranks_with_one = torch.tensor([block is not None], dtype=torch.int64, device=self.items.device)
            dist.all_reduce(ranks_with_one)
            if not ranks_with_one:
                return
            yield [block or nobody()]

    def inputs(self, group: Group) -> list[Tensor]:
        return [self._fetch(block.items) for block in group]

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        for target_ranks in users:
            self._compare_together(target_ranks, stop)

    def _fetch(self, ids: Tensor) -> Tensor:
        """Embeddings of any items, each from its rank."""
        wanted, places = ids.unique(return_inverse=True)
        edges = torch.searchsorted(wanted, torch.tensor(self.bounds, device=wanted.device))
        asked = edges.diff().tolist()
        answered = exchange_counts(asked, ids.device)
        rows = self.items[exchange_rows(wanted[:, None], asked, answered)[:, 0] - self.bounds[dist.get_rank()]]
        return exchange_rows(rows, answered, asked)[places]

    def _compare_together(self, own: TargetRanks, stop: StopRequest) -> None:
        tensors = (own.z, own.targets[:, None], own.hidden)
        of_all = zip(*(to_everyone(rows) for rows in tensors), strict=True)
        everyone = [TargetRanks(z, targets[:, 0], hidden, own.sizes, own.normalize) for z, targets, hidden in of_all]
        add_tiles(everyone, stop.until_requested(tiles_of(self.items, self.bounds[dist.get_rank()])))
        found = [target_ranks.found() for target_ranks in everyone]
        sent, received = [len(part) for part in found], [len(own.z)] * len(found)
        parts = exchange_rows(torch.cat(found).flatten(1), sent, received)
        own.join(parts.view(len(found), len(own.z), *found[0].shape[1:]))


def is_shared(num_items: int, width: int, num_ranks: int, in_loss: bool) -> bool:
    """Whether the processes share the items: they do in the loss (``loss.catalogue: split``), or there are many."""
    return num_ranks > 1 and (in_loss or 4 * num_items * width > SHARED_BYTES)


def tile_bounds(num_items: int, num_ranks: int) -> list[int]:
    """First item of each rank and, last, V: whole tiles, as even as they come; none for some if there are few."""
    num_tiles = -(-num_items // COMPARED_ITEMS)
    return [min(num_tiles * rank // num_ranks * COMPARED_ITEMS, num_items) for rank in range(num_ranks + 1)]


def nobody() -> EvaluationBlock:
    """A block of no users."""
    none = torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros(1, dtype=torch.int64)
    return EvaluationBlock(none, none, nothing, torch.empty(0, dtype=torch.bool), none, seen=none, seen_starts=nothing)
