"""Target ranks: the position of each user's target among all items, at every size, in one pass over tiles of items.

U users of a block, S sizes, D width. The score of size m_j is the score of m_{j-1} plus the product of chunk j, so one
pass gives all sizes. A running top list per user and size makes target ranks up to the cut-off exact; the target's own
score is taken from the same product when its tile is processed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.evaluation.metrics import CUTOFF
from fmrl_dist.model.nested import chunks

GROUPED = 16  # columns represented by their maximum in the search for the top list
TOP = 2 * CUTOFF  # a target at target rank ≤ CUTOFF has at most 2·CUTOFF - 2 other items scored higher or equal


def hidden_items(block: EvaluationBlock, mask_seen: bool) -> Tensor:
    """Items hidden from each user's ranking, never the target: pairs (user's row, item), int64 [h, 2]."""
    rows = torch.arange(len(block.targets), device=block.seen.device).repeat_interleave(block.seen_starts.diff())
    hidden = (block.seen != block.targets[rows]) & mask_seen
    return torch.stack((rows[hidden], block.seen[hidden]), 1)


class TargetRanks:
    """Target ranks of a group of users among the items of all tiles, exact up to CUTOFF.

    Args:
        z: outputs [U, D].
        targets: items, int64 [U].
        hidden: pairs (user's row, hidden item), int64 [h, 2].
        sizes: Matryoshka sizes.
        normalize: rank by cosines of each size's prefixes. The norm of z, the same for all items, is omitted.
    """

    def __init__(
        self, z: Tensor, targets: Tensor, hidden: Tensor, sizes: Sequence[int], normalize: bool = False
    ) -> None:
        self.z, self.targets, self.hidden = z, targets, hidden
        self.sizes, self.normalize = tuple(sizes), normalize
        self._top = z.new_full((len(sizes), len(z), TOP), -torch.inf)
        self._target_scores = z.new_full((len(sizes), len(z)), torch.nan)
        self._user_rows = torch.arange(len(z), device=z.device)

    def add(self, ids: Tensor, tile: Tensor) -> None:
        """Compare the targets with the items of one more tile: ids int64 [v], sorted, and embeddings [v, D]."""
        z, user_rows = self.z, self._user_rows
        target_columns, here = _places(self.targets, ids)
        hidden_columns, hidden = _places(self.hidden[:, 1].contiguous(), ids)
        scores = z.new_zeros(len(z), -(-len(tile) // GROUPED) * GROUPED)
        scores[:, len(tile) :] = -torch.inf
        scores[self.hidden[hidden, 0], hidden_columns[hidden]] = -torch.inf  # stays -inf whatever is added
        for j, (first, last) in enumerate(chunks(self.sizes)):
            scores[:, : len(tile)].addmm_(z[:, first:last], tile[:, first:last].T)
            compared = scores
            if self.normalize:
                lengths = tile[:, :last].norm(dim=1).clamp_min(torch.finfo(tile.dtype).tiny)
                compared = scores / F.pad(lengths, (0, scores.shape[1] - len(tile)), value=1.0)
            self._target_scores[j, here] = compared[user_rows[here], target_columns[here]]
            self._top[j] = torch.cat((self._top[j], _candidates(compared)), 1).topk(TOP, sorted=False).values

    def found(self) -> Tensor:
        """The result of the tiles so far, [U, S, TOP + 1]: the best scores, and the target's (NaN if not seen)."""
        return torch.cat((self._top, self._target_scores[..., None]), 2).transpose(0, 1)

    def join(self, parts: Tensor) -> None:
        """Combine what W processes :meth:`found` in their tiles for these users, [W, U, S, TOP + 1]."""
        everything = parts.permute(2, 1, 0, 3)  # [S, U, W, TOP + 1]
        self._top = everything[..., :TOP].flatten(2).topk(TOP, sorted=False).values
        scores = everything[..., TOP]
        elsewhere = scores.isnan()
        self._target_scores = torch.where(elsewhere, 0, scores).sum(2).where(~elsewhere.all(2), torch.nan)

    def result(self) -> Tensor:
        """Target rank at each size, float [S, U]; values above CUTOFF are only known to be above it."""
        scores = self._target_scores[..., None]
        higher = (~(self._top <= scores)).sum(2)  # no NaN score, the target's or another's, improves it
        equal = (self._top == scores).sum(2) - 1  # minus the target, which is in the list unless far below
        return 1 + higher + 0.5 * equal.clamp_min(0)


def _places(wanted: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The position of each wanted item in the sorted ``ids``, and whether it is there."""
    places = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
    return places, ids[places] == wanted


def _candidates(scores: Tensor) -> Tensor:
    """Columns that include each row's TOP highest scores: those of the TOP groups with the highest maxima.

    Much cheaper than a top list of all columns: [U, v] → [U, at most GROUPED·TOP].
    """
    groups = scores.unflatten(1, (GROUPED, -1))  # [U, GROUPED, v / GROUPED]
    if groups.shape[2] <= TOP:
        return scores
    best = groups.amax(1).topk(TOP, sorted=False).indices
    return groups.gather(2, best[:, None].expand(-1, GROUPED, -1)).flatten(1)
