"""A model meets a store of other items, or in another order: items are their external ids, not their rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist import evaluate, export, train
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.feature_identity import MadeBy, encoder_differences
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.vocabulary import external_ids, rows_of
from shards.store.builder import build_store
from tests.fixtures.checkpoints import reseal
from tests.fixtures.stores import read_items
from tests.fixtures.text_model import write_text_model
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


def test_the_vocabulary_that_a_run_keeps_is_checked(trained: Path, shuffled: Store, tmp_path: Path) -> None:
    """Two ids that change places are two rows of the id table that do."""
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    table = pq.read_table(run / "vocab.parquet")
    order = [1, 0, *range(2, NUM_ITEMS)]
    column = table.column_names.index("external_id")
    pq.write_table(table.set_column(column, "external_id", table["external_id"].take(order)), run / "vocab.parquet")
    line = refusal(evaluate.main, "--checkpoint", run, "--store", shuffled.path, "--threads", 1)
    assert f"{run / 'vocab.parquet'} is damaged (its rows are not those that were written); copy it from" in line
    best = load_checkpoint(run).path
    record = json.loads((best / "state.json").read_text())
    del record["vocabulary"]  # as an older version left it
    (best / "state.json").write_text(json.dumps(record))
    reseal(best)
    figures_on(run, shuffled)


def test_ids_may_take_more_than_2_gib(trained: Path) -> None:
    ids = external_ids((trained / "vocab.parquet").read_bytes(), "vocab.parquet")
    assert ids.type == pa.large_string() and ids.to_pylist() == [f"i{item}" for item in range(NUM_ITEMS)]


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


TEXTS = ["--data.features", "{text: {source: tfidf, dim: 4}}", "--data.text", "['{title}']"]


@pytest.fixture(scope="module")
def text_store(shop: Path) -> Store:
    """The shop with TF-IDF of its titles."""
    return build_store(load_config(shop, [*TEXTS, "--store.path", str(shop.parent / "text-store")]))[0]


@pytest.fixture(scope="module")
def text_run(shop: Path, text_store: Store) -> Path:
    return train_here(shop, shop.parent / "text-run", *TEXTS, "--store.path", text_store.path)


@pytest.fixture(scope="module")
def grown(shop: Path) -> Path:
    """Raw tables with 5 % more items, with words of their own; users have not bought them yet."""
    raw = Path(shutil.copytree(shop.parent / "raw", shop.parent / "grown"))
    items = pq.read_table(raw / "items.parquet")
    rows = items.slice(0, NUM_ITEMS // 20).to_pylist()
    new = [row | {"item_id": f"new{i}", "title": f"Novel gadget {i} of kind red"} for i, row in enumerate(rows)]
    pq.write_table(pa.concat_tables([items, pa.Table.from_pylist(new, items.schema)]), raw / "items.parquet")
    return raw


def build_grown(shop: Path, raw: Path, store: Path, *words: str) -> Store:
    return build_store(load_config(shop, [*TEXTS, "--data.root", str(raw), "--store.path", str(store), *words]))[0]


def test_a_catalogue_that_grew_has_other_axes(
    shop: Path, text_run: Path, text_store: Store, grown: Path, tmp_path: Path
) -> None:
    """Fitted anew, TF-IDF has other axes: the run would read numbers that mean something else."""
    other = build_grown(shop, grown, tmp_path / "anew")
    words = ("--checkpoint", text_run, "--store", other.path)
    for line in (refusal(evaluate.main, *words, "--threads", 1), refusal(export.main, *words, "--size", 8)):
        assert f"was trained on another feature 'text' than that of store {other.path}: revision was '" in line
        assert f"; build the store with data.features.text.fit: {text_run}, which keeps the fit, or train" in line
    before, after = read_items(text_store, "text"), read_items(other, "text")[:NUM_ITEMS]
    assert not np.array_equal(before, after)
    init = ["--train.init", text_run, "--store.path", other.path, "--run.dir", tmp_path / "run"]
    assert "was trained on another feature 'text'" in refusal(train.main, "--config", shop, *TEXTS, *init)


def test_a_grown_catalogue_on_the_runs_axes(
    shop: Path, text_run: Path, text_store: Store, grown: Path, tmp_path: Path
) -> None:
    """Built with the first store's fit, old items have the same bytes, and run and export rank the new ones too."""
    other = build_grown(shop, grown, tmp_path / "store", "--data.features.text.fit", str(text_store.path))
    assert other.manifest.num_items == NUM_ITEMS + 2
    rows = read_items(other, "text")
    np.testing.assert_array_equal(rows[:NUM_ITEMS], read_items(text_store, "text"), strict=True)
    assert rows[NUM_ITEMS:].any()
    assert figures_on(text_run, other).keys() == evaluation(text_run)["sizes"].keys()
    words = ["--checkpoint", text_run, "--size", 8, "--store", other.path, "--output", tmp_path / "export"]
    run_here(export.main, words)
    run_here(evaluate.main, ["--checkpoint", tmp_path / "export", "--threads", 1])
    ours = evaluation(text_run, f"evaluation-on-{other.manifest.sha256[:12]}")["sizes"]["8"]
    assert evaluation(tmp_path / "export")["sizes"]["8"] == pytest.approx(ours, abs=1e-6)
    # Run and export keep the fit, so it can be built on when the store is gone.
    for place in (text_run, tmp_path / "export"):
        fit = place / "fit-text.safetensors"
        assert fit.read_bytes() == (text_store.path / fit.name).read_bytes()
        again = build_grown(shop, grown, tmp_path / f"by-{place.name}", "--data.features.text.fit", str(place))
        assert again.manifest.sha256 == other.manifest.sha256
    fit.write_bytes(fit.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="fit-text.safetensors is damaged: its sha256 is not the recorded"):
        build_grown(shop, grown, tmp_path / "damaged", "--data.features.text.fit", str(tmp_path / "export"))
    run_here(train.main, ["--config", shop, *TEXTS, "--train.init", text_run, "--store.path", other.path,
                          "--run.dir", tmp_path / "run", "--train.max_steps", 1])  # fmt: skip


