"""What training learns on the demo data: features beat ids, the model beats popularity, and it reads the order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import embed_catalogue, load_catalogue_table, restore_model
from fmrl_dist.config.loading import DEMO_CONFIG, config_from_dict, load_config
from fmrl_dist.data.batches import EvaluationBlock, evaluation_blocks
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.catalogue import EmbeddedCatalogue
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from shards.store.builder import build_store
from tests.fixtures.ranking import CUTOFF, histograms
from tests.fixtures.training import evaluation, train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = [
    *("--data.demo", "{users: 1500, items: 1000, seed: 0}"),
    *("--model.sizes", "[8, 32]", "--model.width", "32", "--eval.size", "32"),
    *("--train.epochs", "8", "--train.batch_size", "64", "--train.lr", "5.0e-3"),
    *("--train.patience", "0", "--train.threads", "1", "--run.tensorboard", "false"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a small demo store; return the options that select it and the settings."""
    root = tmp_path_factory.mktemp("demo")
    words = [*SETTINGS, "--data.root", str(root / "data"), "--store.path", str(root / "store")]
    build_store(load_config(DEMO_CONFIG, words))
    return words


@pytest.fixture(scope="module")
def from_features(demo: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(DEMO_CONFIG, tmp_path_factory.mktemp("runs") / "features", *demo)


@pytest.fixture(scope="module")
def store(demo: list[str]) -> Store:
    return Store.open(demo[-1])


def ranking_blocks(store: Store) -> Iterator[EvaluationBlock]:
    return evaluation_blocks(store, "test", 50, range(len(store.manifest.splits["test"])))


def popularity_ndcg(store: Store) -> float:
    """NDCG@10 of ranking the catalogue by the number of training events."""
    counts = np.array(pq.read_table(store.path / VOCAB_FILE)["train_count"])
    targets = torch.cat([block.targets for block in ranking_blocks(store)]).tolist()
    ranks = [1 + (counts > counts[t]).sum() + ((counts == counts[t]).sum() - 1) / 2 for t in targets]
    return sum(1 / math.log2(1 + rank) for rank in ranks if rank <= CUTOFF) / len(targets)


def test_features_beat_ids(demo: list[str], from_features: Path) -> None:
    words = ["--model.features", "[]", "--model.id_table", "true"]
    from_ids = train_here(DEMO_CONFIG, from_features.parent / "ids", *demo, *words)
    for size in ("8", "32"):
        features, ids = (evaluation(run)["sizes"][size]["ndcg@10"] for run in (from_features, from_ids))
        assert features > 1.2 * ids > 0


def test_model_beats_popularity(store: Store, from_features: Path) -> None:
    popularity = popularity_ndcg(store)
    assert popularity > 0.01, "a meaningful baseline: a random order has 0.0045"
    sizes = evaluation(from_features)["sizes"]
    assert sizes["8"]["ndcg@10"] > 2 * popularity
    assert sizes["32"]["ndcg@10"] > 5 * popularity


def test_larger_size_is_better(from_features: Path) -> None:
    sizes = evaluation(from_features)["sizes"]
    assert sizes["32"]["ndcg@10"] > 1.3 * sizes["8"]["ndcg@10"]


def test_order_matters(store: Store, from_features: Path) -> None:
    """The same model on the same events, each history in random order, ranks far worse."""
    checkpoint = load_checkpoint(from_features)
    table = load_catalogue_table(store, checkpoint)
    model = restore_model(config_from_dict(checkpoint.config).model, checkpoint).eval()
    items = embed_catalogue(model.encoder, table.values, table.present)
    in_order, shuffled = (
        metrics_from_histogram(histograms(model, EmbeddedCatalogue(items), blocks, mask_seen=False)[-1])["ndcg@10"]
        for blocks in (ranking_blocks(store), map(shuffle_histories, ranking_blocks(store)))
    )
    assert in_order == evaluation(from_features)["sizes"]["32"]["ndcg@10"]
    assert shuffled < 0.7 * in_order


def shuffle_histories(block: EvaluationBlock) -> EvaluationBlock:
    """The block with each history's events in random order."""
    generator = np.random.default_rng(0)
    histories = [generator.permutation(history) for history in np.split(block.items.numpy(), block.starts[1:-1])]
    return replace(block, items=torch.from_numpy(np.concatenate(histories)))
