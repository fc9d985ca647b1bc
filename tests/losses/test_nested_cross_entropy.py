"""The tiled nested cross-entropy against its plain twin: losses, every gradient, ugly sizes, memory, huge scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.losses import tiled_log_sum_exp
from fmrl_dist.losses.nested_cross_entropy import nested_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.tiled_log_sum_exp import TILE_ITEMS, TILE_POSITIONS
from tests.fixtures.held_memory import HeldMemory
from tests.fixtures.normalizers import DISTILLED
from tests.fixtures.numerics import TOLERANCE, assert_relatively_close

SIZES = (4, 9, 16, 35)
SHAPES = [  # positions N, items V
    (1, 1),
    (1, 2),
    (3, 1),
    (63, 507),
    (TILE_POSITIONS, TILE_ITEMS),
    (TILE_POSITIONS + 1, 2 * TILE_ITEMS - 1),
]
WEIGHTS = {
    "sum": (1.0, 1.0, 1.0, 1.0),
    "mixed": (0.7, 0.0, -1.3, 2.1),
    "none": (0.0, 0.0, 0.0, 0.0),
}


def make_inputs(
    num_positions: int, num_items: int, width: int = SIZES[-1], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, D], items [V, D], targets [N], with scores of a few units."""
    generator = torch.Generator().manual_seed(num_positions * 7919 + num_items)
    z = torch.randn(num_positions, width, dtype=torch.float64, generator=generator)
    items = torch.randn(num_items, width, dtype=torch.float64, generator=generator) / 2
    targets = torch.randint(num_items, (num_positions,), generator=generator)
    return z.to(dtype).requires_grad_(), items.to(dtype).requires_grad_(), targets


def losses_and_gradients(
    z: Tensor, items: Tensor, targets: Tensor, sizes: Sequence[int], weights: Sequence[float], **options: Any
) -> list[Tensor]:
    """Losses [S], and the gradients of their weighted sum with respect to z and items."""
    losses = nested_cross_entropy(z, items, targets, LossSettings(tuple(sizes), **options))
    weighted = (losses * torch.tensor(weights, dtype=losses.dtype)).sum()
    return [losses.detach(), *torch.autograd.grad(weighted, (z, items))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("distilled", DISTILLED)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("num_positions", "num_items"), SHAPES)
def test_tiled_equals_its_plain_twin(
    num_positions: int, num_items: int, weights: tuple[float, ...], distilled: str, dtype: torch.dtype
) -> None:
    inputs, options = make_inputs(num_positions, num_items, dtype=dtype), DISTILLED[distilled]
    found, expected = (
        losses_and_gradients(*inputs, SIZES, weights, impl=impl, **options) for impl in ("tiled", "plain")
    )
    for result, twin in zip(found, expected, strict=True):
        assert result.dtype == dtype
        assert_relatively_close(result, twin, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(35,), (1, 35), tuple(range(1, 36))], ids=["one", "two", "each"])
def test_any_sizes(sizes: tuple[int, ...]) -> None:
    inputs = make_inputs(17, 61)
    weights = torch.randn(len(sizes), generator=torch.Generator().manual_seed(1)).tolist()
    found, expected = (losses_and_gradients(*inputs, sizes, weights, impl=impl) for impl in ("tiled", "plain"))
    for result, twin in zip(found, expected, strict=True):
        assert_relatively_close(result, twin, 1e-10)


def test_gradients_equal_finite_differences() -> None:
    z, items, targets = make_inputs(5, 7, width=6)
    assert torch.autograd.gradcheck(
        lambda z, items: nested_cross_entropy(z, items, targets, LossSettings((2, 3, 6))), (z, items)
    )


@pytest.mark.parametrize("impl", ["tiled", "plain"])
def test_distillation_word_by_word(impl: str) -> None:
    """The gradient of size i's score of item v is softmax_iv - (1 - α_i)·[v = y] - α_i·t_v; the losses' values stay."""
    sizes, alphas, temperatures, kappa = (4, 35), (0.3, 0.0), (0.5, 2.0), 1.7
    z, items, targets = make_inputs(6, 40)
    settings = LossSettings(sizes, temperatures, impl, distillation=alphas, teacher_temperature=kappa)
    losses = nested_cross_entropy(z, items, targets, settings)
    without = nested_cross_entropy(z, items, targets, LossSettings(sizes, temperatures, impl))
    torch.testing.assert_close(losses, without, rtol=1e-12, atol=0)
    (grad_z,) = torch.autograd.grad(losses[0], z)
    scores = (z[:, :4] @ items[:, :4].T / temperatures[0]).detach()
    teacher = F.softmax((z @ items.T / temperatures[1]).detach() / kappa, 1)
    grad_scores = F.softmax(scores, 1) - 0.7 * F.one_hot(targets, 40).double() - 0.3 * teacher
    expected = torch.zeros_like(z)
    expected[:, :4] = grad_scores @ items[:, :4].detach() / temperatures[0]
    assert_relatively_close(grad_z, expected, 1e-12, floor=1e-3)


