"""Approximate nearest neighbours: an inverted file of faiss, which looks into the cells nearest to an output alone.

How many cells it looks into is chosen by how many of the items a filter leaves and how long the list is: with fewer
items, the best of them lie in more cells. Filters are exact: items that no user may have are left out inside the index,
those of one user by fetching as many more. What recall was not measured for is searched exactly: lists of more than a
hundred, users with more than a hundred excluded items or an allow list of their own, filters that leave less than an
eighth of the catalogue; and so is a user whose cells hold too few items.

B users, V items, W channels of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.approximate.recall import (
    ALLOWED_SHARES,
    EXCLUDED,
    NO_FILTERS,
    ExactLists,
    check_found,
    check_recall,
    halves,
    measured_recalls,
    share_name,
    too_low,
    vectors_sha256,
    with_spare,
)
from fmrl_dist.deploy.item_filters import ItemFilters, Rows, RowsOfEach, lists_of_users
from fmrl_dist.deploy.retrieval import checked_outputs, top_k

CELLS_PER_ROOT = 4  # cells are so many times the square root of V
TRAINED_PER_CELL = 39  # items at least; faiss warns of fewer
MAX_TRAINED_PER_CELL = 64
SHARES = (1.0, *ALLOWED_SHARES)  # of items that filters leave, descending: cells are chosen for each
TOLERANCE = 0.1  # of shares
SEED = 0


class AnnSearch:
    """Top lists by an index.

    Args:
        vectors: of all items, float32 [V, W].
        index: of them, made by :func:`built_index`.
        probes: how many cells to look into, by share of items and length of the list.
    """

    def __init__(self, vectors: np.ndarray, index: Any, probes: dict[float, dict[int, int]]) -> None:
        self.vectors, self.index, self.probes = vectors, index, probes

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
        num_left = len(self.vectors) if filters.only is None else len(filters.only)
        share = (num_left - len(filters.without)) / len(self.vectors)
        num_excluded = np.bincount(filters.excluded.users, minlength=len(outputs))
        rows, scores = np.full((len(outputs), k), -1, np.int64), np.full((len(outputs), k), -np.inf, np.float32)
        probes = self._probes(share, k)
        is_exact = filters.is_limited | (num_excluded > EXCLUDED) | (probes is None)
        users = np.flatnonzero(~is_exact)
        if len(users):
            fetched = self._fetch(outputs[users], k + int(num_excluded[users].max()), probes or 0, filters)
            for user, found in zip(users.tolist(), fetched, strict=True):
                listed = np.setdiff1d(found[found >= 0], filters.excluded_of(user))  # ascending
                is_exact[user] = len(listed) < k
                if len(listed) >= k:
                    products = np.einsum("nw,w->n", self.vectors[listed], outputs[user])  # equal ones of equal vectors
                    best = np.argsort(-products, kind="stable")[:k]
                    rows[user], scores[user] = listed[best], products[best]
        if is_exact.any():
            exactly = np.flatnonzero(is_exact).tolist()
            lists = [lists_of_users(each, exactly) for each in (exclude, allow, deny)]
            rows[exactly], scores[exactly] = top_k(self.vectors, outputs[exactly], k, *lists)
        return rows, scores

    def _probes(self, share: float, k: int) -> int | None:
        """How many cells to look into; None for an exact search."""
        shares = [measured for measured in self.probes if measured * (1 - TOLERANCE) <= share]
        if not shares:
            return None
        by_length = self.probes[max(shares)]
        above = [length for length in by_length if length >= k]
        below = [length for length in by_length if length <= k]
        return max(by_length[min(above)], by_length[max(below, default=min(above))]) if above else None

    def _fetch(self, outputs: np.ndarray, number: int, probes: int, filters: ItemFilters) -> np.ndarray:
        """Rows of the best items in the cells, int64 [B, number]; -1 where there are fewer."""
        faiss = import_faiss()
        options = faiss.SearchParametersIVF(nprobe=probes)
        if filters.only is not None or len(filters.without):
            is_left = np.full(len(self.vectors), filters.only is None)
            if filters.only is not None:
                is_left[filters.only] = True
            is_left[filters.without] = False
            bits = np.packbits(is_left, bitorder="little")
            options.sel = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        fetched: np.ndarray = self.index.search(outputs, min(number, len(self.vectors)), params=options)[1]
        return fetched


@dataclass(frozen=True)
class AnnRecord:
    """What was chosen, and what was measured."""

    recall: float  # wanted
    cells: int
    probes: dict[str, dict[str, int]]  # cells to look into, by share of items that filters leave and length of the list
    choosing_outputs: int
    held_out_outputs: int
    held_out_recall: dict[str, dict[str, float]]  # by filter and length of the list
    vectors_sha256: str


def calibrated_ann(vectors: np.ndarray, outputs: np.ndarray, recall: float = 0.99) -> tuple[AnnSearch, AnnRecord]:
    """An index with a wanted recall of exact lists, and its record.

    Args:
        vectors: of all items, float32 [V, W].
        outputs: of histories like those that will be asked for, float32 [n, W].
        recall: above 0, below 1.

    Raises:
        UserError: faiss is not installed; ``recall`` is no such number; or there are too few outputs.
    """
    check_recall(recall)
    choosing, checking = halves(outputs)
    index = built_index(vectors)
    search = AnnSearch(vectors, index, {})
    search.probes = _chosen_probes(search, ExactLists.of(vectors, choosing), recall)
    held_out = ExactLists.of(vectors, checking)
    recalls = measured_recalls(search.top_k, held_out)
    while (lengths := too_low(recalls, recall, len(checking))) and _widen(search.probes, lengths, index.nlist):
        recalls = measured_recalls(search.top_k, held_out)
    check_found(recalls, recall, len(checking))
    record = AnnRecord(
        recall=recall,
        cells=index.nlist,
        probes={f"{share:g}": {str(k): probes for k, probes in each.items()} for share, each in search.probes.items()},
        choosing_outputs=len(choosing),
        held_out_outputs=len(checking),
        held_out_recall=recalls,
        vectors_sha256=vectors_sha256(vectors),
    )
    return search, record


def built_index(vectors: np.ndarray) -> Any:
    """An inverted file of vectors [V, W] for products."""
    faiss = import_faiss()
    num_items, channels = vectors.shape
    cells = max(1, min(round(CELLS_PER_ROOT * num_items**0.5), num_items // TRAINED_PER_CELL))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(channels), channels, cells, faiss.METRIC_INNER_PRODUCT)
    order = np.random.default_rng(SEED).permutation(num_items)[: MAX_TRAINED_PER_CELL * cells]
    index.train(vectors[np.sort(order)])
    index.add(vectors)
    return index


def import_faiss() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("retrieval by ann needs faiss; install it with: pip install 'fmrl-dist[ann]'") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _chosen_probes(search: AnnSearch, exact: ExactLists, recall: float) -> dict[float, dict[int, int]]:
    """The fewest cells, of powers of two, with a little more than the recall, for each share and length."""
    chosen: dict[float, dict[int, int]] = {share: {} for share in SHARES}
    probes, cells = 1, search.index.nlist
    while True:
        search.probes = {share: dict.fromkeys(exact.cutoffs, probes) for share in SHARES}
        recalls, is_done = measured_recalls(search.top_k, exact), True
        for share, by_length in chosen.items():
            of_share = [recalls[name] for name in _filters_of(share) if name in recalls]
            for k in exact.cutoffs:
                found = [each[str(k)] for each in of_share if str(k) in each]
                if found and k not in by_length:
                    if min(found) >= with_spare(recall) or probes >= cells:
                        by_length[k] = probes
                    else:
                        is_done = False
        if is_done:
            return {share: by_length for share, by_length in chosen.items() if by_length}
        probes = min(2 * probes, cells)


def _widen(probes: dict[float, dict[int, int]], lengths: set[int], cells: int) -> bool:
    """Look into half as many cells again for lists of some lengths; whether that was possible."""
    is_widened = False
    for by_length in probes.values():
        for k in lengths & by_length.keys():
            is_widened |= by_length[k] < cells
            by_length[k] = min(by_length[k] + (by_length[k] + 1) // 2, cells)
    return is_widened


def _filters_of(share: float) -> tuple[str, ...]:
    return NO_FILTERS if share == 1 else (share_name(share),)
