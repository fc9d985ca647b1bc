"""Which items each user may be recommended: excluded, allowed and denied rows, of all users or of each.

B users, b users of a block, V items, v items of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from fmrl_dist.base.errors import UserError, require

Rows = np.ndarray | Sequence[int]
RowsOfEach = Sequence[Rows | None]  # of each user; None: no list


@dataclass(frozen=True)
class ItemFilters:
    """The filters of one call; :meth:`of_lists` makes them."""

    only: np.ndarray | None  # rows that any user may have, ascending; None: all
    without: np.ndarray  # rows that no user may have, ascending
    excluded: RaggedRows  # rows that each user may not have
    allowed: RaggedRows  # rows that each limited user may have
    is_limited: np.ndarray  # bool [B]

    @classmethod
    def of_lists(
        cls,
        num_users: int,
        num_items: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> ItemFilters:
        """Filters from lists of rows.

        Args:
            num_users: B.
            num_items: V.
            exclude: rows that each user may not have, B lists (or None).
            allow: rows that all users may have, one list; or a list (None: all rows) for each user; None: all rows.
            deny: rows that users may not have, likewise.

        Raises:
            UserError: there is no such row, or lists are not one per user.
        """

        def of_each(lists: object, name: str) -> RaggedRows:
            assert isinstance(lists, Sequence | np.ndarray)
            require(
                len(lists) == num_users, f"{name} has {len(lists)} lists; expected one for each of {num_users} users"
            )
            arrays = [np.asarray([] if rows is None else rows) for rows in lists]
            return _sound_together(arrays, num_items) or RaggedRows.of(
                [_checked(rows, num_items, name) for rows in arrays]
            )

        only, without, none = None, np.empty(0, np.int64), RaggedRows.of([np.empty(0, np.int64)] * num_users)
        excluded, allowed, is_limited = none, none, np.zeros(num_users, bool)
        if exclude is not None:
            excluded = of_each(exclude, "exclude")
        if isinstance(deny, WithRemoved):
            without = np.unique(_checked(deny.removed, num_items, "removed"))
            excluded = excluded.joined(of_each(deny.of_each, "deny"))
        elif deny is not None and is_per_user(deny):
            excluded = excluded.joined(of_each(deny, "deny"))
        elif deny is not None:
            without = np.unique(_checked(deny, num_items, "deny"))
        if allow is not None and is_per_user(allow):
            allowed = of_each(allow, "allow")
            is_limited = np.array([rows is not None for rows in allow], bool)
            if is_limited.all():
                only = np.unique(allowed.rows)
        elif allow is not None:
            only = np.unique(_checked(allow, num_items, "allow"))
        if only is not None and 2 * len(only) > num_items:  # leaving rows out is less work than copying the others
            is_left_out = np.ones(num_items, bool)
            is_left_out[only] = False
            only, without = None, np.union1d(without, np.flatnonzero(is_left_out))
        return cls(only, without, excluded, allowed, is_limited)

    def of_users(self, first: int, last: int) -> ItemFilters:
        """The filters of a block of users, sorted for :meth:`mask`."""
        return ItemFilters(
            self.only,
            self.without,
            self.excluded.of_users(first, last),
            self.allowed.of_users(first, last),
            self.is_limited[first:last],
        )

    def excluded_of(self, user: int) -> np.ndarray:
        """Rows that one user may not have besides :attr:`without`; to be called on whole filters."""
        begin, end = np.searchsorted(self.excluded.users, (user, user + 1))
        return self.excluded.rows[begin:end]

    def mask(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Put -inf where a user may not have an item of a tile.

        Args:
            rows: of the tile, ascending, int64 [v]; of those in :attr:`only`, if there are such.
            scores: float32 [b, v] of the users that :meth:`of_users` has taken.
        """
        if len(rows) == 0:
            return
        places, is_here = _places(self.without, rows)
        scores[:, places[is_here]] = -np.inf
        if self.is_limited.any():
            users, columns = self.allowed.in_tile(rows)
            kept = scores[users, columns]
            scores[self.is_limited] = -np.inf
            scores[users, columns] = kept
        scores[self.excluded.in_tile(rows)] = -np.inf


