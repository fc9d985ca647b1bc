"""Full-catalogue ranking at every size in one pass over the items.

U users of a block, V items, S sizes, D width. The score of size m_j is the score of m_{j-1} plus the product of chunk
j, so one pass gives all sizes. A running top list per user and size makes ranks up to the cut-off exact; the target's
own score is taken from the same product when its tile comes. User blocks and item tiles are fixed, ranks are counted in
integers: figures are the same for any number of processes at the same threads per process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.data.histories import RankingBlock
from fmrl_dist.metrics import CUTOFF
from fmrl_dist.model import FMRLRec
from fmrl_dist.ops.nested import chunks

TILE_ITEMS = 4096
GROUPED = 16  # columns whose maximum stands for them in the search for the top list
TOP = 2 * CUTOFF  # a target at rank ≤ CUTOFF has at most 2·CUTOFF - 2 other items scored higher or equal


@torch.no_grad()
def rank_histograms(
    model: FMRLRec, items: Tensor, blocks: Iterable[RankingBlock], mask_seen: bool, normalize: bool = False
) -> Tensor:
    """Histogram of 2·rank for each size, int64 [S, 2·CUTOFF + 1] (see :mod:`fmrl_dist.metrics`).

    Args:
        model: in evaluation mode.
        items: embeddings of the whole catalogue, float32 [V, D], on the model's device.
        blocks: users, each with a history and one target.
        mask_seen: leave out the items of a user's whole history, never the target.
        normalize: rank by cosines of each size's prefixes.
    """
    histograms = torch.zeros(len(model.sizes), 2 * CUTOFF + 1, dtype=torch.int64, device=items.device)
    for block in blocks:
        batch = block.to(items.device)
        z = model(items[batch.items], batch.starts, batch.from_start)[batch.starts[1:] - 1]
        half_ranks = 2 * target_ranks(z, items, batch, model.sizes, mask_seen, normalize)  # [S, U]
        half_ranks = torch.where(half_ranks <= 2 * CUTOFF, half_ranks, 0).long()
        histograms.scatter_add_(1, half_ranks, torch.ones_like(half_ranks))
    return histograms


def target_ranks(
    z: Tensor, items: Tensor, batch: RankingBlock, sizes: Sequence[int], mask_seen: bool, normalize: bool = False
) -> Tensor:
    """Rank of each user's target at each size, float [S, U]; exact up to CUTOFF, above it only known to be above.

    Args:
        z: outputs [U, D].
        items: embeddings [V, D].
        batch: the same U users' histories and targets.
        sizes: Matryoshka sizes.
        mask_seen: leave out the items of a user's whole history, never the target.
        normalize: rank by cosines of each size's prefixes. The length of z is the same for all items: left out.
    """
    top = z.new_full((len(sizes), len(z), TOP), -torch.inf)
    target_scores = z.new_empty(len(sizes), len(z))
    user_rows = torch.arange(len(z), device=z.device)
    seen_rows = user_rows.repeat_interleave(batch.seen_starts.diff())
    hidden = (batch.seen != batch.targets[seen_rows]) & mask_seen
    for low in range(0, len(items), TILE_ITEMS):
        tile = items[low : low + TILE_ITEMS]
        here = (batch.targets >= low) & (batch.targets < low + len(tile))
        seen = hidden & (batch.seen >= low) & (batch.seen < low + len(tile))
        scores = z.new_zeros(len(z), -(-len(tile) // GROUPED) * GROUPED)
        scores[:, len(tile) :] = -torch.inf
        scores[seen_rows[seen], batch.seen[seen] - low] = -torch.inf  # and stays so, whatever is added
        for j, (first, last) in enumerate(chunks(sizes)):
            scores[:, : len(tile)].addmm_(z[:, first:last], tile[:, first:last].T)
            ranked = scores
            if normalize:
                lengths = tile[:, :last].norm(dim=1).clamp_min(torch.finfo(tile.dtype).tiny)
                ranked = scores / F.pad(lengths, (0, scores.shape[1] - len(tile)), value=1.0)
            target_scores[j, here] = ranked[user_rows[here], batch.targets[here] - low]
            top[j] = torch.cat((top[j], _candidates(ranked)), 1).topk(TOP, sorted=False).values
    higher = (~(top <= target_scores[..., None])).sum(2)  # a NaN, of the target or another, is never to its advantage
    equal = (top == target_scores[..., None]).sum(2) - 1  # less the target, which is in the list unless far below
    return 1 + higher + 0.5 * equal.clamp_min(0)


def _candidates(scores: Tensor) -> Tensor:
    """Columns that hold each row's TOP highest scores: those of the TOP groups with the highest maxima.

    Far cheaper than a top list of all columns: [U, v] → [U, at most GROUPED·TOP].
    """
    groups = scores.unflatten(1, (GROUPED, -1))  # [U, GROUPED, v / GROUPED]
    if groups.shape[2] <= TOP:
        return scores
    best = groups.amax(1).topk(TOP, sorted=False).indices
    return groups.gather(2, best[:, None].expand(-1, GROUPED, -1)).flatten(1)
