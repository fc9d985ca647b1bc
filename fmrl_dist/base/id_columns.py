"""Columns of external ids: integers or text, of items and of users."""

from __future__ import annotations

import pyarrow as pa

from fmrl_dist.base.errors import UserError


def as_ids(column: pa.ChunkedArray | pa.Array, where: str) -> pa.Array:
    """``column`` as int64 or large_string without nulls.

    Raises:
        UserError: nulls, or a type that is neither integer nor text.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count:
        raise UserError(f"{where} holds {column.null_count} null ids; remove or fill these rows")
    if pa.types.is_integer(kind):
        target: pa.DataType = pa.int64()
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        target = pa.large_string()
    else:
        raise UserError(f"{where} holds ids of type {kind}; expected integers or text")
    try:
        column = column.cast(kind).cast(target)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where} holds ids that do not fit int64 ({error}); store them as text") from None
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
