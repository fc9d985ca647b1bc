"""Exact retrieval: each user's k best items of a whole catalogue, without ever holding all scores.

B users, V items, D channels. Scores are computed for blocks of users and tiles of items. A tile's scores are compared
once with the last of each user's list so far, and the few that are higher are merged into the lists: they cost little
more than the matrix product. The rows of tiles ascend, so a later item never replaces an earlier one of the same score,
and items scored equal stand in the order of their rows, exactly.

A product rounds by its shape: the same call gives the same digits, but a user's scores in another batch may differ in
the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fmrl_dist.base.errors import require
from fmrl_dist.deploy.item_filters import ItemFilters, Rows, RowsOfEach

Search = Callable[..., tuple[np.ndarray, np.ndarray]]  # the arguments of top_k but the vectors, and its result
USERS_AT_ONCE = 256
MIN_TILE_ITEMS = 4096
TILE_SCORES = 1 << 20  # of a larger tile
MIN_GROUPS = 64  # of a tile's items, see _bound
LOWEST = np.finfo(np.float32).min  # above -inf; not the neighbour of some score, which is 0 where denormals are flushed


def top_k(
    vectors: np.ndarray,
    outputs: np.ndarray,
    k: int,
    exclude: RowsOfEach | None = None,
    allow: Rows | RowsOfEach | None = None,
    deny: Rows | RowsOfEach | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The items with the highest products, the best first, of equal ones the lower row first.

    Args:
        vectors: of all items, float32 [V, D].
        outputs: of the users, float32 [B, D].
        k: items of each list, at least 1; may exceed V.
        exclude, allow, deny: rows, see :meth:`~fmrl_dist.deploy.item_filters.ItemFilters.of_lists`.

    Returns:
        rows int64 [B, k] and scores float32 [B, k]; -1 and -inf where a user has fewer than k items.

    Raises:
        UserError: ``k`` is less than 1, outputs are not finite or have another width, or a filter is none.
    """
    outputs = checked_outputs(outputs, vectors, k)
    filters = ItemFilters.of_lists(len(outputs), len(vectors), exclude, allow, deny)
    best = TopK(len(outputs), k)
    for first in range(0, len(outputs), USERS_AT_ONCE):
        last = min(first + USERS_AT_ONCE, len(outputs))
        of_users, lists = filters.of_users(first, last), best.of_users(first, last)
        for rows, scores in _tiles(vectors, outputs[first:last], filters.only):
            of_users.mask(rows, scores)
            lists.add(rows, scores)
    return best.rows, best.scores


def checked_outputs(outputs: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Outputs as :func:`top_k` takes them, with the errors that it raises."""
    require(
        isinstance(k, int | np.integer) and not isinstance(k, bool) and k >= 1, f"k is {k!r}; expected 1 or more items"
    )
    outputs = np.ascontiguousarray(outputs, np.float32)
    require(
        outputs.ndim == 2 and outputs.shape[1] == vectors.shape[1],
        f"outputs have the shape {list(outputs.shape)}; expected [users, {vectors.shape[1]}]",
    )
    require(bool(np.isfinite(outputs).all()), "outputs are not finite: they cannot be ranked with")
    return outputs


def _tiles(vectors: np.ndarray, z: np.ndarray, only: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [v], ascending, and scores [b, v] of each tile; they are valid until the next is asked for."""
    tile_items = max(MIN_TILE_ITEMS, TILE_SCORES // len(z))
    count = len(vectors) if only is None else len(only)
    buffer = np.empty(len(z) * min(tile_items, count), np.float32)
    for first in range(0, count, tile_items):
        last = min(first + tile_items, count)
        rows = np.arange(first, last) if only is None else only[first:last]
        tile = vectors[first:last] if only is None else vectors[rows]
        scores = buffer[: len(z) * len(rows)].reshape(len(z), len(rows))
        if len(z) == 1:
            np.dot(tile, z[0], out=scores[0])
        else:  # far faster than NumPy's for a few users
            torch.mm(torch.from_numpy(z), torch.from_numpy(tile).T, out=torch.from_numpy(scores))
        yield rows, scores


class TopK:
    """The best items so far of B users."""

    def __init__(self, num_users: int, k: int) -> None:
        self.rows = np.full((num_users, k), -1, np.int64)  # the best first
        self.scores = np.full((num_users, k), -np.inf, np.float32)
        self._is_new = True

    def of_users(self, first: int, last: int) -> TopK:
        """A view of a run of users."""
        view = TopK(0, 1)
        view.rows, view.scores = self.rows[first:last], self.scores[first:last]
        return view

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Merge a tile: rows int64 [v], ascending and above all before, and scores float32 [B, v]; -inf is no item."""
        is_near = scores >= _bound(scores, self.rows.shape[1]) if self._is_new else scores > self.scores[:, -1:]
        self._is_new = False
        places = np.flatnonzero(is_near)
        if len(places):
            users, columns = np.divmod(places, scores.shape[1])
            self._merge(users, rows[columns], scores.reshape(-1)[places])

    def _merge(self, users: np.ndarray, rows: np.ndarray, scores: np.ndarray) -> None:
        touched, places = np.unique(users, return_inverse=True)
        k = self.rows.shape[1]
        owners = np.concatenate((np.repeat(np.arange(len(touched)), k), places))
        rows = np.concatenate((self.rows[touched].reshape(-1), rows))
        scores = np.concatenate((self.scores[touched].reshape(-1), scores))
        order = np.lexsort((rows, -scores, owners))
        kept = order[np.searchsorted(owners[order], np.arange(len(touched)))[:, None] + np.arange(k)]
        self.rows[touched], self.scores[touched] = rows[kept], scores[kept]


def _bound(scores: np.ndarray, k: int) -> np.ndarray:
    """What each user's k best items in a tile [b, v] score at least, and few others do, finite, [b, 1].

    The items are put into groups. Each of the k best groups has an item that is no worse than the k-th best group's
    best one; so at least k items are no worse than that.
    """
    num_items = scores.shape[1]
    if k > num_items:
        return np.full((len(scores), 1), LOWEST, np.float32)
    num_groups = min(max(MIN_GROUPS, 8 * k), num_items)
    whole = num_items // num_groups * num_groups
    groups = torch.from_numpy(scores)[:, :whole].unflatten(1, (-1, num_groups)).amax(1).numpy()
    least: np.ndarray = np.partition(groups, num_groups - k, axis=1)[:, num_groups - k, None]
    return np.maximum(least, LOWEST)
