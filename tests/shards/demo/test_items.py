"""The demo's items: columns, what their texts say, and what their images show."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shards.demo.catalogue import NUM_HUES, NUM_LEAVES, Attributes
from shards.demo.folder import FILES
from shards.demo.item_images import IMAGE_SIZE_PX
from shards.demo.words import BRANDS, LEAF_PATHS, MODEL_ENDS, MODEL_STARTS, MODEL_WORDS_PER_LEAF, TIER_WORDS
from tests.fixtures.demo import ITEMS


def test_columns(demo: Path) -> None:
    columns = {file: {f.name: str(f.type) for f in pq.read_schema(demo / file)} for file in FILES}
    lists = "list<element: "
    assert columns["sequences.parquet"] == {
        "user_id": "string",
        "item_ids": f"{lists}string>",
        "timestamps": f"{lists}int64>",
    }
    assert columns["items.parquet"] == {
        "item_id": "string",
        "title": "string",
        "price": "double",
        "brand": "string",
        "categories": f"{lists}{lists}string>>",
    }
    assert columns["images.parquet"] == {"item_id": "string", "image": "binary"}


def test_text_tells_leaf_and_tier_but_neither_hue_nor_motif(demo: Path, attributes: Attributes) -> None:
    items = pq.read_table(demo / "items.parquet").to_pydict()
    assert len(set(items["item_id"])) == ITEMS
    assert None not in items["title"]
    assert abs(items["price"].count(None) / ITEMS - 0.05) < 0.02
    assert abs(items["brand"].count(None) / ITEMS - 0.15) < 0.03
    paths = [tuple(paths[0]) for paths in items["categories"]]
    assert paths == [(d, g, f"{leaf}s") for d, g, leaf in (LEAF_PATHS[row] for row in attributes.leaf)]
    assert 0.1 < np.mean([len(paths) == 2 for paths in items["categories"]]) < 0.3
    tier_of_brand = {brand: tier for tier, brands in enumerate(BRANDS) for brand in brands}
    tier_of_word = {word: tier for tier, words in enumerate(TIER_WORDS) for word in words}
    for row, (title, brand) in enumerate(zip(items["title"], items["brand"], strict=True)):
        assert brand is None or tier_of_brand[brand] == attributes.tier[row]
        assert all(tier_of_word.get(word, attributes.tier[row]) == attributes.tier[row] for word in title.split())
    assert len(MODEL_STARTS) * len(MODEL_ENDS) == NUM_LEAVES * MODEL_WORDS_PER_LEAF


def test_images_decode_and_show_the_hue(demo: Path, attributes: Attributes) -> None:
    images = pq.read_table(demo / "images.parquet").to_pydict()
    rows = [int(item_id.removeprefix("item-")) for item_id in images["item_id"]]
    assert len(set(rows)) == len(rows)
    assert abs(1 - len(rows) / ITEMS - 0.05) < 0.02
    wrong = 0
    for row, encoded in zip(rows[:400], images["image"][:400], strict=True):
        image = Image.open(io.BytesIO(encoded))
        assert (image.size, image.mode) == ((IMAGE_SIZE_PX, IMAGE_SIZE_PX), "RGB")
        pixels = np.asarray(image).reshape(-1, 3) / 255
        most_coloured = pixels[np.ptp(pixels, axis=1).argmax()]
        hue = int(colorsys.rgb_to_hsv(*most_coloured)[0] * NUM_HUES)
        wrong += hue != attributes.hue[row]
    assert wrong == 0
