"""The text of an item, as in the paper's code: the parts whose fields it has, joined.

``("Title: {title}", "Price: {price}", ...)`` names columns of the item table; a part is left out for an item that lacks
one of its fields. Only plain column names are allowed in braces, with an optional format (``{price:.2f}``): a template
is data from a config, so it may not reach attributes or indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError

UNTITLED = "Untitled Item"

Pieces = list[tuple[str, str | None, str]]  # literal text, then a column and its format


def template_columns(parts: Sequence[str]) -> list[str]:
    """Columns of the item table that the template names, each once."""
    return list(dict.fromkeys(column for part in parts for _, column, _ in _parse(part) if column is not None))


def item_texts(table: pa.Table, parts: Sequence[str], separator: str) -> tuple[list[str], np.ndarray]:
    """Text of every row of ``table``.

    Returns:
        The texts, ``Untitled Item`` for a row without any part, and bool [V], true where there was one.

    Raises:
        UserError: a template is malformed, or its format does not suit a value.
    """
    templates = [_parse(part) for part in parts]
    names = template_columns(parts)
    columns = [_values(table[name]) for name in names]
    texts = []
    for row in zip(*columns, strict=True):
        fields = dict(zip(names, row, strict=True))
        filled = [_fill(pieces, fields) for pieces in templates]
        texts.append(separator.join(part for part in filled if part is not None))
    return [text or UNTITLED for text in texts], np.array([bool(text) for text in texts])


def _parse(part: str) -> Pieces:
    try:
        parsed = list(Formatter().parse(part))
    except ValueError as error:
        raise UserError(f"data.text part {part!r} is malformed: {error}; write it like 'Title: {{title}}'") from None
    pieces: Pieces = []
    for literal, column, spec, conversion in parsed:
        if column is not None and (not column or conversion or any(c in column for c in ".[]") or "{" in (spec or "")):
            raise UserError(f"data.text part {part!r}: in braces may stand only a column name and a format")
        pieces.append((literal, column, spec or ""))
    if all(column is None for _, column, _ in pieces):
        raise UserError(f"data.text part {part!r} names no column; write it like 'Title: {{title}}'")
    return pieces


def _fill(pieces: Pieces, fields: dict[str, Any]) -> str | None:
    """The part with its fields, or None where one is missing."""
    words = []
    for literal, column, spec in pieces:
        words.append(literal)
        if column is None:
            continue
        value = fields[column]
        if value is None:
            return None
        try:
            words.append(format(value, spec) if spec else str(value))
        except (ValueError, TypeError) as error:
            raise UserError(f"data.text: {{{column}:{spec}}} does not suit the value {value!r} ({error})") from None
    return "".join(words)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Python values, None where missing: null, NaN, an empty list, or nothing but white space."""
    if pa.types.is_floating(column.type):
        # NumPy scalars keep the stored type, whose shortest decimal is wanted: a float32 9.99 is not 9.989999771118164.
        return [None if math.isnan(value) else value for value in column.to_numpy()]
    return [_plain(value) for value in column.to_pylist()]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        if value and isinstance(value[0], list):  # paths of categories: the first
            value = value[0]
        value = ", ".join(str(word) for word in value if word is not None)
    if isinstance(value, str):
        return value if value.strip() else None
    return value
