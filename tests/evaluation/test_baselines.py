"""Baselines against plain loops over users and items, kept with the store, and against a published figure."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.item_statistics import train_counts
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation import baselines, item_knn
from fmrl_dist.evaluation.baselines import baseline_histograms, count_baseline, possible_baselines
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.item_knn import NEIGHBOURS, item_neighbours
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY, run_processes
from tests.fixtures.stores import read_split
from tests.fixtures.training import NUM_ITEMS, make_shop

NAMES = ("popularity", "cosine", "item_knn")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(load_config(make_shop(tmp_path_factory.mktemp("baselines"))).store.path)


def reference_scores(name: str, store: Store, history: list[int]) -> np.ndarray:
    """Scores of all items after a history, float64 [V]."""
    if name == "popularity":
        return train_counts(store).astype(np.float64)
    if name == "cosine":
        table, cosines, first = load_item_table(store, None), np.zeros(NUM_ITEMS), 0
        for dim in table.dims.values():
            rows = table.values[:, first : first + dim].double().numpy()
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            cosines, first = cosines + rows @ rows[history[-1]], first + dim
        return cosines
    baskets = [set(items) for items in read_split(store, "train").values()]
    scores = np.zeros(NUM_ITEMS)
    for one in set(history):
        for other in set(range(NUM_ITEMS)) - {one}:
            both = sum(one in basket and other in basket for basket in baskets)
            if both:
                scores[other] += both / math.sqrt(
                    sum(one in basket for basket in baskets) * sum(other in basket for basket in baskets)
                )
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_those_of_plain_loops(name: str, store: Store) -> None:
    protocol = EvaluationProtocol(store, "test", False, keep_users=True, num_users=30)
    found = count_baseline(name, protocol, start_runtime(1, lanes=None), StopRequest()).users
    assert found is not None and len(found.users) == 30
    slices, num_ties = read_split(store, "test"), 0
    for row, user in enumerate(found.users.tolist()):
        *history, target = slices[user]
        scores = reference_scores(name, store, history)
        for which, hidden in enumerate((set(), set(history) - {target})):
            others = np.array(sorted(set(range(NUM_ITEMS)) - hidden - {target}))
            near = np.abs(scores[others] - scores[target]) < 1e-6
            num_ties += int(near.sum())
            expected = 1 + (scores[others] > scores[target])[~near].sum() + near.sum() / 2
            assert found.ranks[which, 0, row] == expected
        assert (found.targets[row], found.lengths[row]) == (target, len(history))
    assert num_ties > 0 or name == "cosine"


def test_an_item_keeps_its_nearest_neighbours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few pairs are counted at once."""
    everything = item_neighbours(store, NEIGHBOURS)
    monkeypatch.setattr(item_knn, "PAIRS_AT_ONCE", 1)
    few = item_neighbours(store, 3)
    for item in range(NUM_ITEMS):
        begin, end = few.starts[item : item + 2]
        first = everything.starts[item]
        assert end - begin == min(3, everything.starts[item + 1] - first)
        np.testing.assert_array_equal(few.items[begin:end], everything.items[first : first + end - begin])
        similarities = everything.similarities[first : everything.starts[item + 1]]
        assert (np.diff(similarities) <= 0).all() and (similarities > 0).all() and (similarities <= 1).all()


def here(store: str) -> dict[str, list[list[int]]]:
    found = baseline_histograms(NAMES, Store.open(store), "valid", start_runtime(1, lanes=None), StopRequest())
    return {name: rows.tolist() for name, rows in found.items()}


@pytest.mark.multiproc
def test_they_are_computed_once_and_by_any_number_of_processes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_processes(2, here, str(store.path))
    assert list(first) == list(NAMES) and second == {}
    (file,) = store.derived_folder.glob("baselines-*-valid-*")
    content = file.read_bytes()
    file.unlink()
    assert here(str(store.path)) == first and file.read_bytes() == content
    file.write_text(json.dumps(json.loads(content) | {"popularity": [[0] * 2001] * 2}))
    assert here(str(store.path)) == first, "what was changed is computed again"
    monkeypatch.setattr(baselines, "count_baseline", None)
    assert here(str(store.path)) == first


def test_neighbours_without_some_training_users_are_not_kept(store: Store, tmp_path: Path) -> None:
    """Where damaged blocks are left out: the repaired store has others."""
    folder = Path(shutil.copytree(store.path, tmp_path / "store"))
    block = store.manifest.splits["train"][1]
    content = (folder / block.shard).read_bytes()
    middle = block.offset + block.num_bytes // 2
    (folder / block.shard).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])

    def histograms(access: StoreConfig) -> dict[str, torch.Tensor]:
        opened = Store.open(folder, access)
        return baseline_histograms(
            ["popularity", "item_knn"], opened, "valid", start_runtime(1, lanes=None), StopRequest()
        )

    damaged = histograms(StoreConfig(on_bad_shard="skip"))
    (folder / block.shard).write_bytes(content)
    repaired = histograms(StoreConfig())
    assert not torch.equal(damaged["item_knn"], repaired["item_knn"])
    expected = baseline_histograms(["item_knn"], store, "valid", start_runtime(1, lanes=None), StopRequest())
    assert torch.equal(repaired["item_knn"], expected["item_knn"])


def test_item_knn_of_a_large_store_is_left_out_and_that_is_said(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_events = sum(block.events for block in store.manifest.splits["train"])
    monkeypatch.setattr(baselines, "MOST_EVENTS", num_events - 1)
    assert list(here(str(store.path))) == ["popularity", "cosine"]
    assert f"no item_knn beside the figures: it would hold {num_events:,} training events" in capsys.readouterr().out


def test_a_store_without_features_has_no_cosine(store: Store) -> None:
    assert possible_baselines(store) == NAMES
    bare = Store(store.files, replace(store.manifest, features=()))
    assert possible_baselines(bare) == ("popularity", "item_knn")


@pytest.mark.real_data
def test_cosine_of_beauty_is_the_published_figure(shared_data: Path, tmp_path: Path) -> None:
    """NDCG@10 of the last item's MiniLM row, seen items masked: 0.0401."""
    words = ["--data.root", str(shared_data), "--store.path", str(tmp_path / "beauty")]
    build_store(load_config(REPOSITORY / "configs" / "beauty-text-npy.yaml", words))
    store, runtime = Store.open(tmp_path / "beauty"), start_runtime(1, lanes=None)
    counts = count_baseline("cosine", EvaluationProtocol(store, "test", True), runtime, StopRequest())
    assert counts.num_users == 22_363
    assert metrics_from_histogram(counts.all_users[1, 0])["ndcg@10"] == pytest.approx(0.0401, abs=5e-5)
    assert torch.equal(counts.histograms.sum((0, 3)), torch.full((2, 1), 22_363))
