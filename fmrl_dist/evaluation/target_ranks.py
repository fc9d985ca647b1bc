"""Target ranks: the position of each user's target among all items, at every size, in one pass over tiles of items.

U users of a block, S sizes, D width. The score of size m_j is the score of m_{j-1} plus the product of chunk j, so one
pass gives all sizes. A rank counts the items scored higher than the target and those scored equal: two comparisons per
score, exact at any rank. Items that the user has seen are counted again apart, so the same pass gives the ranks among
all items and those among unseen ones.

The target's score must be known before the first tile, and to the last bit, or ties would be missed. A product rounds
by its shape: it is therefore computed beforehand in a small product, which nearly always rounds as the tile's does, and
compared with the tile's own when that comes. Where they differ, :attr:`TargetRanks.is_settled` is false, and a second
pass (:meth:`TargetRanks.restart`) counts against the tile's own: so the result never depends on the first guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.evaluation.top_lists import TopLists
from fmrl_dist.model.nested import chunks
from fmrl_dist.model.row_products import padded

ALL, UNSEEN = 0, 1  # first index of ranks: among all items, or without those that the user has seen
TILE_MULTIPLE = 256  # items of a product; where it ends in a part of these, equal items can differ in their last bit
GUESSED = TILE_MULTIPLE  # targets of one small product; narrower ones round in another way


def seen_items(block: EvaluationBlock) -> Tensor:
    """Distinct items of each user's whole history except the target: pairs (user's row, item), int64 [h, 2]."""
    rows = torch.arange(len(block.targets), device=block.seen.device).repeat_interleave(block.seen_starts.diff())
    others = block.seen != block.targets[rows]
    base = int(block.seen.max()) + 1 if len(block.seen) else 1
    keys = (rows[others] * base + block.seen[others]).unique()
    return torch.stack((keys // base, keys % base), 1)


def nested_tile_scores(z: Tensor, tile: Tensor, sizes: Sequence[int], normalize: bool) -> Iterator[Tensor]:
    """Scores [U, v] of a tile of items [v, D] at each size in turn; each is valid until the next is asked for.

    Equal items are scored equal, to the last bit: a product rounds by the place where a tile has an odd end.
    """
    whole = padded(tile, -len(tile) % TILE_MULTIPLE, 0)
    sums = z.new_zeros(len(z), len(whole))
    scores = sums[:, : len(tile)]
    for first, last in chunks(tuple(sizes)):
        sums.addmm_(z[:, first:last], whole[:, first:last].T)
        if normalize:
            yield scores / tile[:, :last].norm(dim=1).clamp_min(torch.finfo(tile.dtype).tiny)
        else:
            yield scores


def guessed_scores(z: Tensor, target_items: Tensor, sizes: Sequence[int], normalize: bool) -> Tensor:
    """Scores [S, U] of each user's target, of which ``target_items`` [U, D] are the embeddings."""
    guesses = z.new_empty(len(sizes), len(z))
    for first in range(0, len(z), GUESSED):
        rows = z[first : first + GUESSED]
        tile = z.new_zeros(GUESSED, z.shape[1])
        tile[: len(rows)] = target_items[first : first + GUESSED]
        for j, scores in enumerate(nested_tile_scores(rows, tile, sizes, normalize)):
            guesses[j, first : first + GUESSED] = scores.diagonal()[: len(rows)]
    return guesses


