"""Near-duplicates by tiles equal those of a plain loop over all pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from shards.store_page import near_duplicates as module
from shards.store_page.near_duplicates import NEAR, near_duplicates
from tests.fixtures.stores import tiny_config, write_histories

NUM_ITEMS, DIM = 70, 6
Shop = tuple[Store, np.ndarray]  # the rows that went into it


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Rows of which every seventh is that of the first, larger and slightly turned; two items lack the feature."""
    root = tmp_path_factory.mktemp("near")
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((NUM_ITEMS, DIM)).astype(np.float16)
    rows[::7] = 3 * rows[0] + generator.standard_normal((10, DIM)).astype(np.float16) / 100
    rows[[3, 9]] = 0
    np.save(root / "vectors.npy", rows)
    pq.write_table(pa.table({"item_id": list(range(NUM_ITEMS)), "title": ["x"] * NUM_ITEMS}), root / "items.parquet")
    write_histories(root / "sequences.parquet", {1: [0, 1, 2, 3]})
    return build_store(tiny_config(root, root / "store"))[0], rows


@pytest.mark.parametrize("tile_rows", [1, 16, 512])
def test_pairs_equal_a_plain_loop(shop: Shop, tile_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, half = shop
    monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    (found,) = near_duplicates(store)
    present = [item for item in range(NUM_ITEMS) if half[item].any()]
    unit = {item: half[item].astype(np.float64) / np.linalg.norm(half[item].astype(np.float64)) for item in present}
    cosines = {pair: float(unit[pair[0]] @ unit[pair[1]]) for pair in combinations(present, 2)}
    near = {pair for pair, cosine in cosines.items() if cosine > NEAR}
    assert len(near) == 45, "ten items that are nearly one"
    assert (found.num_pairs, found.num_items) == (len(near), 10)
    assert (found.num_compared, found.num_present, found.is_sample) == (len(present), len(present), False)
    shown = [item for pair in found.examples for item in pair[:2]]
    assert len(found.examples) == 5 and len(set(shown)) == 10
    for a, b, cosine in found.examples:
        assert abs(cosine - cosines[min(a, b), max(a, b)]) < 1e-5


def test_a_large_catalogue_is_sampled(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ITEMS", 31)
    (found,) = near_duplicates(shop[0])
    assert found.num_compared == 31 and found.is_sample
    monkeypatch.setattr(module, "MOST_ITEMS", 10**6)
    monkeypatch.setattr(module, "MOST_ROW_BYTES", 20 * 4 * DIM)
    assert near_duplicates(shop[0])[0].num_compared == 20
