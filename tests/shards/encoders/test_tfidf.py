"""TF-IDF vectors: unit length, similar for similar texts, absent without a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.store.builder import build_store
from tests.fixtures.stores import ITEMS, read_items, tiny_config, write_raw


def test_tfidf_rows_are_unit_and_absent_where_there_is_no_text(tmp_path: Path) -> None:
    write_raw(tmp_path)
    titles = ["red lamp", "red lamp", None, "blue chair", "blue chair oak", "!"]
    pq.write_table(pa.table({"item_id": ITEMS, "title": titles}), tmp_path / "items.parquet")
    features = {"words": {"source": "tfidf", "dim": 2, "text": ["{title}"]}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    assert store.manifest.features[0].present == 4 and store.manifest.features[0].masked
    rows, mask = read_items(store, "words").astype(np.float64), read_items(store, "words.mask")
    assert mask.tolist() == [True, True, False, True, True, False]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), mask, atol=1e-3)
    assert rows[0] @ rows[1] > 0.999 and rows[3] @ rows[4] > 0.9 and abs(rows[0] @ rows[3]) < 0.1
