"""The demo's item table: texts that show an item's leaf and tier."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from shards.demo.catalogue import NUM_LEAVES, Attributes
from shards.demo.words import (
    ADJECTIVES,
    BRANDS,
    LEAF_PATHS,
    MODEL_ENDS,
    MODEL_STARTS,
    MODEL_WORDS_PER_LEAF,
    TIER_WORDS,
)

TIER_PRICE_FACTOR, TIER_CENTS = (0.5, 1.0, 2.2), (0.99, 0.5, 0.0)  # as in shops: cheap prices end in 99
SHARE_TIER_WORD, SHARE_SECOND_PATH = 0.7, 0.2
SHARE_NO_PRICE, SHARE_NO_BRAND = 0.05, 0.15

ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("price", pa.float64()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.list_(pa.string()))),
    ]
)


def item_table(attributes: Attributes, ids: list[str], seed: int) -> pa.Table:
    """``item_id, title, price, brand, categories``, one row per item; some prices and brands are missing."""
    rng = np.random.default_rng([seed, 3])
    leaf_price = rng.lognormal(3.2, 0.7, size=NUM_LEAVES)
    columns: dict[str, list[object]] = {"item_id": [*ids], "title": [], "price": [], "brand": [], "categories": []}
    for leaf, tier in zip(attributes.leaf.tolist(), attributes.tier.tolist(), strict=True):
        department, group, noun = LEAF_PATHS[leaf]
        word = leaf * MODEL_WORDS_PER_LEAF + int(rng.integers(MODEL_WORDS_PER_LEAF))
        model = (MODEL_STARTS[word // len(MODEL_ENDS)] + MODEL_ENDS[word % len(MODEL_ENDS)]).capitalize()
        tier_word = [str(rng.choice(TIER_WORDS[tier]))] if rng.random() < SHARE_TIER_WORD else []
        columns["title"].append(" ".join([model, *tier_word, str(rng.choice(ADJECTIVES)), noun]))
        price = leaf_price[leaf] * TIER_PRICE_FACTOR[tier] * rng.lognormal(0.0, 0.15)
        columns["price"].append(None if rng.random() < SHARE_NO_PRICE else float(np.ceil(price)) + TIER_CENTS[tier])
        columns["brand"].append(None if rng.random() < SHARE_NO_BRAND else str(rng.choice(BRANDS[tier])))
        second = [["Gifts", f"{department} Gifts"]] if rng.random() < SHARE_SECOND_PATH else []
        columns["categories"].append([[department, group, f"{noun}s"], *second])
    return pa.table(columns, schema=ITEM_SCHEMA)
