"""Nested linear and layer-norm against eq. 2-4 word by word: forward, every gradient, masks, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.nested import (
    NestedLayerNorm,
    NestedLinear,
    chunk_groups,
    chunks,
    init_nested,
    nested_layer_norm,
    nested_linear,
    nested_linear_plain,
    nested_mask,
)
from tests.fixtures.numerics import TOLERANCE, assert_relatively_close

SIZES = [(4,), (8, 16, 32), (4, 11, 16, 63), (63, 507), (5, 17, 300, 307, 560)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(dtype).requires_grad_()


def test_chunks_lie_between_consecutive_sizes() -> None:
    assert chunks((8, 16, 32)) == [(0, 8), (8, 16), (16, 32)]
    assert chunks((5,)) == [(0, 5)]


def test_mask_lets_each_output_chunk_read_its_own_prefix() -> None:
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1],
        ]
    )
    assert torch.equal(nested_mask((2, 3, 5)), expected.float())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_nested_linear_equals_its_plain_twin(sizes: tuple[int, ...], num_rows: int, dtype: torch.dtype) -> None:
    width = sizes[-1]
    x = random_tensor(num_rows, width, dtype=dtype, seed=1)
    weight = random_tensor(width, width, dtype=dtype, seed=2)  # dense: the mask must hide what is not the model's
    bias = random_tensor(width, dtype=dtype, seed=3)
    upstream = random_tensor(num_rows, width, dtype=dtype, seed=4).detach()

    found = nested_linear(x[:, None], weight[None, None], bias[None], sizes)[:, 0]
    expected = nested_linear_plain(x, weight, bias, sizes)
    assert_relatively_close(found, expected, TOLERANCE[dtype])
    found_grads = torch.autograd.grad(found, (x, weight, bias), upstream)
    expected_grads = torch.autograd.grad(expected, (x, weight, bias), upstream)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert_relatively_close(found_grad, expected_grad, TOLERANCE[dtype])


def test_several_inputs_and_outputs_are_each_nested() -> None:
    """[2, 3, D, D] weights: every D×D block separately through the plain twin."""
    sizes, width = (4, 300, 600), 600
    x = random_tensor(5, 3, width, dtype=torch.float64, seed=1)
    weight = random_tensor(2, 3, width, width, dtype=torch.float64, seed=2)
    bias = random_tensor(2, width, dtype=torch.float64, seed=3)
    upstream = random_tensor(5, 2, width, dtype=torch.float64, seed=4).detach()
    no_bias = bias.new_zeros(width)
    products = [[nested_linear_plain(x[:, k], weight[g, k], no_bias, sizes) for k in range(3)] for g in range(2)]
    expected = torch.stack([sum(row, bias[g]) for g, row in enumerate(products)], 1)
    found = nested_linear(x, weight, bias, sizes)
    assert_relatively_close(found, expected, 1e-10)
    inputs = (x, weight, bias)
    for found_grad, expected_grad in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert_relatively_close(found_grad, expected_grad, 1e-10)


def test_groups_hold_whole_chunks_and_are_not_thin() -> None:
    assert chunk_groups((8, 16, 32, 64, 128, 256, 512, 1024)) == [(0, 256), (256, 512), (512, 1024)]
    assert chunk_groups((8, 64)) == [(0, 64)]
    assert chunk_groups((300, 310, 700, 710)) == [(0, 300), (300, 700), (700, 710)]


def test_bfloat16_products_err_no_more_than_the_plain_twin_in_bfloat16() -> None:
    sizes = (8, 32)
    x = random_tensor(500, 32, dtype=torch.float32, seed=1)
    weight = random_tensor(32, 32, dtype=torch.float32, seed=2)
    bias = random_tensor(32, dtype=torch.float32, seed=3)
    found = nested_linear(x[:, None], weight[None, None], bias[None], sizes, torch.bfloat16)[:, 0]
    exact = nested_linear_plain(x.double(), weight.double(), bias.double(), sizes)
    own_error = nested_linear_plain(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), sizes).double() - exact
    assert found.dtype == torch.float32
    assert 0 < (found.double() - exact).norm() <= 1.1 * own_error.norm()  # rounded in another order: equal up to noise
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(found.sum(), (x, weight, bias)))


@pytest.mark.parametrize("sizes", SIZES)
def test_masked_entries_start_at_zero_and_no_gradient_reaches_them(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, recurrent = NestedLinear(sizes), LRU(sizes, 0.1, 0.2, None)
    x = torch.randn(9, sizes[-1])
    layer(x).square().sum().backward()
    recurrent(x, torch.tensor([0, 4, 9])).square().sum().backward()
    hidden = nested_mask(sizes) == 0
    for weight in (layer.weight, recurrent.B, recurrent.C):
        assert weight.grad is not None
        assert weight[..., hidden].eq(0).all()
        assert weight.grad[..., hidden].eq(0).all()
        assert weight.grad[..., ~hidden].ne(0).any(-1).all()


def test_initialisation_is_uniform_within_each_chunks_bound() -> None:
    torch.manual_seed(0)
    sizes = (16, 64, 256)
    weight, pair, bias = (init_nested(*shape, sizes=sizes) for shape in ((256, 256), (2, 256, 256), (2, 256)))
    for low, high in chunks(sizes):
        bound = 1 / math.sqrt(high)
        for values in (weight[low:high, :high], pair[0, low:high, :high], pair[1, low:high, :high], bias[:, low:high]):
            assert values.abs().max() <= bound
        for matrix in (weight[low:high, :high], pair[0, low:high, :high], pair[1, low:high, :high]):
            assert matrix.abs().max() > 0.95 * bound
            assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("sizes", SIZES)
def test_layer_norm_of_a_chunk_sees_that_chunk_alone(sizes: tuple[int, ...]) -> None:
    width = sizes[-1]
    x, upstream = (random_tensor(6, width, dtype=torch.float64, seed=s).detach() for s in (1, 2))
    weight = random_tensor(width, dtype=torch.float64, seed=3)
    bias = random_tensor(width, dtype=torch.float64, seed=4)
    x.requires_grad_()
    found = nested_layer_norm(x, weight, bias, sizes)
    grads = torch.autograd.grad(found, (x, weight, bias), upstream)
    for low, high in chunks(sizes):
        x_j, weight_j, bias_j = (t[..., low:high].detach().requires_grad_() for t in (x, weight, bias))
        mean = x_j.mean(1, keepdim=True)
        variance = (x_j - mean).square().mean(1, keepdim=True)
        expected = (x_j - mean) / (variance + 1e-5).sqrt() * weight_j + bias_j
        assert_relatively_close(found[:, low:high], expected, 1e-10)
        expected_grads = torch.autograd.grad(expected, (x_j, weight_j, bias_j), upstream[:, low:high])
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_relatively_close(grad[..., low:high], expected_grad, 1e-10)


def test_layer_norm_over_one_size_is_the_ordinary_one() -> None:
    norm = NestedLayerNorm((12,))
    x = torch.randn(3, 12, generator=generator())
    torch.testing.assert_close(norm(x), F.layer_norm(x, (12,)))


def test_prefix_of_a_layer_norm_does_not_depend_on_the_channels_after_it() -> None:
    norm = NestedLayerNorm((4, 12))
    x = torch.randn(3, 12, generator=generator())
    changed = x.clone()
    changed[:, 4:] = torch.nan
    assert torch.equal(norm(x)[:, :4], norm(changed)[:, :4])
