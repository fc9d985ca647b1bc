"""Amazon reviews, 2023 (Hou and others): reviews and items as JSON Lines, ratings alone as CSV with a header.

``<category>.jsonl``: ``user_id, parent_asin, rating, timestamp``. ``<category>.csv``: the same columns.
``meta_<category>.jsonl``: ``parent_asin, title, price, store, categories`` (a path), ``images``. Times are in
milliseconds. Items are those of ``parent_asin``: products that differ in colour or size are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmrl_dist.config.tables import SequenceTableConfig
from shards.tables.formats.amazon2014 import COLUMNS, item_rows
from shards.tables.formats.amazon2018 import json_object
from shards.tables.formats.item_rows import ItemRow, ItemSource, text_or_none
from shards.tables.text_streams import lines_of

KEYS = ("parent_asin", "store", "categories")
IMAGE_SIZES = ("large", "hi_res", "thumb")  # the first that there is


def event_columns(given: SequenceTableConfig, _: Path) -> SequenceTableConfig:
    """Columns of the reviews, or of the ratings, which have the same names."""
    return replace(
        given,
        layout="interactions",
        user="user_id",
        items="parent_asin",
        rating="rating",
        times="timestamp",
        time_unit="ms",
    )


def read_items(file: Path) -> Iterator[ItemRow | str]:
    """Items of ``meta_<category>.jsonl``."""
    return item_rows(map(json_object, lines_of(file)), KEYS, lambda value: _image_url(value.get("images")))


def _image_url(images: Any) -> str | None:
    """Of the first image; a list of images, or a dictionary of lists by size."""
    if isinstance(images, dict):
        images = [{size: (urls or [None])[0] for size, urls in images.items() if isinstance(urls, list)}]
    image = images[0] if isinstance(images, list) and images and isinstance(images[0], dict) else {}
    return next((url for size in IMAGE_SIZES if (url := text_or_none(image.get(size)))), None)


ITEMS = ItemSource(COLUMNS, read_items)
