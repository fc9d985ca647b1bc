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
from shards.tables.formats.amazon2014 import COLUMNS, item_rows, ratings
from shards.tables.formats.item_rows import ItemRow, ItemSource, first_text
from shards.tables.text_streams import lines_of

KEYS = ("asin", "brand", "category")


def event_columns(given: SequenceTableConfig, file: Path) -> SequenceTableConfig:
    """Columns of the reviews, or of the ratings, whose first column is the item."""
    plain = replace(given, layout="interactions", times="timestamp", time_unit="s")
    if table_kind(file) == ".csv":
        return ratings(plain, ("item", "user", "rating", "timestamp"))
    return replace(plain, user="reviewerID", items="asin", rating="overall", times="unixReviewTime")


def read_items(file: Path) -> Iterator[ItemRow | str]:
    """Items of ``meta_<category>.json.gz``."""
    return item_rows(map(json_object, lines_of(file)), KEYS, _image_url)


def _image_url(value: dict[str, Any]) -> str | None:
    return first_text(value.get("imageURLHighRes")) or first_text(value.get("imageURL"))


def json_object(line: str | None) -> dict[str, Any] | None:
    """The object on a line; None where there is none."""
    try:
        value = None if line is None else json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


ITEMS = ItemSource(COLUMNS, read_items)
