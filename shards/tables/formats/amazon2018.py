"""Amazon reviews, 2018 (Ni and others): reviews and items as JSON Lines, ratings alone as CSV.

``<category>.json.gz`` or ``<category>_5.json.gz``: ``reviewerID, asin, overall, unixReviewTime``. ``<category>.csv``,
without a header: item, user, rating, time. ``meta_<category>.json.gz``: ``asin, title, price`` (text such as
``$12.99``), ``brand``, ``category`` (a path), ``imageURLHighRes``, ``imageURL``. Times are in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmrl_dist.base.table_files import table_kind
from fmrl_dist.config.tables import SequenceTableConfig
from shards.tables.formats.amazon2014 import COLUMNS, ratings
from shards.tables.formats.item_rows import (
    ItemRow,
    ItemSource,
    first_text,
    price_or_none,
    text_or_none,
    words_or_none,
)
from shards.tables.text_streams import lines_of


def event_columns(given: SequenceTableConfig, file: Path) -> SequenceTableConfig:
    """Columns of the reviews, or of the ratings, whose first column is the item."""
    plain = replace(given, layout="interactions", time_unit="s", event="", split="")
    if table_kind(file) == ".csv":
        return ratings(plain, ("item", "user", "rating", "timestamp"))
    return replace(plain, user="reviewerID", items="asin", rating="overall", times="unixReviewTime")


def read_items(file: Path) -> Iterator[ItemRow | str]:
    """Items of ``meta_<category>.json.gz``."""
    for line in lines_of(file):
        value = json_object(line)
        if value is None:
            yield "unreadable line"
        elif (asin := text_or_none(value.get("asin"))) is None:
            yield "no id"
        else:
            yield ItemRow(
                asin,
                title=text_or_none(value.get("title")),
                price=price_or_none(value.get("price")),
                brand=text_or_none(value.get("brand")),
                categories=words_or_none(value.get("category")),
                image_url=first_text(value.get("imageURLHighRes")) or first_text(value.get("imageURL")),
            )


def json_object(line: str | None) -> dict[str, Any] | None:
    """The object on a line; None where there is none."""
    try:
        value = None if line is None else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


ITEMS = ItemSource(COLUMNS, read_items)
