"""Ids of items and users: checked columns, and from an item's external id to its row.

Integers are compared with integers, and anything else as text, so a CSV and a Parquet file with the same rows give the
same store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.id_columns import IdKind, ids_or_null
from shards.tables.column_kinds import is_text


def raw_ids(column: pa.Array | pa.ChunkedArray, where: str, kind: IdKind) -> pa.Array:
    """Ids of a raw table as int64 or large_string; null where there is none, or one of blanks alone.

    Raises:
        UserError: as :func:`ids_or_null`.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        column = column.cast(pa.large_string())
        is_blank = pc.or_(pc.equal(column, ""), pc.utf8_is_space(column))
        column = pc.if_else(is_blank, None, column) if pc.any(is_blank).as_py() else column
    return ids_or_null(column, where, kind)


FLOAT = r"^-?[0-9]+\.0$"  # an integer as a float is written


def check_unique(ids: pa.Array, where: str) -> None:
    """Refuse an id that occurs more than once."""
    counts = pc.value_counts(ids)
    if len(counts) == len(ids):
        return
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    refuse_repeated(len(twice), twice.field("values")[0].as_py(), where)


def check_whole(ids: pa.Array, where: str) -> None:
    """Refuse ids of which all are texts like ``42.0``: integers that were written as floats, as if some were missing.

    Args:
        ids: all ids of a table, without nulls.
        where: begins the message.
    """
    if pa.types.is_large_string(ids.type) and len(ids) and pc.all(pc.match_substring_regex(ids, FLOAT)).as_py():
        refuse_floats(ids[0].as_py(), where)


def refuse_floats(first: str, where: str) -> NoReturn:
    """Raise what :func:`check_whole` does, for ids of which ``first`` comes first."""
    raise UserError(
        f"{where} holds ids such as {first!r}: whole numbers that were written as floats; expected integers or text"
    )


def refuse_repeated(number: int, first: str | int, where: str) -> NoReturn:
    """Raise what :func:`check_unique` does, for so many ids of which ``first`` comes first."""
    raise UserError(
        f"{where} holds {number:,} ids more than once, the first is {first!r}; expected one row for each id"
    )


@dataclass(frozen=True)
class ItemIds:
    """External item ids in table order: the internal id of an item is its row."""

    external: pa.Array  # [V], int64 or large_string

    def find(self, values: pa.Array) -> np.ndarray:
        """Internal ids, int64; -1 where the item is unknown. One pass over the catalogue per call."""
        known = self.external
        if values.type != known.type:  # as text: among integers, the text 0042 is not 42
            values, known = values.cast(pa.large_string()), self._as_text
        rows = pc.index_in(values, value_set=known)
        return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def _as_text(self) -> pa.Array:
        return self.external.cast(pa.large_string())

    def lookup(self, values: pa.Array, where: str) -> np.ndarray:
        """Internal ids, int64.

        Raises:
            UserError: an item is not in the table.
        """
        rows = self.find(values)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise UserError(
                f"{where} names items that are not in the item table, the first is {values[unknown[0]].as_py()!r}; "
                "add them there, or remove these events"
            )
        return rows
