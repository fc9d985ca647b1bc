"""The Matryoshka funnel: a shortlist by a few channels of all items, ranked again by whole vectors.

    scan      int8 products of the first m rotated channels of every item; of 64 items, only the largest is kept
    seeds     the best few of these, scored by whole vectors: the user's k-th best item is no worse than their k-th
    shortlist every item whose prefix score is at most a margin below that
    ranking   the shortlist by whole vectors

The margin is a multiple of the length of what the prefix does not see of the user's output. How large it must be for a
wanted recall is measured (:mod:`fmrl_dist.deploy.approximate.calibration`). So a user whose best items stand out gets a
short list, and one whose scores are flat a long one, or an exact search. A filter takes items out before anything is
compared: the list never holds one of them, and the margin means the same for those that are left.

B users, V items, W channels of vectors, m of the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fmrl_dist.deploy.approximate.int8_prefix import BLOCK_ITEMS, LARGEST_PRODUCT, LEAST_PRODUCT, Int8Prefix
from fmrl_dist.deploy.item_filters import ItemFilters, Rows, RowsOfEach, lists_of_users
from fmrl_dist.deploy.retrieval import checked_outputs, top_k

USERS_AT_ONCE = 64
SEEDS_PER_ITEM, MIN_SEEDS = 2, 16  # of a list
SMALL_CATALOGUE = 16_384  # an exact search of so few items costs no more
LONGEST_SHARE = 1 / 4  # of all items in a shortlist; an exact search costs less than more


def is_small(num_items: int) -> bool:
    """Whether so few items are searched exactly, always."""
    return num_items <= SMALL_CATALOGUE


@dataclass(frozen=True)
class Margins:
    """How far below the k-th best score a prefix score may be, in lengths of what it does not see, by k."""

    cutoffs: tuple[int, ...]  # ascending
    values: tuple[float, ...]  # not negative

    def __post_init__(self) -> None:
        assert len(self.cutoffs) == len(self.values) >= 1

    def of(self, k: int) -> float:
        """For lists of k: the larger one of the nearest cutoffs up to and above k."""
        below = max((place for place, cutoff in enumerate(self.cutoffs) if cutoff <= k), default=0)
        above = below if self.cutoffs[below] == k else min(below + 1, len(self.cutoffs) - 1)
        return max(self.values[below], self.values[above])

    def widened(self, lengths: set[int]) -> Margins:
        """Those of some lengths of lists a tenth larger, and a little."""
        return Margins(
            self.cutoffs,
            tuple(
                1.1 * value + 0.02 if cutoff in lengths else value
                for cutoff, value in zip(self.cutoffs, self.values, strict=True)
            ),
        )


class FunnelSearch:
    """Top lists by a prefix and margins.

    Args:
        vectors: of all items, float32 [V, W].
        rotation: orthogonal, float32 [W, W].
        prefix: of the rotated vectors.
        margins: for the recall that is wanted.
    """

    def __init__(self, vectors: np.ndarray, rotation: np.ndarray, prefix: Int8Prefix, margins: Margins) -> None:
        self.vectors, self.rotation, self.prefix, self.margins = vectors, rotation, prefix, margins

    def top_k(
        self,
        outputs: np.ndarray,
        k: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :func:`fmrl_dist.deploy.retrieval.top_k`, but that a list may miss items, as rarely as was promised."""
        outputs = checked_outputs(outputs, self.vectors, k)
        filters = ItemFilters.of_lists(len(outputs), len(self.vectors), exclude, allow, deny)
        num_items = len(self.vectors) if filters.only is None else len(filters.only)
        rows, scores = np.full((len(outputs), k), -1, np.int64), np.full((len(outputs), k), -np.inf, np.float32)
        is_exact = filters.is_limited | is_small(num_items) | (k > LONGEST_SHARE * num_items)
        users = np.flatnonzero(~is_exact)
        if len(users):
            items = _Items.of(self.vectors, self.prefix, filters)
            for user, search in zip(users, self._searches(outputs[users], k, items), strict=True):
                with items.without(filters.excluded_of(int(user))):
                    shortlist = search.shortlist(self.margins.of(k))
                is_exact[user] = shortlist is None
                if shortlist is not None:
                    rows[user], scores[user] = _best(shortlist, items.scores(shortlist, search.z), k)
        if is_exact.any():
            exactly = np.flatnonzero(is_exact).tolist()
            lists = [lists_of_users(each, exactly) for each in (exclude, allow, deny)]
            rows[exactly], scores[exactly] = top_k(self.vectors, outputs[exactly], k, *lists)
        return rows, scores

    def shortlist_lengths(self, outputs: np.ndarray, k: int) -> np.ndarray:
        """How many items are ranked by whole vectors for each of some outputs, int64 [B]; V for an exact search."""
        if is_small(len(self.vectors)):
            return np.full(len(outputs), len(self.vectors))
        items = _Items.of(self.vectors, self.prefix, ItemFilters.of_lists(len(outputs), len(self.vectors)))
        shortlists = [search.shortlist(self.margins.of(k)) for search in self._searches(outputs, k, items)]
        return np.array([len(self.vectors) if rows is None else len(rows) for rows in shortlists])

    def needed_margins(self, outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The margin that would have let each item into an output's shortlist, float64 [B, k]; -inf: it is a seed.

        Args:
            outputs: float32 [B, W].
            wanted: rows of the k best items of each, int64 [B, k].
        """
        items = _Items.of(self.vectors, self.prefix, ItemFilters.of_lists(len(outputs), len(self.vectors)))
        searches = self._searches(outputs, wanted.shape[1], items)
        return np.stack([search.needed_margins(rows) for search, rows in zip(searches, wanted, strict=True)])

    def _searches(self, outputs: np.ndarray, k: int, items: _Items) -> Iterator[_OneSearch]:
        """The search of each output, after the scan."""
        num_seeds = min(max(SEEDS_PER_ITEM * k, MIN_SEEDS), items.prefix.num_blocks)
        for first in range(0, len(outputs), USERS_AT_ONCE):
            block = outputs[first : first + USERS_AT_ONCE]
            queries = items.prefix.queries(block @ self.rotation)
            maxima = items.prefix.block_maxima(queries)
            seed_blocks = maxima.topk(num_seeds, dim=1, sorted=False).indices.numpy()
            of_each = zip(
                block, queries.values, queries.scales, queries.unseen, maxima.numpy(), seed_blocks, strict=True
            )
            for z, query, scale, unseen, of_blocks, best in of_each:
                yield _OneSearch(items, k, z, query, float(scale), float(unseen), of_blocks, best)


@dataclass(frozen=True)
class _OneSearch:
    """The search for one output's list of k, after the scan."""

    items: _Items
    k: int
    z: np.ndarray  # the output, float32 [W]
    query: Tensor  # int8 [padded m]
    scale: float  # of its products
    unseen: float  # length of what its prefix scores leave out
    maxima: np.ndarray  # the largest product of each block, int32 [C]
    seed_blocks: np.ndarray  # those where it is largest

    def _seeds(self) -> tuple[float, np.ndarray] | None:
        """The k-th best whole score among the seeds, and the rows of those that have it or a better one.

        None if filters leave fewer than k.
        """
        rows, products = self.items.in_blocks(self.seed_blocks, self.query)
        if len(rows) < self.k:
            return None
        number = min(max(len(self.seed_blocks), self.k), len(rows))
        best = np.flatnonzero(products >= np.partition(products, len(rows) - number)[len(rows) - number])
        scores = self.items.scores(rows[best], self.z)
        last = np.partition(scores, len(scores) - self.k)[len(scores) - self.k]
        return float(last), rows[best[scores >= last]]

    def shortlist(self, margin: float) -> np.ndarray | None:
        """Rows, at least k; None where an exact search costs less than ranking them all."""
        seeds = self._seeds()
        if seeds is None:
            return None
        last, best = seeds
        least = int(np.clip(np.floor((last - margin * self.unseen) / self.scale), LEAST_PRODUCT, LARGEST_PRODUCT))
        blocks = np.flatnonzero(self.maxima >= least)
        if len(blocks) * BLOCK_ITEMS > LONGEST_SHARE * len(self.items.prefix):
            return None
        if len(blocks) == 0:
            return best
        rows, _ = self.items.in_blocks(blocks, self.query, least)
        return np.union1d(rows, best)

    def needed_margins(self, rows: np.ndarray) -> np.ndarray:
        """See :meth:`FunnelSearch.needed_margins`."""
        seeds = self._seeds()
        assert seeds is not None, "there is no filter"
        last, best = seeds
        below = last - self.scale * self.items.prefix.products(self.query, rows)
        return np.where(np.isin(rows, best), -np.inf, below / max(self.unseen, np.finfo(np.float64).tiny))


class _Items:
    """What one call searches: all items, or those that a filter for all users allows.

    Args:
        vectors: of all items, float32 [V, W].
        prefix: of those that are searched.
        only: their rows, ascending; None for all.
        is_out: of those that are searched, which no user may have, bool.
    """

    def __init__(self, vectors: np.ndarray, prefix: Int8Prefix, only: np.ndarray | None, is_out: np.ndarray) -> None:
        self.vectors, self.prefix, self._only, self._is_out = vectors, prefix, only, is_out

    @classmethod
    def of(cls, vectors: np.ndarray, prefix: Int8Prefix, filters: ItemFilters) -> _Items:
        is_out = np.zeros(len(vectors), bool)
        is_out[filters.without] = True
        if filters.only is None:
            return cls(vectors, prefix, None, is_out)
        return cls(vectors, prefix.of_rows(filters.only), filters.only, is_out)

    @contextmanager
    def without(self, rows: np.ndarray) -> Iterator[None]:
        """Leave out rows of one user, besides those of all."""
        before = self._is_out[rows]
        self._is_out[rows] = True
        try:
            yield
        finally:
            self._is_out[rows] = before

    def in_blocks(self, blocks: np.ndarray, query: Tensor, least: int = LEAST_PRODUCT) -> tuple[np.ndarray, np.ndarray]:
        """Rows and products as of :meth:`Int8Prefix.in_blocks`, of the items that are not left out."""
        rows, products = self.prefix.in_blocks(blocks, query, least)
        rows = rows if self._only is None else self._only[rows]
        is_in = ~self._is_out[rows]
        return rows[is_in], products[is_in]

    def scores(self, rows: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Whole scores float32 [n] of some rows for one output [W]: equal for equal vectors, wherever they stand."""
        scores: np.ndarray = np.einsum("nw,w->n", self.vectors[rows], z)
        return scores


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best, the best first, of equal ones the lower row first."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    rows, scores = rows[scores >= least], scores[scores >= least]
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]