@dataclass(frozen=True)
class RaggedRows:
    """A list of rows for each of some users."""

    users: np.ndarray  # int64 [n], whose
    rows: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> RaggedRows:
        users = np.repeat(np.arange(len(lists)), [len(rows) for rows in lists])
        return cls(users, np.concatenate([np.empty(0, np.int64), *lists]))

    def joined(self, others: RaggedRows) -> RaggedRows:
        """These and others of the same users."""
        users = np.concatenate((self.users, others.users))
        order = np.argsort(users, kind="stable")
        return RaggedRows(users[order], np.concatenate((self.rows, others.rows))[order])

    def of_users(self, first: int, last: int) -> RaggedRows:
        """Those of a run of users, in the order of the rows; the first user is 0. To be called on whole lists."""
        begin, end = np.searchsorted(self.users, (first, last))
        order = begin + np.argsort(self.rows[begin:end], kind="stable")
        return RaggedRows(self.users[order] - first, self.rows[order])

    def in_tile(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Users, and columns in a tile of ascending ``rows``, of what :meth:`of_users` has sorted."""
        begin = np.searchsorted(self.rows, rows[0])
        end = np.searchsorted(self.rows, rows[-1], "right")
        places, is_here = _places(self.rows[begin:end], rows)
        return self.users[begin:end][is_here], places[is_here]


class WithRemoved(Sequence[Rows | None]):
    """Denied rows of each user, beside rows that no user may have: those are held once, however many users there are.

    Args:
        of_each: rows of each user, or None.
        removed: rows of all.
    """

    def __init__(self, of_each: RowsOfEach, removed: np.ndarray) -> None:
        self.of_each, self.removed = of_each, removed

    def __len__(self) -> int:
        return len(self.of_each)

    @overload
    def __getitem__(self, user: int) -> Rows | None: ...
    @overload
    def __getitem__(self, user: slice) -> Sequence[Rows | None]: ...
    def __getitem__(self, user: int | slice) -> Rows | None | Sequence[Rows | None]:
        return self.of_each[user]


def is_per_user(lists: object) -> bool:
    """Whether a filter holds a list for each user, rather than rows or ids."""
    if isinstance(lists, WithRemoved):
        return True
    if isinstance(lists, np.ndarray) and lists.dtype != object:
        return lists.ndim > 1
    assert isinstance(lists, Sequence | np.ndarray)
    return any(entry is None or (not isinstance(entry, str) and hasattr(entry, "__len__")) for entry in lists)


def lists_of_users(lists: Any, users: Sequence[int]) -> Any:
    """A filter's lists of some users, if it is per user."""
    if isinstance(lists, WithRemoved):
        return WithRemoved([lists.of_each[user] for user in users], lists.removed)
    return [lists[user] for user in users] if lists is not None and is_per_user(lists) else lists


def with_denied(deny: Rows | RowsOfEach | None, removed: np.ndarray) -> Rows | RowsOfEach | None:
    """``deny`` with rows that no user may have, whatever it is: all users' list, a list for each, or None."""
    if len(removed) == 0:
        return deny
    if deny is None:
        return removed
    if not is_per_user(deny):
        return np.concatenate((_as_rows(deny), removed))
    return WithRemoved(deny, removed)  # type: ignore[arg-type]


def _as_rows(rows: object) -> np.ndarray:
    array = np.asarray(rows)
    if array.size == 0:
        return np.empty(0, np.int64)
    return array if array.dtype.kind in "iu" else array.astype(object)  # which of_lists refuses


def _places(wanted: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted row stands in the ascending ``rows``, and whether it is there."""
    places = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return places, rows[places] == wanted


def _sound_together(arrays: list[np.ndarray], num_items: int) -> RaggedRows | None:
    """Rows of many users, checked at once; None if something may be wrong with them, or some are of another kind."""
    lengths = [array.size for array in arrays]
    filled = [array for array in arrays if array.size]
    if any(array.ndim != 1 or array.dtype != np.int64 for array in filled):
        return None
    rows = np.concatenate([np.empty(0, np.int64), *filled])
    if len(rows) and (rows.min() < 0 or rows.max() >= num_items):
        return None
    return RaggedRows(np.repeat(np.arange(len(arrays)), lengths), rows)


def _checked(rows: object, num_items: int, name: str) -> np.ndarray:
    array = np.asarray(rows)
    if array.size == 0:
        return np.empty(0, np.int64)
    is_sound = array.ndim == 1 and array.dtype.kind in "iu" and int(array.min()) >= 0 and int(array.max()) < num_items
    if not is_sound:
        raise UserError(f"{name} holds {array.tolist()!r:.80}; expected rows of items, from 0 to {num_items - 1}")
    return array.astype(np.int64)
