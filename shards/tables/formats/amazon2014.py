"""Amazon reviews, 2014 (McAuley and others): reviews as JSON Lines, ratings alone as CSV, items as Python literals.

``reviews_<category>.json.gz``: ``reviewerID, asin, overall, unixReviewTime``. ``ratings_<category>.csv``, without
a header: user, item, rating, time. ``meta_<category>.json.gz``: on each line a Python dictionary with ``asin``,
``title``, ``price``, ``brand``, ``categories`` (a list of paths) and ``imUrl``. Times are in seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmrl_dist.base.table_files import table_kind
from fmrl_dist.config.tables import CsvConfig, SequenceTableConfig
from shards.tables.csv_files import UNREADABLE
from shards.tables.formats.item_rows import (
    ItemRow,
    ItemSource,
    first_text,
    price_or_none,
    text_or_none,
    words_or_none,
)
from shards.tables.text_streams import lines_of

MOST_BYTES = 1_000_000  # of a line of items, before it is parsed
KEYS = ("asin", "brand", "categories")
COLUMNS = ("item_id", "title", "price", "brand", "categories", "image_url")


def event_columns(given: SequenceTableConfig, file: Path) -> SequenceTableConfig:
    """Columns of the reviews, or of the ratings."""
    plain = replace(given, layout="interactions", times="timestamp", time_unit="s")
    if table_kind(file) == ".csv":
        return ratings(plain, ("user", "item", "rating", "timestamp"))
    return replace(plain, user="reviewerID", items="asin", rating="overall", times="unixReviewTime")


def ratings(plain: SequenceTableConfig, names: tuple[str, ...]) -> SequenceTableConfig:
    """A CSV without a header, of columns of these names."""
    csv = CsvConfig(header=False, names=names)
    return replace(plain, user="user", items="item", rating="rating", csv=csv)


def read_items(file: Path) -> Iterator[ItemRow | str]:
    """Items of ``meta_<category>.json.gz``; nothing is evaluated: a line must be a literal."""
    lines = map(_literal, lines_of(file, most_bytes=MOST_BYTES))
    return item_rows(lines, KEYS, lambda value: first_text(value.get("imUrl")))


def item_rows(
    values: Iterable[dict[str, Any] | None],
    keys: tuple[str, str, str],
    image_url: Callable[[dict[str, Any]], str | None],
) -> Iterator[ItemRow | str]:
    """Items from the objects on lines, and why a line gives none.

    Args:
        values: by line; None where it holds no object.
        keys: of the id, the brand and the categories; title and price have one name in all years.
        image_url: of an object.
    """
    item_id, brand, categories = keys
    for value in values:
        if value is None:
            yield UNREADABLE
        elif (asin := text_or_none(value.get(item_id))) is None:
            yield "no id"
        else:
            yield ItemRow(
                asin,
                title=text_or_none(value.get("title")),
                price=price_or_none(value.get("price")),
                brand=text_or_none(value.get(brand)),
                categories=words_or_none(value.get(categories)),
                image_url=image_url(value),
            )


def _literal(line: str | None) -> dict[str, Any] | None:
    if line is None:
        return None
    try:
        value = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


ITEMS = ItemSource(COLUMNS, read_items)
