"""The scans against the plain one: forward, every gradient, ugly lengths, broken neighbours, single steps.

The doubling scan's rounds gather rows on the CPU and mask them on a GPU; here both run, on the CPU.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.model import scan
from fmrl_dist.model.scan import complex_mul, packed_scan, scan_step
from tests.fixtures.numerics import TOLERANCE, assert_relatively_close

MODULI = [0.001, 0.1, 0.999]
ROUNDS = {"gathered": scan._double_gathered_rows, "masked": scan._double_masked_rows}


@pytest.fixture(params=[*ROUNDS, "stepwise"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What "auto" is: the doubling scan with its rounds in one way, then in the other, then the stepwise scan."""
    if request.param in ROUNDS:
        monkeypatch.setattr(scan, "_double_gathered_rows", ROUNDS[request.param])
    monkeypatch.setattr(scan, "STEP_NUMBERS", 0 if request.param == "stepwise" else math.inf)
    return str(request.param)


def make_starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


def make_decay(width: int, modulus: float, generator: torch.Generator) -> Tensor:
    """Λ [2, D] float64 on the circle of ``modulus``, at random phases."""
    return modulus * torch.nn.functional.normalize(
        torch.randn(2, width, dtype=torch.float64, generator=generator), dim=0
    )


def assert_twins_agree(lengths: list[int], width: int, modulus: float, dtype: torch.dtype, seed: int = 0) -> None:
    """States and the gradients of Λ and x, each to the dtype's tolerance, in units of its largest value."""
    generator = torch.Generator().manual_seed(seed)
    starts = make_starts(lengths)
    decay = make_decay(width, modulus, generator).to(dtype)
    x, upstream = torch.randn(2, sum(lengths), 2, width, dtype=torch.float64, generator=generator).to(dtype)
    decay.requires_grad_()
    x = x.clone().requires_grad_()
    found, expected = (packed_scan(decay, x, starts, impl) for impl in ("auto", "plain"))
    results = [(found, expected)]
    # of Λ, too, where no state depends on it: data parallelism waits for every gradient
    results += zip(*(torch.autograd.grad(h, (decay, x), upstream) for h in (found, expected)), strict=True)
    for result, twin in results:
        assert result.dtype == dtype
        assert_relatively_close(result, twin, TOLERANCE[dtype], floor=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("modulus", MODULI)
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [0, 0, 0], [1], [1, 1, 1], [0, 1, 0, 0, 3, 0], [2, 1, 63, 64, 65], list(range(68)), [507]],
    ids=["none", "empty", "empties", "one", "ones", "gaps", "powers", "1-67", "507"],
)
@pytest.mark.usefixtures("rounds")
def test_the_scan_equals_its_plain_twin(lengths: list[int], modulus: float, dtype: torch.dtype) -> None:
    assert_twins_agree(lengths, 5, modulus, dtype)


@pytest.mark.usefixtures("rounds")
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 20), max_size=8),
    width=st.integers(1, 9),
    modulus=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**16),
)
def test_the_scan_equals_its_plain_twin_anywhere(lengths: list[int], width: int, modulus: float, seed: int) -> None:
    assert_twins_agree(lengths, width, modulus, torch.float64, seed)


