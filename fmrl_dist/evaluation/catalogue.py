"""The catalogue as an evaluation reads it: embeddings of all items, tile by tile, from memory or from the item shards.

V items, D width. :mod:`fmrl_dist.evaluation.split_catalogue` splits it over the ranks. The loss reads columns instead
(:mod:`fmrl_dist.training.item_columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.data.item_rows import block_rows
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.target_ranks import TargetRanks
from fmrl_dist.model.embed_catalogue import check_rankable
from fmrl_dist.model.rotation import ROTATED_ITEMS, rotate_tiles

COMPARED_ITEMS = ROTATED_ITEMS  # per tile
Group = list[EvaluationBlock]  # users that one pass over the items serves
STREAMED_USERS = 65536  # per pass over the item shards: with D = 1024 their outputs take 256 MiB


class Catalogue(Protocol):
    """Embeddings of all items."""

    @property
    def users_at_once(self) -> int:
        """Users that one pass over the tiles should serve."""

    @property
    def inline_dims(self) -> Mapping[str, int] | None:
        """Features that user blocks must contain for :meth:`inputs`; None for none."""

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The groups of users to evaluate, one at a time; processes that share the items all get the same number."""

    def inputs(self, group: Group) -> list[Tensor]:
        """Embeddings of each block's items, [N, D]."""

    def target_items(self, group: Group) -> list[Tensor]:
        """Embeddings of each block's targets, [B, D]."""

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        """Compare the targets with every item, always in the same tiles; stop before a tile on request."""


def add_tiles(users: Sequence[TargetRanks], tiles: Iterable[tuple[Tensor, Tensor]]) -> None:
    """One pass over the tiles for all users."""
    for ids, tile in tiles:
        for target_ranks in users:
            target_ranks.add(ids, tile)


def add_all_tiles(
    users: Sequence[TargetRanks], tiles: Callable[[], Iterator[tuple[Tensor, Tensor]]], stop: StopRequest
) -> None:
    """One pass over all tiles, and another for users whose targets' scores were not what was assumed."""
    add_tiles(users, stop.until_requested(tiles()))
    unsettled = [target_ranks for target_ranks in users if not stop.cut_short and not target_ranks.is_settled]
    for target_ranks in unsettled:
        target_ranks.restart()
    if unsettled:
        add_tiles(unsettled, stop.until_requested(tiles()))


def tiles_of(items: Tensor, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and embeddings of items in memory [v, D], in tiles; the first item is ``begin``."""
    ids = torch.arange(begin, begin + len(items), device=items.device)
    if len(items):  # otherwise torch would make one empty tile
        yield from zip(ids.split(COMPARED_ITEMS), items.split(COMPARED_ITEMS), strict=True)


@dataclass(frozen=True)
class EmbeddedCatalogue:
    """Embeddings that are all in memory, float32 [V, D]."""

    items: Tensor
    vectors: Tensor | None = None  # what outputs are compared with [V, D], if not ``items``
    users_at_once: int = 1
    inline_dims: None = None

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        yield from groups

    def inputs(self, group: Group) -> list[Tensor]:
        return [self.items[block.items] for block in group]

    def target_items(self, group: Group) -> list[Tensor]:
        return [self._compared[block.targets] for block in group]

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        add_all_tiles(users, lambda: tiles_of(self._compared), stop)

    def rotated(self, rotation: Tensor) -> EmbeddedCatalogue:
        """Targets and tiles times ``rotation`` [D, D], for outputs that are rotated, too; inputs stay."""
        return replace(self, vectors=rotate_tiles(self.items, rotation))

    @property
    def _compared(self) -> Tensor:
        return self.items if self.vectors is None else self.vectors


class FeatureEncoder(Protocol):
    """What embeds items, such as :class:`~fmrl_dist.model.item_encoders.item_encoder.ItemEncoder`."""

    @property
    def bias(self) -> Tensor:
        """On the device of the embeddings."""

    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        """Features as the encoder takes them, [n, F]."""

    def __call__(self, values: Tensor, present: Tensor) -> Tensor:
        """Embeddings [n, D]."""


@dataclass(frozen=True)
class StreamedCatalogue:
    """Embeddings computed from an inline store: the users' items from their blocks, the tiles from the item blocks.

    Memory does not grow with the catalogue. Every pass reads all item shards.
    """

    encoder: FeatureEncoder
    store: Store
    inline_dims: Mapping[str, int]
    users_at_once: int = STREAMED_USERS
    rotation: Tensor | None = None  # of targets and tiles [D, D]

    def in_step(self, groups: Iterable[Group]) -> Iterator[Group]:
        yield from groups

    def inputs(self, group: Group) -> list[Tensor]:
        return [self._of_block(block, block.items) for block in group]

    def target_items(self, group: Group) -> list[Tensor]:
        return [self._rotate(self._of_block(block, block.targets)) for block in group]

    def compare(self, users: Sequence[TargetRanks], stop: StopRequest) -> None:
        add_all_tiles(users, self._tiles, stop)

    def rotated(self, rotation: Tensor) -> StreamedCatalogue:
        """As :meth:`EmbeddedCatalogue.rotated`."""
        return replace(self, rotation=rotation)

    def _of_block(self, block: EvaluationBlock, ids: Tensor) -> Tensor:
        """Embeddings of some items of a block's histories and targets, from the features in the block."""
        assert block.feature_ids is not None and block.feature_values is not None and block.feature_present is not None
        embeddings = self._embed(block.feature_values, block.feature_present)
        return embeddings[torch.searchsorted(block.feature_ids, ids)]

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.encoder.bias.device
        for block in self.store.manifest.items:
            rows = block_rows(self.store.read_block(block), "ids", self.inline_dims)
            values, present = torch.from_numpy(rows.values).to(device), torch.from_numpy(rows.present).to(device)
            yield torch.from_numpy(rows.ids).to(device), self._rotate(self._embed(values, present))

    def _rotate(self, vectors: Tensor) -> Tensor:
        return vectors if self.rotation is None else rotate_tiles(vectors, self.rotation)

    @torch.no_grad()
    def _embed(self, values: Tensor, present: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(self.encoder.normalize(values, present), present)
        check_rankable(embeddings, "item embeddings")
        return embeddings
