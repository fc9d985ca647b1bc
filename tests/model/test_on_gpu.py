"""The model's and the loss's operators on a GPU against their plain twins in float64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fmrl_dist.losses.log_sum_exp import catalogue_log_sum_exp
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.dropout import NestedDropout
from fmrl_dist.model.mixers.mixing import MIXERS, Mixing, build_mixer
from fmrl_dist.model.nested import nested_linear
from fmrl_dist.model.scan import packed_scan
from tests.fixtures.normalizers import DISTILLED, values_and_gradients
from tests.fixtures.triton_cases import EVEN_SIZES, SIZES, check_catalogue, check_log_sum_exp, check_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FEATURES = 23
# float64 on a GPU sums in another order; float32 also multiplies in float32
BUDGET = {torch.float64: 1e-10, torch.float32: 5e-6}
SCAN_BUDGET = 3e-5  # float32, powers of the decay by squaring
MIXER_BUDGET = 3e-5  # float32, through all of a mixer
TRITON_DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def on_gpu(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to("cuda", dtype).requires_grad_(tensor.requires_grad) for tensor in tensors]


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], budget: float) -> None:
    for part, (result, twin) in enumerate(zip(found, expected, strict=True)):
        assert result.is_cuda
        error = (result.double().cpu() - twin).norm() / twin.norm().clamp_min(1e-300)
        assert error <= budget, f"part {part}"


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("with_table", [False, True], ids=["features", "features and ids"])
@pytest.mark.parametrize(("num_positions", "num_items"), [(1, 1), (63, 507), (2049, 4097)])
def test_tiled_loss(num_positions: int, num_items: int, with_table: bool, dtype: torch.dtype) -> None:
    weights, features = draw(len(SIZES), num_positions), draw(num_items, FEATURES)
    given = [draw(num_positions, SIZES[-1]), draw(SIZES[-1], FEATURES) / FEATURES**0.5]
    given += [draw(num_items, SIZES[-1])] if with_table else []
    given = [tensor.requires_grad_() for tensor in given]

    def results(impl: str, tensors: list[Tensor], features: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        z, weight, *table = tensors
        settings = LossSettings(SIZES, impl=impl, **DISTILLED["softer"])
        found = catalogue_log_sum_exp(z, features, weight, table[0] if table else None, settings)
        return tuple(values_and_gradients(found, weights, tensors))

    expected = results("plain", given, features, weights)
    check(results("tiled", on_gpu(given, dtype), *on_gpu([features, weights], dtype)), expected, BUDGET[dtype])


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("corrected", [False, True], ids=["catalogue", "corrected"])
@pytest.mark.parametrize(("num_positions", "num_items"), [(1, 1), (33, 70), (130, 4200)])
def test_triton_loss(num_positions: int, num_items: int, corrected: bool, dtype: torch.dtype) -> None:
    if (num_items, corrected) != (1, True):  # a hit would leave no item
        check_log_sum_exp(num_positions, num_items, dtype, corrected, device="cuda")


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("distilled", DISTILLED)
def test_triton_loss_of_even_sizes(distilled: str, dtype: torch.dtype) -> None:
    check_log_sum_exp(130, 520, dtype, False, device="cuda", sizes=EVEN_SIZES, distilled=distilled)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("with_table", [False, True], ids=["features", "features and ids"])
def test_triton_loss_over_a_catalogue(with_table: bool, dtype: torch.dtype) -> None:
    check_catalogue(35, 131, dtype, with_table, device="cuda")


def scan_inputs(lengths: list[int], modulus: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Decay and x, starts, and the gradient of the states; the decay is what float32 holds."""
    phase = 6 * torch.rand(70, dtype=torch.float64)
    decay = (modulus * torch.stack((phase.cos(), phase.sin()))).float().double()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    given = [decay.requires_grad_(), draw(int(starts[-1]), 2, 70).requires_grad_()]
    return given, starts, draw(int(starts[-1]), 2, 70)