def test_states_are_the_sums_of_powers() -> None:
    """h_k = Σ_j Λ^j x_{k-j} in complex arithmetic: an answer that neither twin gave."""
    decay = torch.tensor([0.3 + 0.4j, -0.9j], dtype=torch.complex128)
    x = torch.randn(6, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [
            torch.stack([decay**j * x[k - j] for j in range(k - first + 1)]).sum(0)
            for first, k in [(0, 0), (0, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
        ]
    )
    pairs = torch.stack((x.real, x.imag), 1)
    found = packed_scan(torch.stack((decay.real, decay.imag)), pairs, torch.tensor([0, 2, 6]))
    torch.testing.assert_close(torch.complex(found[:, 0], found[:, 1]), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("modulus", MODULI)
def test_gradients_equal_finite_differences(modulus: float) -> None:
    generator = torch.Generator().manual_seed(0)
    decay = make_decay(2, modulus, generator).requires_grad_()
    x = torch.randn(9, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    starts = make_starts([1, 0, 5, 3])
    assert torch.autograd.gradcheck(lambda decay, x: packed_scan(decay, x, starts), (decay, x))


@pytest.mark.usefixtures("rounds")
def test_second_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    decay = make_decay(1, 0.9, generator).requires_grad_()
    x = torch.randn(5, 2, 1, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda decay, x: packed_scan(decay, x, make_starts([1, 4])), (decay, x))


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("lengths", [[5, 9, 1, 6], [1, 1, 3, 1], [0, 4, 0, 70]])
def test_a_broken_sequence_leaves_its_neighbours_untouched(lengths: list[int], bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = make_starts(lengths)
    decay = make_decay(3, 0.5, generator)
    clean, upstream = torch.randn(2, sum(lengths), 2, 3, dtype=torch.float64, generator=generator)
    clean_leaf = clean.clone().requires_grad_()
    clean_states = packed_scan(decay, clean_leaf, starts)
    clean_states.backward(upstream)
    for low, high in itertools.pairwise(starts.tolist()):
        x = clean.clone()
        x[low:high] = bad
        x.requires_grad_()
        states = packed_scan(decay, x, starts)
        states.backward(upstream)
        others = torch.ones(len(x), dtype=torch.bool)
        others[low:high] = False
        assert torch.equal(states[others], clean_states[others])
        assert x.grad is not None and clean_leaf.grad is not None
        assert torch.equal(x.grad[others], clean_leaf.grad[others])


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_upstream_gradient_stays_in_its_sequence(bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = make_starts([5, 4, 6])
    decay = make_decay(3, 0.5, generator)
    x, upstream = torch.randn(2, 15, 2, 3, dtype=torch.float64, generator=generator)
    x = x.clone().requires_grad_()
    broken = upstream.clone()
    broken[5:9] = bad
    (clean_grad,) = torch.autograd.grad(packed_scan(decay, x, starts), x, upstream)
    (grad,) = torch.autograd.grad(packed_scan(decay, x, starts), x, broken)
    assert torch.equal(grad[:5], clean_grad[:5]) and torch.equal(grad[9:], clean_grad[9:])


@pytest.mark.usefixtures("rounds")
def test_a_broken_sequence_of_one_row_leaves_the_gradient_of_the_decay_untouched() -> None:
    """No state depends on the decay through it, but its state stands beside the next sequence's first row."""
    starts = make_starts([5, 1, 6])
    decay = make_decay(3, 0.5, torch.Generator().manual_seed(0)).requires_grad_()
    clean = torch.randn(12, 2, 3, dtype=torch.float64)
    upstream = torch.randn(12, 2, 3, dtype=torch.float64)
    broken = clean.clone()
    broken[5] = torch.nan
    (expected,), (found,) = (
        torch.autograd.grad(packed_scan(decay, x, starts), decay, upstream) for x in (clean, broken)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("modulus", MODULI)
def test_one_event_at_a_time_gives_the_scans_states(modulus: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    num_histories, length, width = 3, 67, 4
    decay = make_decay(width, modulus, generator).to(dtype)
    x = torch.randn(num_histories, length, 2, width, dtype=torch.float64, generator=generator).to(dtype)
    scanned = packed_scan(decay, x.flatten(0, 1), make_starts([length] * num_histories)).unflatten(0, x.shape[:2])
    state = x.new_zeros(num_histories, 2, width)
    for event in range(length):
        state = scan_step(decay, state, x[:, event])
        assert_relatively_close(state, scanned[:, event], TOLERANCE[dtype])


def test_strong_decay_leaves_no_denormal_state() -> None:
    """0.1^32 … 0.1^63 cross float32's denormals: such powers of Λ are flushed, the states before them stay exact."""
    x = torch.zeros(200, 2, 1)
    x[0, 0] = 1.0
    states = packed_scan(torch.tensor([[0.1], [0.0]]), x, make_starts([200]))[:, 0, 0]
    assert states[:19].tolist() == pytest.approx([10.0**-k for k in range(19)], rel=1e-5)
    assert not ((states != 0) & (states.abs() < torch.finfo(torch.float32).tiny)).any()


def test_complex_mul_is_complex_multiplication() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    found = complex_mul(torch.stack((a[0].real, a[0].imag)), torch.stack((b.real, b.imag), 1))
    torch.testing.assert_close(torch.complex(found[:, 0], found[:, 1]), a[0] * b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("longest", "modulus", "rounds"),
    [
        (1, 0.9, 0),  # no row has a predecessor
        (2, 0.9, 1),
        (64, 0.9, 6),
        (65, 0.9, 7),
        (2000, 1.0, 11),
        (2000, 0.1, 5),  # 0.1^32 is flushed
        (2000, 0.0, 1),
        (2000, math.nan, 11),
    ],
)
def test_number_of_masked_rounds(longest: int, modulus: float, rounds: int) -> None:
    decay = torch.tensor([[0.0, modulus, 0.0], [0.0, 0.0, 0.0]])
    assert scan._num_rounds(decay, torch.arange(longest)) == rounds


@pytest.mark.parametrize(("lengths", "impl"), [([1, 2], "doubling"), ([50] * 20, "stepwise"), ([1000], "doubling")])
def test_auto_on_the_cpu(lengths: list[int], impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the kernel; stepwise where a step has enough numbers: here 4 channels of so many sequences."""
    monkeypatch.setattr(scan, "_walk_rows", None)  # a kernel that cannot be called
    monkeypatch.setattr(scan, "STEP_NUMBERS", 20)
    x = torch.randn(sum(lengths), 2, 4)
    decay, starts = make_decay(4, 0.5, torch.Generator()).float(), make_starts(lengths)
    found, chosen = packed_scan(decay, x, starts), packed_scan(decay, x, starts, impl)
    assert torch.equal(found, chosen)
    if sum(lengths) > 3:
        other = packed_scan(decay, x, starts, "doubling" if impl == "stepwise" else "stepwise")
        assert not torch.equal(found, other)
