"""The catalogue as ranking reads it: embeddings of all items, tile by tile, resident or made from the item shards.

V items, D width. The loss reads columns instead (:mod:`fmrl_dist.catalogue_columns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmrl_dist.data.histories import RankingBlock
from fmrl_dist.data.item_rows import block_rows
from fmrl_dist.data.store import Store
from fmrl_dist.model import ItemEncoder

TILE_ITEMS = 4096
STREAMED_USERS = 65536  # that one pass over the item shards ranks for: with D = 1024 their outputs take 256 MiB


class Catalogue(Protocol):
    """Embeddings of all items."""

    @property
    def users_at_once(self) -> int:
        """Users that one pass over the tiles should serve."""

    @property
    def inline_dims(self) -> Mapping[str, int] | None:
        """Features that users' blocks have to bring along for :meth:`inputs`; None for none."""

    def inputs(self, batch: RankingBlock) -> Tensor:
        """Embeddings of ``batch.items``, [N, D]."""

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids int64 [v], sorted, and embeddings [v, D]: every item once, always in the same tiles."""


@dataclass(frozen=True)
class EmbeddedCatalogue:
    """Embeddings that are all there, float32 [V, D]."""

    items: Tensor
    users_at_once: int = 1
    inline_dims: None = None

    def inputs(self, batch: RankingBlock) -> Tensor:
        return self.items[batch.items]

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        ids = torch.arange(len(self.items), device=self.items.device)
        yield from zip(ids.split(TILE_ITEMS), self.items.split(TILE_ITEMS), strict=True)


@dataclass(frozen=True)
class StreamedCatalogue:
    """Embeddings made from an inline store, the users' items from their blocks and the tiles from the item blocks.

    Nothing that is held grows with the catalogue. Every pass reads all item shards.
    """

    encoder: ItemEncoder
    store: Store
    inline_dims: Mapping[str, int]
    users_at_once: int = STREAMED_USERS

    def inputs(self, batch: RankingBlock) -> Tensor:
        assert batch.feature_ids is not None and batch.feature_values is not None and batch.feature_present is not None
        embeddings = self._embed(batch.feature_values, batch.feature_present)
        return embeddings[torch.searchsorted(batch.feature_ids, batch.items)]

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.encoder.weight.device
        for block in self.store.manifest.items:
            rows = block_rows(self.store.read_block(block), "ids", self.inline_dims)
            values, present = torch.from_numpy(rows.values).to(device), torch.from_numpy(rows.present).to(device)
            yield torch.from_numpy(rows.ids).to(device), self._embed(values, present)

    @torch.no_grad()
    def _embed(self, values: Tensor, present: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(self.encoder.normalize(values, present), present)
        return embeddings
