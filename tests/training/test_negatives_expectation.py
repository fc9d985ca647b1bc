"""Sampled losses in expectation: the real draws, batches and module against the full softmax, loss and gradients.

For one batch, over many seeds of the sampler: the mean loss and the mean gradient of every parameter approach those of
the full softmax as more negatives are drawn; the bias is that of the logarithm of a mean. The number of in-batch
negatives is fixed, so their bias stays.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmrl_dist.data.batches import SampledBatch
from fmrl_dist.data.negatives import NegativeSampler, make_sampler
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.training.module import TrainingModule
from tests.fixtures.negatives import loaded, make_module, sampled
from tests.fixtures.training import STEPS_PER_EPOCH, evaluation, figures, make_shop, train_here

FEW, MANY = 4, 256  # of 40 items


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("expectation"))


@pytest.fixture(scope="module")
def module(shop: Path) -> TrainingModule:
    return make_module(shop, Store.open(shop.parent / "store")).double()


def flat_gradient(module: TrainingModule, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(module.parameters())
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def make_stream(shop: Path, sampler: NegativeSampler | None, scope: str) -> TrainStream:
    store = Store.open(shop.parent / "store")
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 2, 0)
    return TrainStream(store, order, WindowRule(50, "last", True), sampler, scope == "batch")


def bias(
    kind: str, scope: str, num_negatives: int, num_draws: int, shop: Path, module: TrainingModule
) -> tuple[float, float]:
    """Relative error of the mean loss, summed over sizes, and of the mean gradient of all parameters."""
    full = module(make_stream(shop, None, scope).batch(0, 0, range(2))).sum()
    full_gradient = flat_gradient(module, full)
    mean, mean_gradient = 0.0, torch.zeros_like(full_gradient)
    for seed in range(num_draws):
        words = [*sampled(kind, scope, num_negatives), "--train.seed", str(seed)]
        sampler = make_sampler(loaded(shop, *words), Store.open(shop.parent / "store"))
        loss = module(make_stream(shop, sampler, scope).batch(0, 0, range(2))).sum()
        mean += loss.item() / num_draws
        mean_gradient += flat_gradient(module, loss) / num_draws
    return abs(mean / full.item() - 1), float((mean_gradient - full_gradient).norm() / full_gradient.norm())


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        ("uniform", "lane"),
        ("popularity", "lane"),
        ("mixed", "lane"),
        ("stratified", "lane"),
        ("uniform", "batch"),
        ("mixed", "batch"),
        ("stratified", "batch"),
    ],
)
def test_bias_of_loss_and_gradients_shrinks_with_the_number_drawn(
    kind: str, scope: str, shop: Path, module: TrainingModule
) -> None:
    few = bias(kind, scope, FEW, 60, shop, module)
    many = bias(kind, scope, MANY, 40, shop, module)
    for bias_few, bias_many in zip(few, many, strict=True):
        assert bias_many < bias_few / 3
    assert many[0] < 4e-3 and many[1] < 6e-2


@pytest.mark.parametrize("scope", ["lane", "batch"])
def test_bias_of_in_batch_negatives_stays(scope: str, shop: Path, module: TrainingModule) -> None:
    found = bias("in_batch", scope, MANY, 1, shop, module)
    assert found == bias("in_batch", scope, FEW, 1, shop, module)
    assert found[0] > 2e-3 and found[1] > 0.15


@pytest.mark.parametrize(("kind", "scope"), [("popularity", "lane"), ("mixed", "batch")])
def test_resumed_run_draws_what_the_uninterrupted_one_does(kind: str, scope: str, shop: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with dropout, to the last bit."""
    stop = STEPS_PER_EPOCH + 3
    words = [*sampled(kind, scope), "--eval.every_steps", stop, "--train.epochs", 2]
    whole = train_here(shop, tmp_path / "whole", *words)
    halved = train_here(shop, tmp_path / "halved", *words, "--train.max_steps", stop)
    train_here(shop, halved, *words, "--resume", "auto")
    assert figures(halved) == figures(whole)
    assert evaluation(halved) == evaluation(whole)


@pytest.mark.parametrize("scope", ["lane", "batch"])
def test_each_epoch_draws_its_own(scope: str, shop: Path) -> None:
    """Steps are counted over the whole run: the same batch in the next epoch has other negatives."""
    stream = make_stream(shop, NegativeSampler(10**6, 5, seed=0), scope)
    drawn = [stream.batch(epoch, step, [1]) for epoch in (0, 1) for step in (0, 1)]
    negatives = [batch.negatives.tolist() for batch in drawn if isinstance(batch, SampledBatch)]
    assert len(set(map(tuple, negatives))) == 4
    assert all(len(ids) == (5 if scope == "lane" else 10) for ids in negatives)


@pytest.mark.parametrize("impl", ["tiled", "plain"])
def test_a_lane_of_one_position_has_no_in_batch_negatives(impl: str, shop: Path, module: TrainingModule) -> None:
    """Its own target is the only candidate: loss and gradients are zero, although the log expected count is -inf."""
    store = Store.open(shop.parent / "store")
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    sampler = make_sampler(loaded(shop, *sampled("in_batch")), store)
    stream = TrainStream(store, order, WindowRule(1, "last", True), sampler)
    batch = stream.batch(0, 0, [3])
    assert len(batch.targets) == 1
    alone = TrainingModule(module.model, module.columns, LossSettings(module.model.sizes, impl=impl))
    losses = alone(batch)
    assert losses.tolist() == [0, 0]
    assert not flat_gradient(alone, losses.sum()).any()
