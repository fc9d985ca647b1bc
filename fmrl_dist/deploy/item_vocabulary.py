"""The items of an export by their external ids: ``vocab.parquet``, read once. V items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.data.store.tables import table_batches
from fmrl_dist.deploy.item_filters import is_per_user

ItemId = int | str
ItemIds = Iterable[ItemId]
ItemIdsOfEach = Sequence[ItemIds | None]
REMOVED_COLUMN = "removed"  # bool, only of a vocabulary with items that are not recommended any more
SHOWN = 3  # unknown ids in a message
HASHED_TOGETHER = 256  # ids: a client may ask for the hash of any number of first ones, at this cost and no more


class Recommendation(NamedTuple):
    """One item of a list."""

    item_id: ItemId
    title: str | None
    score: float


def removed_flags(table: pa.Table) -> np.ndarray:
    """Which items of a vocabulary must not be recommended any more, bool [V].

    Raises:
        ValueError: the column is no such list.
    """
    if REMOVED_COLUMN not in table.column_names:
        return np.zeros(table.num_rows, np.bool_)
    column = table.column(REMOVED_COLUMN)
    if column.type != pa.bool_() or column.null_count:
        raise ValueError(f"column {REMOVED_COLUMN} is {column.type} with {column.null_count} nulls; expected bool")
    return column.to_numpy()


class ItemVocabulary:
    """External ids, titles and training counts, in the order of the rows.

    Args:
        data: the file.
        where: it is, for messages.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, data: bytes, where: str) -> None:
        try:
            table = bounded_table(table_batches(data, where), where)
            self.ids: list[ItemId] = table.column("external_id").to_pylist()
            self.train_counts: np.ndarray = table.column("train_count").to_numpy().astype(np.int64)  # [V]
            has_titles = "title" in table.column_names
            self.titles: list[str | None] | None = table.column("title").to_pylist() if has_titles else None
            # Rows that no list may hold, int64, ascending; histories may hold them.
            self.removed: np.ndarray = np.flatnonzero(removed_flags(table))
        except (OSError, pa.ArrowException, LookupError, ValueError, TypeError) as error:
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"the vocabulary {where} cannot be read ({problem}); export again") from None

    @cached_property
    def _hashes(self) -> list[Any]:
        """Unfinished hashes of the first 0, HASHED_TOGETHER, 2 · HASHED_TOGETHER, … ids."""
        hashes = [hashlib.sha256()]
        for start in range(0, len(self.ids) - HASHED_TOGETHER + 1, HASHED_TOGETHER):
            hashes.append(hashes[-1].copy())
            hashes[-1].update(_hashed(self.ids[start : start + HASHED_TOGETHER]))
        return hashes

    @cached_property
    def _hash_of_all(self) -> str:
        digest = self._hashes[-1].copy()
        digest.update(_hashed(self.ids[(len(self._hashes) - 1) * HASHED_TOGETHER :]))
        return digest.hexdigest()

    @cached_property
    def _row_of(self) -> dict[ItemId, int]:
        return {item_id: row for row, item_id in enumerate(self.ids)}

    def rows_of(self, item_ids: Iterable[ItemId], unknown: str = "error") -> np.ndarray:
        """The rows of some items, int64.

        Args:
            item_ids: external ids, integers or text as in the vocabulary.
            unknown: "error", or "skip" to leave out ids that there are not.

        Raises:
            UserError: there is no such item.
        """
        require(unknown in ("error", "skip"), f"unknown is {unknown!r}; expected 'error' or 'skip'")
        require(
            not isinstance(item_ids, str | bytes | int) and isinstance(item_ids, Iterable),
            f"{item_ids!r:.80} is no list of item ids",
        )
        wanted = item_ids.tolist() if isinstance(item_ids, np.ndarray) else list(item_ids)
        found = [self._row(item_id) for item_id in wanted]
        if None in found:
            missing = [item_id for item_id, row in zip(wanted, found, strict=True) if row is None]
            require(
                unknown == "skip",
                f"{len(missing)} of {len(wanted)} ids are of no item, such as "
                f"{', '.join(f'{item_id!r:.60}' for item_id in missing[:SHOWN])}; ids are like {self.ids[0]!r:.60}; "
                "leave unknown ones out with unknown='skip'",
            )
            found = [row for row in found if row is not None]
        return np.array(found, np.int64)

    def find(self, item_ids: pa.Array) -> np.ndarray:
        """Rows of a column of ids of the vocabulary's kind, without nulls, int64; -1 where there is no such item."""
        encoded = item_ids.dictionary_encode()
        return self.places_of(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]

    def places_of(self, item_ids: Sequence[ItemId]) -> np.ndarray:
        """Rows of ids, each an int or a str, int64; -1 where there is no such item."""
        row_of = self._row_of
        return np.fromiter((row_of.get(item_id, -1) for item_id in item_ids), np.int64, len(item_ids))

    def _row(self, item_id: object) -> int | None:
        if isinstance(item_id, np.generic):
            item_id = item_id.item()
        # Python takes True and 1.0 for 1.
        return self._row_of.get(item_id) if type(item_id) in (int, str) else None  # type: ignore[call-overload]

    def rows_of_lists(
        self, lists: ItemIds | ItemIdsOfEach | None, unknown: str = "error"
    ) -> np.ndarray | list[np.ndarray | None] | None:
        """Rows of a filter of external ids: one list for all users, or a list (or None) for each."""
        if lists is None:
            return None
        if isinstance(lists, set | frozenset):
            lists = sorted(lists, key=repr)
        require(
            isinstance(lists, Sequence | np.ndarray), f"{lists!r:.80} is no list of item ids, nor one for each user"
        )
        if not is_per_user(lists):
            return self.rows_of(lists, unknown)  # type: ignore[arg-type]
        return [None if ids is None else self.rows_of(ids, unknown) for ids in lists]  # type: ignore[arg-type]

    def named(self, rows: np.ndarray, scores: np.ndarray) -> list[list[Recommendation]]:
        """Lists of rows [B, k] and scores [B, k] with ids and titles, without what is missing."""
        ids, titles = self.ids, self.titles
        return [
            [
                Recommendation(ids[row], None if titles is None else titles[row], score)
                for row, score in zip(of_user, of_rows, strict=True)
                if row >= 0
            ]
            for of_user, of_rows in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def sha256(self, num_items: int) -> str:
        """Hash of the external ids of the first items: it stays as others are appended.

        All ids are hashed once, at the first call; after that any number of items costs the same little time.
        """
        if num_items == len(self.ids):
            return self._hash_of_all
        before = num_items // HASHED_TOGETHER
        digest = self._hashes[before].copy()
        digest.update(_hashed(self.ids[before * HASHED_TOGETHER : num_items]))
        return digest.hexdigest()


def _hashed(item_ids: Sequence[ItemId]) -> bytes:
    """What a hash reads of some ids."""
    return "".join(f"{item_id!r}\n" for item_id in item_ids).encode()
