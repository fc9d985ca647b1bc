"""Full-catalogue ranking of users block by block, counted as histograms.

User blocks and item tiles are fixed, ranks (:mod:`fmrl_dist.evaluation.target_ranks`) are counted in integers: figures
are the same for any number of processes at the same threads per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fmrl_dist.data.batches import RankingBlock
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import Catalogue, Until, to_the_end
from fmrl_dist.evaluation.metrics import CUTOFF
from fmrl_dist.evaluation.target_ranks import Ranking, hidden_items
from fmrl_dist.model.fmrlrec import FMRLRec


@torch.no_grad()
def rank_histograms(
    model: FMRLRec,
    catalogue: Catalogue,
    blocks: Iterable[RankingBlock],
    mask_seen: bool,
    normalize: bool = False,
    until: Until = to_the_end,
) -> Tensor:
    """Histogram of 2·rank for each size, int64 [S, 2·CUTOFF + 1] (see :mod:`fmrl_dist.evaluation.metrics`).

    Args:
        model: in evaluation mode.
        catalogue: all items, on the model's device.
        blocks: users, each with a history and one target.
        mask_seen: leave out the items of a user's whole history, never the target.
        normalize: rank by cosines of each size's prefixes.
        until: how far to go through the users, and through the items; what comes of less than all means nothing.
    """
    device = model.encoder.bias.device
    histograms = torch.zeros(len(model.sizes), 2 * CUTOFF + 1, dtype=torch.int64, device=device)
    for group in catalogue.in_step(_groups(until(blocks), catalogue.users_at_once)):
        group = [block.to(device) for block in group]
        rankings = []
        for block, inputs in zip(group, catalogue.inputs(group), strict=True):
            z = model(inputs, block.starts, block.from_start)[block.starts[1:] - 1]
            rankings.append(Ranking(z, block.targets, hidden_items(block, mask_seen), model.sizes, normalize))
        catalogue.rank(rankings, until)
        for ranking in rankings:
            half_ranks = 2 * ranking.ranks()  # [S, U]
            half_ranks = torch.where(half_ranks <= 2 * CUTOFF, half_ranks, 0).long()
            histograms.scatter_add_(1, half_ranks, torch.ones_like(half_ranks))
    return histograms


def _groups(blocks: Iterable[RankingBlock], num_users: int) -> Iterator[list[RankingBlock]]:
    """Runs of blocks of ``num_users`` users or a few more."""
    group: list[RankingBlock] = []
    for block in blocks:
        group.append(block)
        if sum(len(block.users) for block in group) >= num_users:
            yield group
            group = []
    if group:
        yield group


def count_together(
    runtime: Runtime,
    model: FMRLRec,
    catalogue: Catalogue,
    blocks: Iterable[RankingBlock],
    mask_seen: bool,
    normalize: bool,
    stop: StopRequest | None = None,
) -> Tensor:
    """:func:`rank_histograms` of every rank's blocks, added up, on each of them.

    Raises:
        Stopped: on all ranks; some of them was told to ``stop`` before it was done.
    """
    stop = stop or StopRequest()
    histograms = rank_histograms(model, catalogue, blocks, mask_seen, normalize, stop.until_told)
    stop.raise_together(runtime, stop.cut_short)
    return runtime.sum(histograms)