def test_second_gradients_are_refused_rather_than_wrong() -> None:
    z, items, targets = make_inputs(5, 7, width=6)
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = (nested_cross_entropy(z, items, targets, LossSettings((2, 6))) * weights).sum()
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_losses_are_each_sizes_own_cross_entropy() -> None:
    z, items, targets = make_inputs(9, 31)
    losses = nested_cross_entropy(z, items, targets, LossSettings(SIZES))
    for size, loss in zip(SIZES, losses, strict=True):
        scores = z[:, :size] @ items[:, :size].T
        torch.testing.assert_close(loss, -F.log_softmax(scores, 1)[torch.arange(9), targets].sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", ["tiled", "plain"])
def test_no_positions_give_zero_losses_and_zero_gradients(impl: str) -> None:
    z, items, targets = make_inputs(0, 11)
    losses, grad_z, grad_items = losses_and_gradients(z, items, targets, SIZES, WEIGHTS["mixed"], impl=impl)
    assert torch.equal(losses, torch.zeros(len(SIZES), dtype=torch.float64))
    assert grad_z.shape == (0, SIZES[-1])
    assert torch.equal(grad_items, torch.zeros_like(items))


def test_one_item_leaves_nothing_to_learn() -> None:
    z, items, targets = make_inputs(3, 1)
    for result in losses_and_gradients(z, items, targets, SIZES, WEIGHTS["sum"]):
        torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [WEIGHTS["sum"], WEIGHTS["mixed"]], ids=["sum", "mixed"])
@pytest.mark.parametrize(("num_positions", "num_items"), [(63, 507), (TILE_POSITIONS + 1, TILE_ITEMS + 1)])
def test_bfloat16_errs_no_more_than_the_plain_twin_in_bfloat16(
    num_positions: int, num_items: int, weights: tuple[float, ...]
) -> None:
    """Both against float64: the plain twin's error in bfloat16 is the budget, within a half: chunks add roundings."""
    z, items, targets = make_inputs(num_positions, num_items, dtype=torch.float32)
    found = losses_and_gradients(z, items, targets, SIZES, weights, dtype=torch.bfloat16)
    plain = losses_and_gradients(z, items, targets, SIZES, weights, dtype=torch.bfloat16, impl="plain")
    exact = losses_and_gradients(z.double(), items.double(), targets, SIZES, weights, impl="plain")
    for result, budget, truth in zip(found, plain, exact, strict=True):
        assert result.dtype == torch.float32
        assert 0 < (result - truth).norm() <= 1.5 * (budget - truth).norm()


@pytest.mark.parametrize("impl", ["tiled", "plain"])
def test_huge_scores_do_not_overflow(impl: str) -> None:
    z, items, targets = make_inputs(40, 1300, dtype=torch.float32)
    huge_z = (1e4 * z).detach().requires_grad_()
    assert (huge_z @ items.T).abs().amax() > 1e5  # exp overflows float32 at 89
    results = losses_and_gradients(huge_z, items, targets, SIZES, WEIGHTS["sum"], impl=impl)
    truths = losses_and_gradients(huge_z.double(), items.double(), targets, SIZES, WEIGHTS["sum"], impl="plain")
    for result, truth in zip(results, truths, strict=True):
        assert result.isfinite().all()
        assert (result - truth).norm() <= 1e-5 * truth.norm()  # gaps between the scores are far above their rounding


def peak_floats(num_positions: int, num_items: int, sizes: Sequence[int], impl: str) -> float:
    """Float32 values held at once by forward and backward, in addition to the inputs."""
    z, items, targets = make_inputs(num_positions, num_items, sizes[-1], torch.float32)
    with HeldMemory() as memory:
        losses_and_gradients(z, items, targets, sizes, [1.0] * len(sizes), impl=impl)
    return memory.peak_bytes / 4


@pytest.mark.parametrize(("sizes"), [(4, 8), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_logits_never_exceed_a_tile_and_what_is_kept(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Held: the S scores of a tile and of the one before, and what has the size of an input; however large N·V is."""
    monkeypatch.setattr(tiled_log_sum_exp, "KEPT_BYTES", 0)
    num_positions, num_items = 2 * TILE_POSITIONS, 3 * TILE_ITEMS
    all_logits = len(sizes) * num_positions * num_items
    tile = len(sizes) * TILE_POSITIONS * TILE_ITEMS
    linear = (num_positions + num_items) * (sizes[-1] + len(sizes))
    assert peak_floats(num_positions, num_items, sizes, "tiled") <= 2 * tile + 4 * linear < all_logits
    assert peak_floats(num_positions, num_items, sizes, "plain") >= all_logits  # the measure does see logits
