"""Attention and filter on packed rows against their plain twins: values, every gradient, float64, odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.model.mixers.attention import chunk_heads, packed_attention, rotate
from fmrl_dist.model.mixers.bsarec import low_pass_kernel
from fmrl_dist.model.mixers.filter import Filter, fast_period, packed_filter
from fmrl_dist.model.packing import padded_groups, places_in_sequences, prefixes
from tests.fixtures.numerics import assert_relatively_close

LENGTHS = ((), (63,), (1,), (0, 1, 0), (9, 8, 17, 1, 33, 2), (5, 0, 16, 50, 3))


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def assert_same_with_gradients(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and the gradients of all inputs."""
    found, expected = fast(*inputs), plain(*inputs)
    assert_relatively_close(found, expected, 1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert_relatively_close(mine, theirs, 1e-11)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sizes", "head_width"), [((7,), 3), ((4, 9, 16), 4), ((8, 16, 32), 32), ((5, 31), 8)])
def test_attention_is_its_plain_twin(
    lengths: tuple[int, ...], causal: bool, sizes: tuple[int, ...], head_width: int
) -> None:
    torch.manual_seed(0)
    heads, starts = chunk_heads(sizes, head_width), starts_of(lengths)
    qkv = torch.randn(sum(lengths), 3, sizes[-1], dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda rows: packed_attention(rows, starts, heads, causal),
        lambda rows: packed_attention(rows, starts, heads, causal, "plain"),
        qkv,
    )


def test_attention_by_hand() -> None:
    """One head of one channel: the second row weighs the values by exp(q·k)."""
    qkv = torch.tensor([[[0.0], [1.0], [10.0]], [[2.0], [0.0], [20.0]]], dtype=torch.float64)
    found = packed_attention(qkv, torch.tensor([0, 2]), ((0, 1, 1),), causal=True)
    e = np.exp(2.0)
    torch.testing.assert_close(found[:, 0], torch.tensor([10.0, (10 * e + 20) / (e + 1)], dtype=torch.float64))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 40))
def test_heads_partition_each_chunk(widths: list[int], head_width: int) -> None:
    sizes = tuple(itertools.accumulate(widths))
    runs = chunk_heads(sizes, head_width)
    assert [run[:2] for run in runs] == list(itertools.pairwise((0, *sizes)))
    assert all((high - low) % width == 0 and width <= head_width for low, high, width in runs)


def test_rotary_products_know_distances_only() -> None:
    torch.manual_seed(0)
    heads = chunk_heads((5, 12), 7)  # one head of odd width
    pair = torch.randn(1, 2, 12, dtype=torch.float64)

    def product(query_place: int, key_place: int) -> Tensor:
        query = rotate(pair, torch.tensor([query_place]), heads)[0, 0]
        key = rotate(pair, torch.tensor([key_place]), heads)[0, 1]
        return torch.stack([(query * key)[low:high].sum() for low, high, _ in heads])

    torch.testing.assert_close(product(3, 1), product(40, 38), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(product(3, 1), product(3, 2))
    torch.testing.assert_close(rotate(pair, torch.tensor([0]), heads), pair)
    assert_relatively_close(rotate(pair, torch.tensor([17]), heads).norm(), pair.norm(), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [63, 64])
def test_the_filter_is_its_plain_twin(lengths: tuple[int, ...], causal: bool, window: int) -> None:
    torch.manual_seed(0)
    starts = starts_of(lengths)
    x = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(window, 3, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        lambda rows, taps: packed_filter(rows, taps, starts, causal),
        lambda rows, taps: packed_filter(rows, taps, starts, causal, "plain"),
        x,
        kernel,
    )


def test_a_causal_filter_forgets_what_is_older_than_its_window() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    kernel = torch.randn(7, 2, dtype=torch.float64)
    starts = torch.tensor([0, 20])
    assert_relatively_close(
        packed_filter(x, kernel, starts, True), packed_filter(x, kernel, starts, True, "plain"), 1e-12
    )
    older = x.clone()
    older[:13] = 0
    torch.testing.assert_close(
        packed_filter(older, kernel, starts, True)[-1], packed_filter(x, kernel, starts, True)[-1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("at_least", "period"), [(1, 1), (7, 8), (15, 15), (99, 100), (399, 400), (9999, 10000)])
def test_fast_periods(at_least: int, period: int) -> None:
    assert fast_period(at_least) == period


@pytest.mark.parametrize("window", [11, 12])
def test_the_published_filter_is_the_spectrum_of_a_padded_window(window: int) -> None:
    """FMLP-Rec's own order: padded on the left, FFT, times W, back. Its last row is the causal one's, too."""
    torch.manual_seed(0)
    layer = Filter(4, window, causal=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    padded = torch.cat((x.new_zeros(window - 5, 4), x))
    weight = torch.complex(layer.spectrum[:, 0], layer.spectrum[:, 1])
    expected = torch.fft.irfft(torch.fft.rfft(padded, dim=0) * weight, window, dim=0)[window - 5 :]
    starts = torch.tensor([0, 5])
    assert_relatively_close(layer(x, starts), expected, 1e-12)
    assert_relatively_close(packed_filter(x, layer.kernel(), starts, causal=True)[-1], expected[-1], 1e-12)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 70), max_size=12))
def test_groups_hold_every_row_once_and_little_padding(lengths: list[int]) -> None:
    starts = starts_of(tuple(lengths))
    groups = list(padded_groups(starts))
    rows = torch.cat([group.rows[group.is_row] for group in groups]) if groups else torch.empty(0)
    assert rows.sort().values.tolist() == list(range(sum(lengths)))
    for group in groups:
        counts = group.is_row.sum(1)
        assert (group.rows.diff(dim=1) >= 0).all() and bool(group.is_row[:, 0].all())
        assert group.rows.shape[1] == counts.max() and (2 * counts >= counts.max().clamp_min(9) - 8).all()


@given(st.lists(st.integers(0, 9), max_size=6))
def test_prefixes(lengths: list[int]) -> None:
    starts = starts_of(tuple(lengths))
    rows, prefix_starts = prefixes(starts)
    expected = [list(range(a, k + 1)) for a, b in itertools.pairwise(starts.tolist()) for k in range(a, b)]
    found = [rows[a:b].tolist() for a, b in itertools.pairwise(prefix_starts.tolist())]
    assert found == expected
    places = places_in_sequences(starts, sum(lengths)).tolist()
    assert places == [k for length in lengths for k in range(length)]


@pytest.mark.parametrize("window", [9, 10])
@pytest.mark.parametrize("num_frequencies", [1, 3, 6])
def test_the_low_pass_is_the_published_one(window: int, num_frequencies: int) -> None:
    """BSARec's own order: padded on the left, FFT, all but the first c // 2 + 1 set to zero, back."""
    torch.manual_seed(0)
    x = torch.randn(7, 2, dtype=torch.float64)
    spectrum = torch.fft.rfft(torch.cat((x.new_zeros(window - 7, 2), x)), dim=0)
    spectrum[num_frequencies // 2 + 1 :] = 0
    expected = torch.fft.irfft(spectrum, window, dim=0)[window - 7 :]
    kernel = low_pass_kernel(window, num_frequencies)[:, None].expand(-1, 2)
    assert_relatively_close(packed_filter(x, kernel, torch.tensor([0, 7]), causal=False), expected, 1e-12)
