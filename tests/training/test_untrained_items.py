"""Items without a training event: no softmax scores them, unless it is told to; full, sampled, split, by cosines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fmrl_dist.data.item_statistics import scored_items
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.negatives import make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.losses.nested_cross_entropy import cosine_per_size, nested_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.training.build_model import build_model
from fmrl_dist.training.id_table.rows import IdDropout, ModelIdTable
from fmrl_dist.training.item_columns import catalogue_columns
from fmrl_dist.training.module import TrainingModule
from tests.fixtures.negatives import NO_DROPOUT, loaded, sampled
from tests.fixtures.processes import run_processes
from tests.fixtures.training import evaluation, figures, make_shop, records, train_here

NUM_ITEMS = 201
WORDS = [*NO_DROPOUT, "--train.epochs", "1", "--model.id_table", "true", "--loss.distillation", "0.5"]
LEFT_OUT, SCORED = ["--loss.score_untrained", "false"], ["--loss.score_untrained", "true"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("untrained"), NUM_ITEMS)


@pytest.fixture(scope="module")
def store(shop: Path) -> Store:
    return Store.open(shop.parent / "store")


@pytest.fixture(scope="module")
def trained(store: Store) -> np.ndarray:
    """Internal ids, straight from the training histories."""
    return np.unique(np.concatenate([store.read_block(block)["items"] for block in store.manifest.splits["train"]]))


def test_which_items_are_scored(store: Store, trained: np.ndarray) -> None:
    scored = scored_items(store, score_untrained=False)
    assert scored is not None and scored_items(store, score_untrained=True) is None
    assert 20 < len(trained) < NUM_ITEMS - 20
    np.testing.assert_array_equal(np.flatnonzero(scored), trained)


def stream(store: Store, config: Path, *words: str) -> TrainStream:
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 2, 0)
    return TrainStream(store, order, WindowRule(50, "last", True), make_sampler(loaded(config, *words), store))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_full_softmax_is_that_of_the_trained_items(
    normalize: bool, shop: Path, store: Store, trained: np.ndarray
) -> None:
    """The loss and all gradients, against the plain formula over the embeddings of just these items."""
    table = load_item_table(store, None)
    torch.manual_seed(0)
    model = build_model(loaded(shop, *WORDS).model, table)
    settings = LossSettings(model.sizes, temperatures=(0.5, 2.0), distillation=None if normalize else (0.5, 0.0))
    columns = catalogue_columns(model.encoder, table, torch.float32)
    rows = torch.from_numpy(trained)
    id_rows = ModelIdTable(model.encoder, IdDropout(0.0, 0))
    module = TrainingModule(model, columns, settings, normalize, id_rows=id_rows, scored=rows)
    batch = stream(store, shop).batch(0, 0, range(2))
    found = module(batch)

    encoder = model.encoder
    items = encoder(encoder.normalize(table.values, table.present), table.present)
    z = model(items[batch.items], batch.starts, batch.from_start)
    right = torch.tensor([trained.tolist().index(target) for target in batch.targets.tolist()])
    plain = replace(settings, impl="plain")

    def loss(parts: Sequence[Tensor], of: LossSettings) -> Tensor:
        return nested_cross_entropy(parts[0], parts[1], right, of)

    expected = cosine_per_size(loss, [z, items[rows]], plain) if normalize else loss([z, items[rows]], plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "popularity", "mixed", "stratified"])
def test_no_untrained_item_is_a_negative(kind: str, shop: Path, store: Store, trained: np.ndarray) -> None:
    """What is left is weighted as a sample of the trained items: expected counts add up to as many as are drawn."""
    sampler = make_sampler(loaded(shop, *sampled(kind, num_negatives=500), *LEFT_OUT), store)
    assert sampler is not None
    drawn = sampler.lane(3, 0)
    kept = drawn[np.isin(drawn, trained)]
    assert 0 < len(kept) < len(drawn), "some are left out, not all"
    targets = trained[[1, 1, 5]]
    ids, log_expected = sampler.negatives(drawn, targets)
    assert np.isin(ids, trained).all() and log_expected.dtype == np.float32
    every = sampler.negatives(np.concatenate((kept, trained)), targets)  # each trained item's expected count
    if kind in ("uniform", "popularity"):
        assert ids.tolist() == kept.tolist()
        counts = np.exp(every[1][len(kept) :].astype(np.float64)).sum()
        assert counts == pytest.approx(len(kept) + len(trained), rel=1e-5)
    if kind == "stratified":
        others = kept[~np.isin(kept, targets)]
        assert ids.tolist() == [*np.unique(targets), *others]
        np.testing.assert_allclose(np.exp(log_expected[2:]), len(others) / (len(trained) - 2), rtol=1e-5)


def test_a_lane_may_draw_only_untrained_items(shop: Path, store: Store, trained: np.ndarray) -> None:
    sampler = make_sampler(loaded(shop, *sampled("uniform"), *LEFT_OUT), store)
    assert sampler is not None
    untrained = np.setdiff1d(np.arange(NUM_ITEMS), trained)[:7]
    ids, log_expected = sampler.negatives(untrained, trained[:1])
    assert (len(ids), len(log_expected), log_expected.dtype) == (0, 0, np.float32)


def test_features_of_untrained_items_learn_nothing_from_being_drawn(shop: Path, tmp_path: Path) -> None:
    """A run learns something else where they are scored; a catalogue without any trains the same in both ways."""
    runs = [train_here(shop, tmp_path / f"run-{words[1]}", *WORDS, *words) for words in (LEFT_OUT, SCORED)]
    losses = [[record["loss"] for record in records(run)] for run in runs]
    assert losses[0][0] < losses[1][0], "fewer items, and the same first weights"
    small = make_shop(tmp_path / "small", 20)
    scored = scored_items(Store.open(small.parent / "store"), score_untrained=False)
    assert scored is None, "all 20 have a training event"
    equal = [train_here(small, tmp_path / f"small-{words[1]}", *WORDS, *words) for words in (LEFT_OUT, SCORED)]
    assert figures(equal[0]) == figures(equal[1])


def train_split(config: str, run: str) -> None:
    train_here(Path(config), Path(run), *WORDS, *LEFT_OUT, "--loss.catalogue", "split")


@pytest.mark.multiproc
def test_a_split_catalogue_leaves_them_out_too(shop: Path, tmp_path: Path) -> None:
    one = train_here(shop, tmp_path / "one", *WORDS, *LEFT_OUT)
    run_processes(2, train_split, str(shop), str(tmp_path / "two"), timeout_s=200)
    for record, other in zip(records(tmp_path / "two"), records(one), strict=True):
        for key in ("loss", "loss@4", "loss@8", "grad_norm"):
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)
    assert evaluation(tmp_path / "two") == evaluation(one)
