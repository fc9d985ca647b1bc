"""Sampled nested cross-entropy against its plain twin, and its expectation against the full softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fmrl_dist.losses.log_sum_exp import nested_log_sum_exp
from fmrl_dist.losses.nested_cross_entropy import Negatives, nested_cross_entropy, sampled_cross_entropy
from fmrl_dist.losses.settings import Correction, LossSettings
from fmrl_dist.losses.tiled_log_sum_exp import TILE_ITEMS, TILE_POSITIONS
from tests.fixtures.normalizers import DISTILLED, values_and_gradients
from tests.fixtures.numerics import TOLERANCE, assert_relatively_close

SIZES = (4, 9, 16, 35)
TEMPERATURES = (0.5, 1.0, 2.0, 1.3)
SHAPES = [  # positions N, negatives K
    (1, 1),
    (63, 507),
    (TILE_POSITIONS + 1, TILE_ITEMS + 1),
]


def make_inputs(
    num_positions: int, num_negatives: int, dtype: torch.dtype = torch.float64, num_items: int = 40
) -> tuple[Tensor, Tensor, Tensor, Tensor, Negatives]:
    """z, target embeddings and ids, negative embeddings, and negatives of which about one in forty is the target."""
    generator = torch.Generator().manual_seed(num_positions * 7919 + num_negatives)
    table = torch.randn(num_items, SIZES[-1], dtype=torch.float64, generator=generator) / 2
    z = torch.randn(num_positions, SIZES[-1], dtype=torch.float64, generator=generator)
    targets = torch.randint(num_items, (num_positions,), generator=generator)
    ids = torch.randint(num_items, (num_negatives,), generator=generator)
    log_expected = torch.randn(num_negatives, generator=generator)
    leaves = (tensor.to(dtype).requires_grad_() for tensor in (z, table[targets], table[ids]))
    z, target_items, negative_items = leaves
    return z, target_items, targets, negative_items, Negatives(ids, log_expected)


def losses_and_gradients(inputs: tuple[Any, ...], weights: Sequence[float], **options: Any) -> list[Tensor]:
    z, target_items, targets, negative_items, negatives = inputs
    losses = sampled_cross_entropy(z, target_items, targets, negative_items, negatives, LossSettings(SIZES, **options))
    weighted = (losses * torch.tensor(weights, dtype=losses.dtype)).sum()
    return [losses.detach(), *torch.autograd.grad(weighted, (z, target_items, negative_items))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperatures", [None, TEMPERATURES], ids=["one", "each"])
@pytest.mark.parametrize("distilled", DISTILLED)
@pytest.mark.parametrize(("num_positions", "num_negatives"), SHAPES)
def test_tiled_equals_its_plain_twin(
    num_positions: int, num_negatives: int, distilled: str, temperatures: tuple[float, ...] | None, dtype: torch.dtype
) -> None:
    inputs = make_inputs(num_positions, num_negatives, dtype)
    found, expected = (
        losses_and_gradients(inputs, (0.7, 0.0, 1.3, 2.1), temperatures=temperatures, impl=impl, **DISTILLED[distilled])
        for impl in ("tiled", "plain")
    )
    for result, twin in zip(found, expected, strict=True):
        assert result.dtype == dtype
        assert_relatively_close(result, twin, TOLERANCE[dtype])


def test_loss_word_by_word() -> None:
    """-s_y + log(e^{s_y} + Σ_k 1[i_k ≠ y] exp(s_{i_k} - log(K q))), one position and size at a time."""
    z, target_items, targets, negative_items, negatives = make_inputs(5, 60)
    settings = LossSettings(SIZES, TEMPERATURES)
    losses = sampled_cross_entropy(z, target_items, targets, negative_items, negatives, settings).detach()
    z, target_items, negative_items = z.detach(), target_items.detach(), negative_items.detach()
    hits = 0
    for size, temperature, loss in zip(SIZES, TEMPERATURES, losses, strict=True):
        expected = 0.0
        for n in range(5):
            own = float(z[n, :size] @ target_items[n, :size]) / temperature
            total = math.exp(own)
            for k in range(60):
                if negatives.ids[k] == targets[n]:
                    hits += 1
                    continue
                score = float(z[n, :size] @ negative_items[k, :size]) / temperature
                total += math.exp(score - float(negatives.log_expected[k]))
            expected += math.log(total) - own
        assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert hits > 0, "no negative was the target: the case is not tested"


@pytest.mark.parametrize("distilled", DISTILLED)
@pytest.mark.parametrize("impl", ["tiled", "plain"])
def test_only_the_target_drawn_leaves_nothing_to_learn(impl: str, distilled: str) -> None:
    inputs = make_inputs(1, 7)
    inputs[4].ids[:] = inputs[2]
    for result in losses_and_gradients(inputs, (1.0, 1.0, 1.0, 1.0), impl=impl, **DISTILLED[distilled]):
        torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperatures", [None, TEMPERATURES], ids=["one", "each"])
def test_log_sum_exp_equals_its_plain_twin_with_a_gradient_of_its_own_per_position(
    temperatures: tuple[float, ...] | None,
) -> None:
    z, _, targets, items, negatives = make_inputs(63, 507)
    grad = torch.randn(len(SIZES), 63, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    correction = Correction(-negatives.log_expected, negatives.ids, targets)
    found, expected = (
        nested_log_sum_exp(z, items, LossSettings(SIZES, temperatures, impl, **DISTILLED["softer"]), correction)
        for impl in ("tiled", "plain")
    )
    pairs = zip(*(values_and_gradients(result, grad, (z, items)) for result in (found, expected)), strict=True)
    for result, twin in pairs:
        assert_relatively_close(result, twin, 1e-12)


def full_and_sampled(num_negatives: int, num_draws: int, popular: bool) -> tuple[float, float]:
    """Relative bias of the mean sampled loss and of its mean gradient in z, over independent draws."""
    generator = torch.Generator().manual_seed(3)
    num_items, num_positions = 30, 6
    table = torch.randn(num_items, SIZES[-1], dtype=torch.float64, generator=generator) / 4
    z = torch.randn(num_positions, SIZES[-1], dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(num_items, (num_positions,), generator=generator)
    law = torch.arange(1.0, num_items + 1) if popular else torch.ones(num_items)
    law = law / law.sum()
    full = nested_cross_entropy(z, table, targets, LossSettings(SIZES)).sum()
    (full_grad,) = torch.autograd.grad(full, z)
    mean, mean_grad = 0.0, torch.zeros_like(z)
    for _ in range(num_draws):
        ids = torch.multinomial(law, num_negatives, replacement=True, generator=generator)
        negatives = Negatives(ids, (num_negatives * law[ids]).log())
        settings = LossSettings(SIZES, impl="plain")
        loss = sampled_cross_entropy(z, table[targets], targets, table[ids], negatives, settings).sum()
        mean += loss.item() / num_draws
        mean_grad += torch.autograd.grad(loss, z)[0] / num_draws
    return abs(mean / full.item() - 1), float((mean_grad - full_grad).norm() / full_grad.norm())


@pytest.mark.parametrize("popular", [False, True], ids=["uniform", "popularity"])
def test_bias_shrinks_with_the_number_drawn(popular: bool) -> None:
    few = full_and_sampled(3, 1500, popular)
    many = full_and_sampled(300, 300, popular)
    for bias_few, bias_many in zip(few, many, strict=True):
        assert bias_many < 0.25 * bias_few
    assert many[0] < 5e-3 and many[1] < 5e-2
