"""A model meets a store of other items, or in another order: items are their external ids, not their rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist import evaluate, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.vocabulary import external_ids, rows_of
from shards.store.builder import build_store
from tests.fixtures.training import (
    FEATURE_DIMS,
    NUM_ITEMS,
    evaluation,
    make_shop,
    refusal,
    run_here,
    shop_values,
    train_here,
)

IDS = ["--model.id_table", "true"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    """A run with features and an id table."""
    return train_here(shop, shop.parent / "run", *IDS)


@pytest.fixture(scope="module")
def shuffled(shop: Path) -> Store:
    """The same shop, built from an item table in another order."""
    return rebuild(shop, shop.parent / "shuffled", np.random.default_rng(1).permutation(NUM_ITEMS))


def rebuild(shop: Path, root: Path, order: Sequence[int] | np.ndarray, rename: dict[str, str] | None = None) -> Store:
    """A store of the shop's raw tables with the items in ``order``, some of them under another id."""
    raw = shop.parent / "raw"
    (root / "raw").mkdir(parents=True)
    items = pq.read_table(raw / "items.parquet").take(pa.array(order))
    histories = pq.read_table(raw / "sequences.parquet")
    if rename:
        ids = [rename.get(item, item) for item in items["item_id"].to_pylist()]
        items = items.set_column(items.column_names.index("item_id"), "item_id", pa.array(ids))
        lists = [[rename.get(item, item) for item in history] for history in histories["item_ids"].to_pylist()]
        histories = histories.set_column(histories.column_names.index("item_ids"), "item_ids", pa.array(lists))
    pq.write_table(items, root / "raw" / "items.parquet")
    pq.write_table(histories, root / "raw" / "sequences.parquet")
    for name in FEATURE_DIMS:
        np.save(root / "raw" / f"{name}.npy", np.load(raw / f"{name}.npy")[list(order)])
    (root / "shop.yaml").write_text(yaml.safe_dump(shop_values(root)))
    return build_store(load_config(root / "shop.yaml"))[0]


def figures_on(checkpoint: Path, store: Store) -> dict[str, dict[str, float]]:
    run_here(evaluate.main, ["--checkpoint", checkpoint, "--store", store.path, "--threads", 1])
    sizes: dict[str, dict[str, float]] = evaluation(checkpoint, f"evaluation-on-{store.manifest.sha256[:12]}")["sizes"]
    return sizes


def assert_same_figures(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for size, row in expected.items():
        assert found[size] == pytest.approx(row, abs=1e-6), size


def test_an_id_table_follows_the_ids(trained: Path, shuffled: Store, tmp_path: Path) -> None:
    """Where rows were taken for items, the figures fell to those of a random model, with exit code 0."""
    own = evaluation(trained)["sizes"]
    assert_same_figures(figures_on(trained, shuffled), own)
    words = ["--checkpoint", trained, "--size", 8, "--store", shuffled.path, "--output", tmp_path / "export"]
    run_here(export.main, words)
    run_here(evaluate.main, ["--checkpoint", tmp_path / "export", "--threads", 1])
    assert evaluation(tmp_path / "export")["sizes"]["8"] == pytest.approx(own["8"], abs=1e-6)


def test_an_export_follows_the_ids(trained: Path, shuffled: Store, tmp_path: Path) -> None:
    run_here(export.main, ["--checkpoint", trained, "--size", 8, "--output", tmp_path / "export"])
    found = figures_on(tmp_path / "export", shuffled)
    assert found["8"] == pytest.approx(evaluation(trained)["sizes"]["8"], abs=1e-6)


def test_unknown_items_are_refused(trained: Path, shop: Path, tmp_path: Path) -> None:
    before = (trained / "evaluation.json").read_bytes()
    other = rebuild(shop, tmp_path / "other", range(NUM_ITEMS), rename={"i7": "new"})
    run_here(export.main, ["--checkpoint", trained, "--size", 8, "--output", tmp_path / "export"])
    for checkpoint in (trained, tmp_path / "export"):
        line = refusal(evaluate.main, "--checkpoint", checkpoint, "--store", other.path, "--threads", 1)
        assert "has 1 items that" in line and "does not know, such as 'new'; use the store that it belongs to" in line
    words = ["--checkpoint", trained, "--size", 4, "--store", other.path, "--output", tmp_path / "no"]
    assert "such as 'new'" in refusal(export.main, *words)
    assert (trained / "evaluation.json").read_bytes() == before and not (tmp_path / "no").exists()


def test_without_the_runs_vocabulary_another_order_is_refused(trained: Path, shuffled: Store, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    (run / VOCAB_FILE).unlink()
    line = refusal(evaluate.main, "--checkpoint", run, "--store", shuffled.path, "--threads", 1)
    assert "has an id table of another store's items, and" in line and "use the store that it was trained on" in line


def test_features_alone_serve_any_items(shop: Path, shuffled: Store, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run")
    assert_same_figures(figures_on(run, shuffled), evaluation(run)["sizes"])
    assert not (run / VOCAB_FILE).exists()


def test_a_fit_to_other_texts_is_another_feature(shop: Path, tmp_path: Path) -> None:
    """TF-IDF's axes are those of the catalogue that it was fitted on."""
    texts = ["--data.features", "{text: {source: tfidf, dim: 4}}", "--data.text", "['{title}']"]
    store, _ = build_store(load_config(shop, [*texts, "--store.path", str(tmp_path / "one")]))
    run = train_here(shop, tmp_path / "run", "--store.path", store.path)
    table = pq.read_table(shop.parent / "raw" / "items.parquet")
    titles = [f"{title} other words" for title in table["title"].to_pylist()]
    raw = Path(shutil.copytree(shop.parent / "raw", tmp_path / "raw"))
    table = table.set_column(table.column_names.index("title"), "title", pa.array(titles))
    pq.write_table(table, raw / "items.parquet")
    words = [*texts, "--store.path", str(tmp_path / "two"), "--data.root", str(raw)]
    other, _ = build_store(load_config(shop, words))
    line = refusal(evaluate.main, "--checkpoint", run, "--store", other.path, "--threads", 1)
    assert "was trained on feature 'text' of tfidf+svd of \"{title}\" scikit-learn" in line
    assert "build the store with the same encoder, or train on this one" in line
    words = [*texts, "--store.path", str(tmp_path / "three"), "--store.items_per_block", "8"]
    again, _ = build_store(load_config(shop, words))
    assert_same_figures(figures_on(run, again), evaluation(run)["sizes"])


@given(st.permutations([f"{n:02}" for n in range(8)]), st.integers(1, 8))
def test_rows_are_found_by_id(ids: list[str], count: int) -> None:
    known, wanted = pa.array(ids), pa.array(sorted(ids)[:count])
    rows = rows_of(wanted, known, "a store", "a run")
    expected = [ids.index(item) for item in sorted(ids)[:count]]
    assert rows is None if ids == sorted(ids)[:count] else rows is not None and rows.tolist() == expected


def test_a_vocabulary_that_cannot_be_read() -> None:
    for content in (b"", b"PAR1 nonsense"):
        with pytest.raises(UserError, match="the vocabulary here cannot be read"):
            external_ids(content, "here")
