"""Columns of lists: of Arrow, of JSON, or of a CSV's cells, which hold a JSON list or words separated by spaces."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError
from shards.tables.column_kinds import is_text
from shards.tables.json_lines import list_array, list_of_cell


def as_lists(column: pa.ChunkedArray, where: str, as_ids: bool = False) -> pa.Array:
    """A column of lists as one large list array; cells of text are parsed to lists of text.

    Raises:
        UserError: no lists, or a cell that is none.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.large_list(pa.large_string()))
    if not (is_text(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise UserError(f"{where} is of type {kind}; expected lists (or data.sequences.layout: interactions)")
    lists = _parsed(column, where, as_ids) if is_text(kind) else column.cast(pa.large_list(kind.value_type))
    return lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists


def starts_and_values(column: pa.ChunkedArray, where: str, as_ids: bool = False) -> tuple[np.ndarray, pa.Array]:
    """Starts int64 [n + 1] and the flat values of a column of n lists.

    Raises:
        UserError: as :func:`as_lists`, or a list is null.
    """
    lists = as_lists(column, where, as_ids)
    if lists.null_count:
        raise UserError(f"{where} holds {lists.null_count} null lists; remove these rows, or leave the column out")
    starts = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(lengths_of(lists), out=starts[1:])
    return starts, lists.flatten()


def lengths_of(lists: pa.Array) -> np.ndarray:
    """Length of each list, int64; -1 for null."""
    return pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _parsed(column: pa.ChunkedArray, where: str, as_ids: bool) -> pa.Array | pa.ChunkedArray:
    column = column.cast(pa.large_string())
    trimmed = pc.utf8_trim_whitespace(column)
    if not pc.any(pc.or_(pc.starts_with(trimmed, "["), pc.equal(trimmed, ""))).as_py():
        lists = pc.utf8_split_whitespace(trimmed)
        return lists.cast(pa.large_list(pa.large_string()))
    return list_array([None if cell is None else list_of_cell(cell, where, as_ids) for cell in trimmed.to_pylist()])
