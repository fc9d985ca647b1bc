"""Dropout by channel: rates, scale, gradients, independence, slices."""

from __future__ import annotations

import pytest
import torch

from fmrl_dist.model.dropout import NestedDropout
from fmrl_dist.model.fmrlrec import FMRLRec

SIZES = (4, 9, 16)


def test_a_channel_is_dropped_at_the_rate_of_its_size() -> None:
    torch.manual_seed(0)
    dropout = NestedDropout(SIZES, 0.5, 0.5)
    assert dropout.rates == pytest.approx((0.25, 0.375, 0.5))
    found = (dropout(torch.ones(40_000, 16)) == 0).float().mean(0)
    expected = torch.tensor([0.25] * 4 + [0.375] * 5 + [0.5] * 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.012)  # five standard errors


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1 / 3, 0.7, 0.99999999])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 1001])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(num_rows: int, rate: float) -> None:
    """By the rate that is in force, a multiple of 2⁻¹⁶ that leaves something."""
    x = torch.randn(num_rows, 9, dtype=torch.float64, requires_grad=True)
    out = NestedDropout((4, 9), rate, 0.0)(x)
    kept = max(round((1 - rate) * 65536), 1) / 65536
    is_kept = out != 0
    torch.testing.assert_close(out, torch.where(is_kept, x / kept, 0.0))
    out.sum().backward()
    torch.testing.assert_close(x.grad, is_kept.double() / kept)


def test_entries_are_independent() -> None:
    """Of their neighbours, which come from the same draw, and of those a row further."""
    torch.manual_seed(1)
    is_kept = (NestedDropout((16,), 0.4, 0.0)(torch.ones(50_000, 16)) != 0).double()
    correlation = torch.corrcoef(torch.cat((is_kept[1:], is_kept[:-1]), 1).T)
    assert (correlation - torch.eye(32)).abs().max() < 5 / 50_000**0.5


def test_generators_decide() -> None:
    x, dropout = torch.ones(100, 16), NestedDropout((16,), 0.5, 0.0)
    torch.manual_seed(3)
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)


def test_nothing_is_dropped_in_evaluation_or_at_rate_0() -> None:
    x = torch.randn(5, 16)
    assert NestedDropout(SIZES, 0.5, 1.0).eval()(x) is x
    assert NestedDropout(SIZES, 0.0, 1.0)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rate < 1"):
        NestedDropout(SIZES, rate, 0.5)


def test_a_slice_has_the_rates_of_its_channels() -> None:
    model = FMRLRec(SIZES, 1, {"text": 3}, dropout=0.5, lru_dropout=0.3, dropout_power=0.7)
    small = model.truncate(9)
    assert small.rates == pytest.approx({"dropout": 0.5 * (9 / 16) ** 0.7, "lru_dropout": 0.3 * (9 / 16) ** 0.7})
    for size in (4, 9, 16):
        cut, place = model.truncate(size), SIZES.index(size) + 1
        for name, module in cut.named_modules():
            if isinstance(module, NestedDropout):
                whole = model.get_submodule(name)
                assert isinstance(whole, NestedDropout)
                assert module.rates == pytest.approx(whole.rates[:place])