def scan_and_gradients(impl: str, tensors: list[Tensor], starts: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    states = packed_scan(tensors[0], tensors[1], starts, impl)
    return states.detach(), *torch.autograd.grad(states, tensors, upstream)


@pytest.mark.parametrize("impl", ["auto", "doubling", "triton"])
@pytest.mark.parametrize("modulus", [0.05, 0.9, 0.999])
@pytest.mark.parametrize("lengths", [[2], [3, 0, 1, 17], [5, 200, 64]])
def test_scan(lengths: list[int], modulus: float, impl: str) -> None:
    given, starts, upstream = scan_inputs(lengths, modulus)
    dtype = torch.float32
    found = scan_and_gradients(impl, on_gpu(given, dtype), starts.cuda(), *on_gpu([upstream], dtype))
    check(found, scan_and_gradients("plain", given, starts, upstream), SCAN_BUDGET)


def test_triton_scan_in_float16() -> None:
    for lengths, width in (([2], 1), ([3, 0, 1, 17], 70), ([5], 64)):
        check_scan(lengths, width, torch.float16, modulus=0.9, device="cuda")


@pytest.mark.parametrize(("impl", "allowed"), [("doubling", 2), ("triton", 0)])
def test_the_host_waits_for_the_device_at_most_once_in_a_scan(impl: str, allowed: int) -> None:
    """Of the doubling scan, once forward and once backward."""
    given, starts, upstream = scan_inputs([5, 200, 64], 0.9)
    tensors, (upstream,), starts = on_gpu(given, torch.float32), on_gpu([upstream], torch.float32), starts.cuda()
    scan_and_gradients(impl, tensors, starts, upstream)  # compiles
    assert count_waits(lambda: scan_and_gradients(impl, tensors, starts, upstream)) <= allowed


def count_waits(work: Callable[[], object]) -> int:
    """Synchronising operations, as PyTorch notices them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer(mixer: str) -> None:
    """Outputs and all gradients; the plain twin takes one sequence at a time."""
    lengths = (5, 1, 0, 64, 17)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    mixing = Mixing(mixer, 0.5, 0.99, 16, "rotary", max(lengths))
    plain, ours = (build_mixer(mixing, EVEN_SIZES, None, scan).double() for scan in ("plain", "auto"))
    ours.load_state_dict(plain.state_dict())
    x, upstream = draw(sum(lengths), EVEN_SIZES[-1]), draw(sum(lengths), EVEN_SIZES[-1])

    def results(module: torch.nn.Module, x: Tensor, starts: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        x.requires_grad_()
        y = module(x, starts)
        return y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)

    given, gradient = on_gpu([x, upstream], torch.float32)
    found = results(ours.to("cuda", torch.float32), given, starts.cuda(), gradient)
    check(found, results(plain, x, starts, upstream), MIXER_BUDGET)


def test_dropout_has_each_channels_rate_and_never_waits_for_the_device() -> None:
    sizes, rows = (4, 9, 35), 40_000
    dropout = NestedDropout(sizes, 0.5, 0.4)
    x = torch.rand(rows, sizes[-1], device="cuda") + 1
    dropout(x)  # makes the thresholds
    found: list[Tensor] = []
    assert count_waits(lambda: found.append(dropout(x))) == 0
    for (low, high), rate in zip(((0, 4), (4, 9), (9, 35)), dropout.rates, strict=True):
        part, given = found[0][:, low:high], x[:, low:high]
        kept = part != 0
        deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - (1 - rate)) < 5 * deviation + 1 / 2**16
        torch.testing.assert_close(part[kept], given[kept] / (1 - rate), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", BUDGET)
def test_nested_linear(dtype: torch.dtype) -> None:
    sizes = (8, 256, 515)
    given = [draw(33, 2, 515), draw(1, 2, 515, 515) / 23, draw(1, 515)]
    given = [tensor.requires_grad_() for tensor in given]
    upstream = draw(33, 1, 515)

    def results(tensors: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        y = nested_linear(tensors[0], tensors[1], tensors[2], sizes)
        return y.detach(), *torch.autograd.grad(y, tensors, upstream)

    check(results(on_gpu(given, dtype), *on_gpu([upstream], dtype)), results(given, upstream), BUDGET[dtype])
