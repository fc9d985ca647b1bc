"""The catalogue split over the ranks for an evaluation: each rank holds its own items' embeddings, in whole tiles.

W ranks, V items, v of them this rank's, D width, U users of a block, S sizes. All ranks process their blocks in step:

    1. inputs     each rank requests the embeddings of its block's items from the others   [N, D]
    2. outputs    every rank's z, targets, their scores and seen items go to all ranks     [U, D]
    3. ranking    each rank compares its own tiles with all ranks' targets
    4. joining    counts and the target's score return to the rank of their users          [W, U, S, 5]

Tiles and blocks are those of :class:`fmrl_dist.evaluation.catalogue.EmbeddedCatalogue`, so every product has the same
shape and the figures are identical, digit for digit. A rank holds 1/W of [V, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.distributed.collectives import exchange_counts, exchange_rows, to_everyone
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import COMPARED_ITEMS, Group, add_tiles, tiles_of
from fmrl_dist.evaluation.target_ranks import TargetRanks
from fmrl_dist.model.rotation import rotate_tiles

SHARED_BYTES = 2**30  # of embeddings: above this, ranks share them even if each rank scores all items for its loss


@dataclass(frozen=True)
class SplitCatalogue:
    """This rank's items; see the module's docstring. Every rank must rank with it, even one without users."""

    items: Tensor  # float32 [v, D]
    bounds: Sequence[int]  # first item of each rank, then V
    vectors: Tensor | None = None  # what outputs are compared with [v, D], if not ``items``
    users_at_once: int = 1
    inline_dims: None = None

    @classmethod
    def embed(cls, rank: int, num_ranks: int, num_items: int, embed: Callable[[int, int], Tensor]) -> SplitCatalogue:
        """The share of ``rank``; ``embed(begin, end)`` returns the embeddings of a range of items, [end - begin, D]."""
        bounds = tile_bounds(num_items, num_ranks)
        return cls(embed(bounds[rank], bounds[rank + 1]), bounds)

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        """One block at a time, then empty blocks while other ranks still have some."""
        blocks = (block for group in groups for block in group)
        while True:
            block = next(blocks, None)
            ranks_with_one = torch.tensor([block is not None], dtype=torch.int64, device=self.items.device)
            dist.all_reduce(ranks_with_one)
            if not ranks_with_one:
                return
            yield [block or nobody()]

    def inputs(self, group: Group) -> list[Tensor]:
        return [self._fetch(self.items, block.items) for block in group]

    def target_items(self, group: Group) -> list[Tensor]:
        return [self._fetch(self._compared, block.targets) for block in group]

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        for target_ranks in users:
            self._compare_together(target_ranks, stop)

    def rotated(self, rotation: Tensor) -> SplitCatalogue:
        """As :meth:`~fmrl_dist.evaluation.catalogue.EmbeddedCatalogue.rotated`."""
        return replace(self, vectors=rotate_tiles(self.items, rotation))

    @property
    def _compared(self) -> Tensor:
        return self.items if self.vectors is None else self.vectors

    def _fetch(self, own: Tensor, ids: Tensor) -> Tensor:
        """Rows of any items, each fetched from the rank that has it among its ``own`` [v, D]."""
        wanted, places = ids.unique(return_inverse=True)
        edges = torch.searchsorted(wanted, torch.tensor(self.bounds, device=wanted.device))
        asked = edges.diff().tolist()
        answered = exchange_counts(asked, ids.device)
        rows = own[exchange_rows(wanted[:, None], asked, answered)[:, 0] - self.bounds[dist.get_rank()]]
        return exchange_rows(rows, answered, asked)[places]

    def _compare_together(self, own: TargetRanks, stop: StopRequest) -> None:
        self._one_pass(own, stop)
        flags = torch.tensor([stop.cut_short, not own.is_settled], dtype=torch.int64, device=self.items.device)
        dist.all_reduce(flags)
        num_stopped, num_unsettled = flags.tolist()
        if num_unsettled and not num_stopped:
            own.restart()
            self._one_pass(own, stop)

    def _one_pass(self, own: TargetRanks, stop: StopRequest) -> None:
        tensors = (own.z, own.targets[:, None], own.seen, own.assumed.T)
        of_all = zip(*(to_everyone(rows) for rows in tensors), strict=True)
        length = own.lists.length if own.lists is not None and own.collects else 0
        everyone = [
            TargetRanks(z, targets[:, 0], seen, assumed.T, own.sizes, own.normalize, length)
            for z, targets, seen, assumed in of_all
        ]
        add_tiles(everyone, stop.until_requested(tiles_of(self._compared, self.bounds[dist.get_rank()])))
        found = [target_ranks.found() for target_ranks in everyone]
        sent, received = [len(part) for part in found], [len(own.z)] * len(found)
        parts = exchange_rows(torch.cat(found).flatten(1), sent, received)
        own.join(parts.view(len(found), len(own.z), *found[0].shape[1:]))
        if own.lists is not None and length:
            tables = torch.cat([each.lists.table for each in everyone if each.lists is not None])
            own.lists.join(exchange_rows(tables, sent, received).view(len(found), len(own.z), -1))


def is_shared(num_items: int, width: int, num_ranks: int, in_loss: bool) -> bool:
    """Whether the processes share the items: if the loss does (``loss.catalogue: split``), or for many items."""
    return num_ranks > 1 and (in_loss or 4 * num_items * width > SHARED_BYTES)


def tile_bounds(num_items: int, num_ranks: int) -> list[int]:
    """First item of each rank, then V: whole tiles, divided as evenly as possible; some ranks may get none."""
    num_tiles = -(-num_items // COMPARED_ITEMS)
    return [min(num_tiles * rank // num_ranks * COMPARED_ITEMS, num_items) for rank in range(num_ranks + 1)]


def nobody() -> EvaluationBlock:
    """A block without users."""
    none = torch.empty(0, dtype=torch.int64)
    nothing = torch.zeros(1, dtype=torch.int64)
    return EvaluationBlock(none, none, nothing, torch.empty(0, dtype=torch.bool), none, seen=none, seen_starts=nothing)
