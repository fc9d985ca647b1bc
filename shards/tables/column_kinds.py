"""Which types of columns serve what, so that a wrong one is refused before hours of encoding, not after."""

from __future__ import annotations

import pyarrow as pa

from fmrl_dist.base.errors import require


def require_ids(kind: pa.DataType, where: str) -> None:
    """Integers or text.

    Raises:
        UserError: another type; ``where`` begins the message.
    """
    kind = _plain(kind)
    require(pa.types.is_integer(kind) or is_text(kind), f"{where} holds ids of type {kind}; expected integers or text")


def require_lists(kind: pa.DataType, where: str) -> pa.DataType:
    """Lists; returns the type of what they hold, or of the text that is parsed to lists.

    Raises:
        UserError: another type.
    """
    kind = _plain(kind)
    if is_text(kind):
        return kind
    require(
        pa.types.is_list(kind) or pa.types.is_large_list(kind),
        f"{where} is of type {kind}; expected lists (or data.sequences.layout: interactions)",
    )
    return kind.value_type


def require_times(kind: pa.DataType, where: str) -> None:
    """Integers or timestamps, or the text of integers in a list of times.

    Raises:
        UserError: another type.
    """
    require(
        is_text(kind) or pa.types.is_integer(kind) or pa.types.is_timestamp(kind),
        f"{where} holds times of type {kind}; expected integers or timestamps",
    )


def require_title(kind: pa.DataType, where: str) -> None:
    """Text, or numbers and dates that can be written as text.

    Raises:
        UserError: lists, structures or bytes.
    """
    require(_is_scalar(_plain(kind)), f"{where} is of type {kind}; expected text: one title for each item")


def require_text(kind: pa.DataType, where: str) -> None:
    """What a text template can hold: text, numbers, dates, lists of them, and lists of such lists (paths).

    Raises:
        UserError: bytes or structures, whose text would be that of a Python object.
    """
    inner = kind
    for _ in range(2):
        inner = inner.value_type if pa.types.is_list(inner) or pa.types.is_large_list(inner) else inner
    require(
        _is_scalar(_plain(inner)),
        f"{where} is of type {kind}; a text template takes text, numbers, dates and lists of them",
    )


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_scalar(kind: pa.DataType) -> bool:
    is_bytes = any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
            pa.types.is_binary_view,
        )
    )
    return not (pa.types.is_nested(kind) or is_bytes)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