class TargetRanks:
    """Target ranks of a group of users among the items of all tiles.

    Args:
        z: outputs [U, D].
        targets: items, int64 [U].
        seen: distinct pairs (user's row, seen item), int64 [h, 2], without targets.
        guesses: of the targets' scores [S, U], see :func:`guessed_scores`.
        sizes: Matryoshka sizes.
        normalize: rank by cosines of each size's prefixes. The norm of z, the same for all items, is omitted.
        list_length: collect so many of each user's best items (:mod:`fmrl_dist.evaluation.top_lists`); 0: none.
    """

    def __init__(
        self,
        z: Tensor,
        targets: Tensor,
        seen: Tensor,
        guesses: Tensor,
        sizes: Sequence[int],
        normalize: bool = False,
        list_length: int = 0,
    ) -> None:
        self.z, self.targets, self.seen = z, targets, seen
        self.sizes, self.normalize = tuple(sizes), normalize
        self.assumed = guesses
        self.lists = TopLists(len(sizes), len(z), list_length, z) if list_length else None
        self.collects = list_length > 0
        self._clear()

    def _clear(self) -> None:
        num_sizes, num_users = self.assumed.shape
        # Numbers of other items: higher, equal, seen and higher, seen and equal.
        self._counts = torch.zeros(4, num_sizes, num_users, dtype=torch.int64, device=self.z.device)
        self._found = torch.full_like(self.assumed, torch.nan)  # the targets' scores in their tiles

    def add(self, ids: Tensor, tile: Tensor) -> None:
        """Compare the targets with the items of one more tile: ids int64 [v], sorted, and embeddings [v, D]."""
        target_columns, here = _places(self.targets, ids)
        seen_columns, is_seen_here = _places(self.seen[:, 1].contiguous(), ids)
        rows, columns = here.nonzero()[:, 0], target_columns[here]
        seen_rows, seen_columns = self.seen[is_seen_here, 0], seen_columns[is_seen_here]
        compared = self.z.new_empty(len(self.z), len(tile))  # sums of floats are far faster than those of booleans
        for j, scores in enumerate(nested_tile_scores(self.z, tile, self.sizes, self.normalize)):
            own = self.assumed[j]
            higher, equal, seen_higher, seen_equal = self._counts[:, j]
            # No NaN score, the target's or another's, improves a rank: what is not lower or equal is higher.
            not_higher = torch.le(scores, own[:, None], out=compared).sum(1).long()
            lower = torch.lt(scores, own[:, None], out=compared).sum(1).long()
            higher += len(tile) - not_higher
            equal += not_higher - lower
            found = scores[rows, columns]
            self._found[j, rows] = found
            higher[rows] -= (~(found <= own[rows])).long()
            equal[rows] -= (found == own[rows]).long()
            seen, against = scores[seen_rows, seen_columns], own[seen_rows]
            seen_higher.index_add_(0, seen_rows, (~(seen <= against)).long())
            seen_equal.index_add_(0, seen_rows, (seen == against).long())
            if self.lists is not None and self.collects:
                self.lists.add(j, ids, scores, seen_rows, seen_columns)

    @property
    def is_settled(self) -> bool:
        """After a whole pass: whether the targets' scores were what was assumed. If not, :meth:`restart`."""
        both_nan = self._found.isnan() & self.assumed.isnan()
        return bool(((self._found == self.assumed) | both_nan).all())

    def restart(self) -> None:
        """Begin another pass, in which the targets' scores are those found in the last."""
        self.assumed = self._found
        self.collects = False  # lists do not depend on targets
        self._clear()

    def found(self) -> Tensor:
        """What the tiles so far say, float64 [U, S, 5]: four counts, and the target's score (NaN if not seen)."""
        return torch.cat((self._counts.double(), self._found[None].double())).permute(2, 1, 0)

    def join(self, parts: Tensor) -> None:
        """Combine what W processes :meth:`found` in their tiles for these users, [W, U, S, 5]."""
        everything = parts.permute(3, 2, 1, 0)  # [5, S, U, W]
        self._counts = everything[:4].sum(3).long()
        elsewhere = everything[4].isnan()
        scores = torch.where(elsewhere, 0, everything[4]).sum(2)
        self._found = torch.where(elsewhere.all(2), torch.nan, scores).to(self.assumed.dtype)

    def result(self) -> Tensor:
        """Target ranks, float64 [2, S, U]: among all items (ALL), and without seen ones (UNSEEN); inf without a score.

        A rank is 1 + the number of items scored higher + half the number of other items scored equal.
        """
        higher, equal, seen_higher, seen_equal = self._counts.double()
        ranks = torch.stack((1 + higher + equal / 2, 1 + higher - seen_higher + (equal - seen_equal) / 2))
        return torch.where(self._found.isnan(), torch.inf, ranks)


def _places(wanted: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The position of each wanted item in the sorted ``ids``, and whether it is there."""
    places = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
    return places, ids[places] == wanted