def test_the_same_texts_give_the_same_feature(shop: Path, text_run: Path, tmp_path: Path) -> None:
    words = [*TEXTS, "--store.path", str(tmp_path / "store"), "--store.items_per_block", "8"]
    again, _ = build_store(load_config(shop, words))
    assert_same_figures(figures_on(text_run, again), evaluation(text_run)["sizes"])


def test_texts_by_another_template_are_another_feature(shop: Path, text_run: Path, tmp_path: Path) -> None:
    words = [*TEXTS, "--data.text", "['{title}', '{brand}']", "--store.path", str(tmp_path / "store")]
    store, _ = build_store(load_config(shop, words))
    line = refusal(evaluate.main, "--checkpoint", text_run, "--store", store.path, "--threads", 1)
    assert "text was ['{title}'], now ['{title}', '{brand}']" in line


def test_rows_of_another_precision_are_another_feature(shop: Path, tmp_path: Path) -> None:
    """bfloat16 rows are near those of float32 but not the same: a run keeps to what it was trained on."""
    model = str(write_text_model(tmp_path / "model"))
    feature: dict[str, Any] = {"source": "transformers", "model": model, "text": ["{title}"], "max_tokens": 16}
    stores = {}
    for precision in ("fp32", "bf16"):
        features = yaml.safe_dump({"text": feature | {"precision": precision}})
        words = ["--data.features", features, "--store.path", str(tmp_path / precision)]
        stores[precision], _ = build_store(load_config(shop, words))
    exact, rough = (read_items(store, "text").astype(np.float32) for store in stores.values())
    assert 0 < np.abs(exact - rough).max() < 0.1
    run = train_here(shop, tmp_path / "run", "--store.path", stores["fp32"].path, "--train.max_steps", 1)
    line = refusal(evaluate.main, "--checkpoint", run, "--store", stores["bf16"].path, "--threads", 1)
    assert ": precision was 'fp32', now 'bf16'; build the store with the same settings, or train on this one" in line
    # The same model under another path is the same model.
    moved = Path(shutil.copytree(tmp_path / "model", tmp_path / "moved"))
    features = yaml.safe_dump({"text": feature | {"precision": "fp32", "model": str(moved)}})
    again, _ = build_store(load_config(shop, ["--data.features", features, "--store.path", str(tmp_path / "again")]))
    assert_same_figures(figures_on(run, again), evaluation(run)["sizes"])


@pytest.mark.parametrize(
    ("trained_on", "found", "words"),
    [
        ("pixels 2", {"encoder": "pixels", "revision": "2", "recipe": {"source": "pixels", "decoding": 2}}, []),
        ("pixels 1", {"encoder": "pixels", "revision": "2"}, ["it was 'pixels 1', now 'pixels 2'"]),
        ("npy", {"encoder": "npy", "revision": "ab", "recipe": {"source": "npy"}}, []),
        (
            {"encoder": "npy", "revision": "ab"},
            {"encoder": "pixels", "revision": "2", "recipe": {"source": "pixels"}},
            ["revision was 'ab', now '2'", "encoder was 'npy', now 'pixels'"],
        ),
        (
            {"encoder": "pixels", "revision": "2", "recipe": {"source": "pixels", "decoding": 1}},
            {"encoder": "pixels", "revision": "2", "recipe": {"source": "pixels", "decoding": 2}},
            ["decoding was 1, now 2"],
        ),
        ([], {"encoder": "pixels", "revision": "2"}, ["it was '[]', now 'pixels 2'"]),
    ],
)
def test_what_older_versions_recorded_is_compared(trained_on: MadeBy, found: MadeBy, words: list[str]) -> None:
    assert encoder_differences(trained_on, found) == words


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
