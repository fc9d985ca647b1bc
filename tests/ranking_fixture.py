"""Ranks of some users' targets in one call: shared by the tests of ranking."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmrl_dist.catalogue import EmbeddedCatalogue
from fmrl_dist.data.histories import RankingBlock
from fmrl_dist.ranking import Ranking, hidden_items


def target_ranks(
    z: Tensor, items: Tensor, batch: RankingBlock, sizes: Sequence[int], mask_seen: bool, normalize: bool = False
) -> Tensor:
    """Rank of each target at each size, [S, U], among ``items`` [V, D]."""
    ranking = Ranking(z, batch.targets, hidden_items(batch, mask_seen), sizes, normalize)
    EmbeddedCatalogue(items).rank([ranking])
    return ranking.ranks()
