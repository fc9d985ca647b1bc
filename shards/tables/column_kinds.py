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
    """Numbers, dates or timestamps, or text of them.

    Raises:
        UserError: another type.
    """
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    require(
        is_text(kind) or is_number or pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind),
        f"{where} holds times of type {kind}; expected numbers, dates or timestamps",
    )


def require_rating(kind: pa.DataType, where: str) -> None:
    """Numbers, or text of them.

    Raises:
        UserError: another type.
    """
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    require(is_text(kind) or is_number, f"{where} holds ratings of type {kind}; expected numbers")


def require_word(kind: pa.DataType, where: str) -> None:
    """Text or integers: a kind of event, the name of a split.

    Raises:
        UserError: another type.
    """
    kind = _plain(kind)
    require(is_text(kind) or pa.types.is_integer(kind), f"{where} is of type {kind}; expected text")


def require_title(kind: pa.DataType, where: str) -> None:
    """Text, numbers and dates that can be written as text, or lists of words, which are joined.

    Raises:
        UserError: structures, bytes, types that extend Arrow's, or lists of anything else.
    """
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    is_title = is_text(_plain(inner)) if inner is not kind else _is_scalar(_plain(kind))
    require(is_title, f"{where} is of type {kind}; expected text: one title for each item")


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


def as_float64(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers as float64; of a narrower float its shortest decimal, as a text file has it: 0.7, not 0.699999988079071.

    Args:
        column: of integers, decimals or floats; nulls stay.
    """
    if not (pa.types.is_float16(column.type) or pa.types.is_float32(column.type)):
        return column.cast(pa.float64(), safe=False)
    found = column.combine_chunks().dictionary_encode()  # most columns have few values, and texts are slow
    if pa.types.is_float16(column.type):
        shortest = pa.array(
            [float(str(value)) for value in found.dictionary.to_numpy(zero_copy_only=False)], pa.float64()
        )
    else:
        shortest = found.dictionary.cast(pa.string()).cast(pa.float64())
    return pa.chunked_array([shortest.take(found.indices)])


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
    return not (pa.types.is_nested(kind) or is_bytes or isinstance(kind, pa.BaseExtensionType))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
