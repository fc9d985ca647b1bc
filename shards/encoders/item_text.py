"""The text of an item, as in the paper's code: the parts whose fields the item has, joined.

``("Title: {title}", "Price: {price}", ...)`` names columns of the item table. A part is left out for an item that lacks
one of its fields. Braces may hold only a column name and an optional format (``{price:.2f}``): a template is data from
a config, so it must not reach attributes or indices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fmrl_dist.base.errors import UserError
from shards.tables.column_kinds import as_float64

DEFAULT_PARTS = ("Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}")
UNTITLED = "Untitled Item"
# of a column, or of the field of one by a dotted name: no attribute, as tables are asked for it
COLUMN = re.compile(r"[^.\[\]]+|[^.\[\]\d][^.\[\]]*(\.[^._\[\]][^.\[\]]*)+")
NO_TEXT = re.compile(r"[,_%+]|[bcdeEfFgGnoxX]$")  # a format that no text fits
MAX_WIDTH = 1000  # of a format: a width of 10^9 would be a text of that many characters for each item

Pieces = list[tuple[str, str | None, str]]  # literal text, then a column and its format


class ItemTexts(NamedTuple):
    """The texts of all V items."""

    texts: list[str]  # :data:`UNTITLED` for an item without any part
    present: np.ndarray  # bool [V], false for those


def template_columns(parts: Sequence[str]) -> list[str]:
    """Columns of the item table that the template names, each once."""
    return list(dict.fromkeys(column for part in parts for _, column, _ in _parse(part) if column is not None))


def number_columns(parts: Sequence[str]) -> set[str]:
    """Columns that the template names only with formats of numbers or dates: ``{price:.2f}``."""
    uses = [(column, spec) for part in parts for _, column, spec in _parse(part) if column is not None]
    return {column for column, _ in uses} - {column for column, spec in uses if not NO_TEXT.search(spec)}


def parts_for(given: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    """The template that a config gives; without one, those of :data:`DEFAULT_PARTS` whose columns the item table has.

    Raises:
        UserError: it has none of them.
    """
    if given:
        return given
    parts = [part for part in DEFAULT_PARTS if set(template_columns([part])) <= set(columns)]
    if not parts:
        raise UserError(
            f"the item table has none of the columns {', '.join(template_columns(DEFAULT_PARTS))}, which the default "
            f"item text is made of; it has: {', '.join(columns)}: name yours with data.text, such as "
            "'[\"Title: {name}\"]'"
        )
    return parts


def item_texts(table: pa.Table, parts: Sequence[str], separator: str) -> ItemTexts:
    """Text of every row of ``table``.

    Raises:
        UserError: a template is malformed, its format does not fit a value, or a time is of no year from 1 to 9999.
    """
    templates = [_parse(part) for part in parts]
    names = template_columns(parts)
    columns = [cell_values(table[name], name) for name in names]
    texts = []
    for row in zip(*columns, strict=True):
        fields = dict(zip(names, row, strict=True))
        filled = [_fill(pieces, fields) for pieces in templates]
        texts.append(separator.join(part for part in filled if part is not None))
    return ItemTexts([text or UNTITLED for text in texts], np.array([bool(text) for text in texts]))


def _parse(part: str) -> Pieces:
    try:
        parsed = list(Formatter().parse(part))
    except ValueError as error:
        raise UserError(f"data.text part {part!r} is malformed: {error}; write it like 'Title: {{title}}'") from None
    pieces: Pieces = []
    for literal, column, spec, conversion in parsed:
        if column is not None and (not COLUMN.fullmatch(column) or conversion or "{" in (spec or "")):
            raise UserError(f"data.text part {part!r}: braces may hold only a column name and a format")
        if any(int(number) > MAX_WIDTH for number in re.findall(r"\d{1,20}", spec or "")):
            raise UserError(f"data.text part {part!r}: a format with a number above {MAX_WIDTH}; write a smaller one")
        pieces.append((literal, column, spec or ""))
    if all(column is None for _, column, _ in pieces):
        raise UserError(f"data.text part {part!r} names no column; write it like 'Title: {{title}}'")
    return pieces


def _fill(pieces: Pieces, fields: dict[str, Any]) -> str | None:
    """The part with its fields filled in, or None where one is missing."""
    words = []
    for literal, column, spec in pieces:
        words.append(literal)
        if column is None:
            continue
        value = fields[column]
        if value is None:
            return None
        try:
            words.append(format(value, spec) if spec else as_text(value))
        except (ValueError, TypeError) as error:
            raise UserError(f"data.text: {{{column}:{spec}}} does not fit the value {value!r} ({error})") from None
    return "".join(words)


def as_text(value: Any) -> str:
    """A value of a cell, written alike for all kinds of files: truth as JSON has it, numbers as Python prints them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def cell_values(column: pa.ChunkedArray, name: str) -> list[Any]:
    """Python values; None where missing: null, NaN, an empty list, or only white space. Lists are joined by ", ",
    without what is missing in them.

    Raises:
        UserError: a time that Python cannot hold, in column ``name`` of the item table.
    """
    if pa.types.is_floating(column.type):
        return [None if math.isnan(value) else value for value in as_float64(column).to_numpy()]
    column = column.cast(_in_microseconds(column.type), safe=False)
    number = _number_of(column.type)
    try:
        return [_plain(value, number) for value in column.to_pylist()]
    except OverflowError:
        raise UserError(
            f"column {name!r} of the item table: {_first_far(column)}; expected years from 1 to 9999, and durations as "
            "long: mend it, or leave the column out of data.text"
        ) from None


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """A type of times, or of lists of them, without the nanoseconds that Python's times lack."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_in_microseconds(kind.value_type))
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    return pa.time64("us") if pa.types.is_time64(kind) else kind


def _first_far(column: pa.ChunkedArray) -> str:
    """The first value that Python cannot hold."""
    for row, value in enumerate(column):
        try:
            value.as_py()
        except OverflowError:
            return f"row {row + 1:,} holds {getattr(value, 'value', 'a value')} of type {column.type}"
    raise AssertionError("no value is out of range")


def _number_of(kind: pa.DataType) -> Callable[[Any], Any]:
    """What becomes of the values in a type of lists: of floats None for NaN, and the shortest decimal of their type."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    if not pa.types.is_floating(kind):
        return lambda value: value
    to_type = kind.to_pandas_dtype()
    return lambda value: None if value is None or math.isnan(value) else float(str(to_type(value)))


def _plain(value: Any, number: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        if value and isinstance(value[0], list):  # several category paths: the first counts
            value = value[0]
        value = ", ".join(as_text(word) for word in map(number, value) if word is not None)
    if isinstance(value, str):
        return value if value.strip() else None
    return value
