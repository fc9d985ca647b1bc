"""Columns of external ids: integers or text, of items and of users."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError

INTEGER = r"^(0|-?[1-9][0-9]*)$"  # as Python prints one

IdKind = Literal["text", "integer"]
MEND = "set data.ids: text, or {items: …, users: …} if only items or only users are integers"


def as_ids(column: pa.ChunkedArray | pa.Array, where: str, kind: IdKind | None = None) -> pa.Array:
    """``column`` as int64 or large_string without nulls.

    Args:
        column: of integers or text.
        where: begins messages.
        kind: what it is to become: text, or integers, written as Python prints them; None for what it is.

    Raises:
        UserError: nulls, a type that is neither integer nor text, or a value that is not written like an integer.
    """
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null ids; remove or fill these rows")
    return ids_or_null(column, where, kind)


def ids_or_null(column: pa.ChunkedArray | pa.Array, where: str, kind: IdKind | None = None) -> pa.Array:
    """:func:`as_ids` where there may be nulls, which stay."""
    found = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    if pa.types.is_null(found):
        found, is_text = pa.large_string(), True
    if not (is_text or pa.types.is_integer(found)):
        raise UserError(f"{where} holds ids of type {found}; expected integers or text")
    plain = column.cast(found)
    plain = plain.combine_chunks() if isinstance(plain, pa.ChunkedArray) else plain
    if is_text:
        plain = plain.cast(pa.large_string())
        return _parsed(plain, where) if kind == "integer" else plain
    try:
        return plain.cast(pa.large_string()) if kind == "text" else plain.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds ids that do not fit int64 ({error}); store them as text") from None


def _parsed(column: pa.Array, where: str) -> pa.Array:
    column = pc.if_else(pc.equal(column, ""), None, column)
    other = column.filter(pc.invert(pc.match_substring_regex(column, INTEGER)))
    if len(other):
        raise UserError(f"{where} holds the id {other[0].as_py()!r}, which is no integer; {MEND}")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds ids that do not fit int64 ({error}); {MEND}") from None
