"""The catalogue as ranking reads it: embeddings of all items, tile by tile, resident or made from the item shards.

V items, D width. Split over the ranks: :mod:`fmrl_dist.evaluation.split_catalogue`. The loss reads columns instead
(:mod:`fmrl_dist.training.item_columns`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fmrl_dist.data.batches import RankingBlock
from fmrl_dist.data.item_rows import block_rows
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.target_ranks import Ranking
from fmrl_dist.model.fmrlrec import ItemEncoder

TILE_ITEMS = 4096
Group = list[RankingBlock]  # users for whom one pass over the items is made
T = TypeVar("T")
STREAMED_USERS = 65536  # that one pass over the item shards ranks for: with D = 1024 their outputs take 256 MiB


class Until(Protocol):
    """How far to go through some items, in their order: to the end, or to where a signal comes."""

    def __call__(self, items: Iterable[T], /) -> Iterable[T]:
        """The items, up to there."""


def to_the_end(items: Iterable[T]) -> Iterable[T]:
    """All of them."""
    return items


class Catalogue(Protocol):
    """Embeddings of all items."""

    @property
    def users_at_once(self) -> int:
        """Users that one pass over the tiles should serve."""

    @property
    def inline_dims(self) -> Mapping[str, int] | None:
        """Features that users' blocks have to bring along for :meth:`inputs`; None for none."""

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The groups of users to rank for, one at a time. Where the ranks rank together, all have as many."""

    def inputs(self, group: Group) -> list[Tensor]:
        """Embeddings of each block's items, [N, D]."""

    def rank(self, rankings: Sequence[Ranking], until: Until = to_the_end) -> None:
        """Have every item ranked, once, always in the same tiles, or those that ``until`` leaves."""


def add_tiles(rankings: Sequence[Ranking], tiles: Iterable[tuple[Tensor, Tensor]]) -> None:
    """One pass over the tiles for all rankings."""
    for ids, tile in tiles:
        for ranking in rankings:
            ranking.add(ids, tile)


def tiles_of(items: Tensor, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and embeddings of resident items [v, D], the first of which is ``begin``, in tiles."""
    ids = torch.arange(begin, begin + len(items), device=items.device)
    if len(items):  # else torch would make one tile of nothing
        yield from zip(ids.split(TILE_ITEMS), items.split(TILE_ITEMS), strict=True)


@dataclass(frozen=True)
class EmbeddedCatalogue:
    """Embeddings that are all there, float32 [V, D]."""

    items: Tensor
    users_at_once: int = 1
    inline_dims: None = None

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        yield from groups

    def inputs(self, group: Group) -> list[Tensor]:
        return [self.items[block.items] for block in group]

    def rank(self, rankings: Sequence[Ranking], until: Until = to_the_end) -> None:
        add_tiles(rankings, until(tiles_of(self.items)))


@dataclass(frozen=True)
class StreamedCatalogue:
    """Embeddings made from an inline store, the users' items from their blocks and the tiles from the item blocks.

    Nothing that is held grows with the catalogue. Every pass reads all item shards.
    """

    encoder: ItemEncoder
    store: Store
    inline_dims: Mapping[str, int]
    users_at_once: int = STREAMED_USERS

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        yield from groups

    def inputs(self, group: Group) -> list[Tensor]:
        return [self._inputs(block) for block in group]

    def rank(self, rankings: Sequence[Ranking], until: Until = to_the_end) -> None:
        add_tiles(rankings, until(self._tiles()))

    def _inputs(self, block: RankingBlock) -> Tensor:
        assert block.feature_ids is not None and block.feature_values is not None and block.feature_present is not None
        embeddings = self._embed(block.feature_values, block.feature_present)
        return embeddings[torch.searchsorted(block.feature_ids, block.items)]

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.encoder.weight.device
        for block in self.store.manifest.items:
            rows = block_rows(self.store.read_block(block), "ids", self.inline_dims)
            values, present = torch.from_numpy(rows.values).to(device), torch.from_numpy(rows.present).to(device)
            yield torch.from_numpy(rows.ids).to(device), self._embed(values, present)

    @torch.no_grad()
    def _embed(self, values: Tensor, present: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(self.encoder.normalize(values, present), present)
        return embeddings
