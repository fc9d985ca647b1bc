"""What ``loss.impl`` and ``model.scan`` accept, and how they are resolved."""

from __future__ import annotations

import pytest
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from fmrl_dist.losses.log_sum_exp import nested_log_sum_exp
from fmrl_dist.losses.settings import LOSS_IMPLS, LossSettings
from fmrl_dist.model.scan import SCAN_IMPLS
from fmrl_dist.training.checks import resolve_loss_impl

CPU = torch.device("cpu")


@pytest.mark.parametrize("impl", ["compiled", "fast"])
def test_the_configuration_refuses_an_unknown_implementation(impl: str) -> None:
    with pytest.raises(UserError, match=f"loss.impl is '{impl}'; expected one of: auto, tiled, triton, plain"):
        load_config(None, ["--loss.impl", impl])
    with pytest.raises(
        UserError, match=f"model.scan is '{impl}'; expected one of: auto, stepwise, doubling, triton, plain"
    ):
        load_config(None, ["--model.scan", impl])


def test_the_configuration_takes_every_implementation() -> None:
    for impl in ("auto", *LOSS_IMPLS):
        assert load_config(None, ["--loss.impl", impl]).loss.impl == impl
    for scan in SCAN_IMPLS:
        assert load_config(None, ["--model.scan", scan]).model.scan == scan


@pytest.mark.parametrize(("impl", "resolved"), [("auto", "tiled"), ("tiled", "tiled"), ("plain", "plain")])
def test_on_the_cpu(impl: str, resolved: str) -> None:
    assert resolve_loss_impl(impl, CPU) == resolved


def test_triton_does_not_sum_in_float64() -> None:
    z, items = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="sum in float32, and z is float64; choose impl tiled or plain"):
        nested_log_sum_exp(z, items, LossSettings((4, 8), impl="triton"))


def test_settings_of_each_size_alone() -> None:
    both = LossSettings((4, 8), (2.0, 0.5), "plain", torch.bfloat16)
    assert both.of_each_size() == [
        LossSettings((4,), (2.0,), "plain", torch.bfloat16),
        LossSettings((8,), (0.5,), "plain", torch.bfloat16),
    ]
    assert both.inverse_temperatures == (0.5, 2.0)
    assert LossSettings((4, 8)).inverse_temperatures == (1.0, 1.0)
