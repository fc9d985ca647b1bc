"""Tiny raw data sets and the configs that build them: shared by the tests of the store and of what reads it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fmrl_dist.config import Config
from fmrl_dist.plain_values import build as build_config

ITEMS = ["a", "b", "c", "d", "e", "f"]
HISTORIES = {"u1": ["a", "b", "c", "d"], "u2": ["c"], "u3": ["e", "a"], "u4": ["b", "f", "c"], "u5": list("fedcba")}
FEATURE_DIM = 4


def write_items(path: Path, ids: Sequence[Any] = ITEMS) -> None:
    """An item table with a title each, and a price, a brand and categories for some."""
    n = len(ids)
    table = {
        "item_id": ids,
        "title": pa.array([f"Thing {i} of kind {'red' if i % 2 else 'blue'}" for i in range(n)], pa.string()),
        "price": pa.array([None if i % 3 == 2 else i + 0.99 for i in range(n)], pa.float32()),
        "brand": pa.array([None if i % 2 else "Acme" for i in range(n)], pa.string()),
        "categories": pa.array([[["Home", f"Shelf {i}"], ["Sale"]] for i in range(n)], pa.list_(pa.list_(pa.string()))),
    }
    pq.write_table(pa.table(table), path)


def write_histories(path: Path, histories: dict[Any, list[Any]], times: dict[Any, list[int]] | None = None) -> None:
    """A table of sequences."""
    table = {"user_id": list(histories), "item_ids": list(histories.values())}
    if times is not None:
        table["times"] = list(times.values())
    pq.write_table(pa.table(table), path)


def write_raw(root: Path) -> np.ndarray:
    """Item table, histories and a precomputed feature; returns the feature, float32 [V, dim]."""
    root.mkdir(parents=True, exist_ok=True)
    write_items(root / "items.parquet")
    write_histories(root / "sequences.parquet", HISTORIES)
    rows = np.random.default_rng(0).standard_normal((len(ITEMS), FEATURE_DIM)).astype(np.float32)
    np.save(root / "vectors.npy", rows)
    return rows


def tiny_values(root: Path, store: Path) -> dict[str, Any]:
    """Config values for :func:`write_raw`'s data, in blocks small enough to make several shards."""
    return {
        "data": {
            "root": str(root),
            "items": {"title": "title"},
            "features": {"vector": {"source": "npy", "path": "vectors.npy"}},
        },
        "store": {"path": str(store), "users_per_block": 2, "items_per_block": 2, "blocks_per_shard": 2},
    }


def tiny_config(root: Path, store: Path, **data: Any) -> Config:
    """:func:`tiny_values` as a config, with keys of the section ``data`` replaced."""
    values = tiny_values(root, store)
    values["data"] |= data
    config: Config = build_config(Config, values, "")
    return config


def png(colour: tuple[int, int, int], side: int = 16) -> bytes:
    """An image with a darker corner, as PNG bytes."""
    pixels = np.full((side, side, 3), colour, np.uint8)
    pixels[: side // 2, : side // 2] //= 2
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
