"""Which parameters decay, and the learning rate step by step."""

from __future__ import annotations

import math

import pytest
import torch

from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.optimizer import build_optimizer, id_learning_rates, set_learning_rate
from fmrl_dist.training.steps.schedule import learning_rate

DECAYED_IN_BLOCK = ("lru.B", "lru.C", "ffn.gate.weight", "ffn.w_1.weight", "ffn.w_2.weight")
KEPT_IN_BLOCK = (
    *("lru_norm.weight", "lru_norm.bias", "lru.b", "lru.c", "lru.nu", "lru.theta", "lru.gamma_log"),
    *("ffn_norm.weight", "ffn_norm.bias", "ffn.gate.bias", "ffn.w_1.bias", "ffn.w_2.bias"),
)


def make_model(id_table: bool = True) -> FMRLRec:
    return FMRLRec((4, 8), depth=2, feature_dims={"text": 3, "image": 2}, num_items=5 if id_table else 0)


def in_blocks(names: tuple[str, ...]) -> set[str]:
    return {f"blocks.{block}.{name}" for block in range(2) for name in names}


@pytest.mark.parametrize("id_table", [True, False])
def test_weight_decay_is_for_these_parameters_exactly(id_table: bool) -> None:
    model = make_model(id_table)
    optimizer = build_optimizer(model, 1e-3, (0.8, 0.95), 1e-7, 0.25, id_lr_factor=3.0, id_weight_decay=0.125)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_decay = {
        group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]]
        for group in optimizer.param_groups
    }
    assert by_decay.keys() == ({0.25, 0.0, 0.125} if id_table else {0.25, 0.0})
    assert sorted(by_decay[0.25]) == sorted({"encoder.weight"} | in_blocks(DECAYED_IN_BLOCK))
    assert by_decay.get(0.125, ["encoder.id_table"]) == ["encoder.id_table"]
    assert sorted(by_decay[0.0]) == sorted({"encoder.bias", "encoder.stand_ins"} | in_blocks(KEPT_IN_BLOCK))
    set_learning_rate(optimizer, 0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == (1.5 if group["weight_decay"] == 0.125 else 0.5)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7)


def test_decay_is_decoupled_from_the_gradient() -> None:
    """With gradients of zero a step multiplies decayed parameters by 1 - lr·decay and leaves the others."""
    model = make_model()
    optimizer = build_optimizer(model, lr=0.1, betas=(0.9, 0.999), eps=1e-9, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {"encoder.weight"} | in_blocks(DECAYED_IN_BLOCK)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if name in decayed else 1.0))


def test_learning_rate_by_hand() -> None:
    """Four steps of warm-up, eight of cosine from 1.0 to 0.2."""
    rates = [learning_rate(step, 1.0, warmup_steps=4, schedule_steps=12, min_ratio=0.2) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates[4:12] == pytest.approx(cosine, rel=1e-12)
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.6)
    assert rates[12:] == pytest.approx([0.2, 0.2], rel=1e-12)


def test_the_peak_scales_the_rate() -> None:
    for step in range(20):
        one = learning_rate(step, 1.0, 5, 15, 0.1)
        assert learning_rate(step, 3e-4, 5, 15, 0.1) == pytest.approx(3e-4 * one)


def test_no_warmup_starts_at_the_peak() -> None:
    rates = [learning_rate(step, 0.5, warmup_steps=0, schedule_steps=10, min_ratio=0.0) for step in range(12)]
    assert rates[0] == 0.5 and rates[5] == pytest.approx(0.25)
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == rates[11] == pytest.approx(0.0, abs=1e-15)


def test_a_schedule_shorter_than_its_warmup() -> None:
    rates = [learning_rate(step, 1.0, warmup_steps=10, schedule_steps=4, min_ratio=0.0) for step in range(13)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([1.0, 0.0, 0.0], abs=1e-15)


def test_the_ids_of_smaller_sizes_learn_faster() -> None:
    """Each channel by the size that adds it; a table's prefix has the rates of its channels."""
    rates = id_learning_rates((4, 9, 16), 16, 2.0, 0.5)
    assert rates.tolist() == pytest.approx([2 * 2**0.5] * 4 + [2.0] * 12)
    assert torch.equal(id_learning_rates((4, 9, 16), 9, 2.0, 0.5), rates[:9])
    assert id_learning_rates((4, 9), 9, 3.0, 0.0).tolist() == [3.0] * 9
