"""Triton kernels in the interpreter against their plain twins; ``tests/test_triton.py`` starts this.

Every value and gradient, in float32 and float16, on sizes that no block divides. In float16 both sides get the same
rounded inputs; the budget is a few of float16's roundings.
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from fmrl_dist.losses.log_sum_exp import nested_log_sum_exp
from fmrl_dist.losses.tiled_log_sum_exp import Correction
from fmrl_dist.ops.scan import packed_scan

BUDGET = {torch.float32: 2e-6, torch.float16: 2e-3}
SIZES = (4, 9, 35, 70)


def compare(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], budget: float) -> None:
    for part, (result, twin) in enumerate(zip(found, expected, strict=True)):
        assert result.shape == twin.shape, (name, part)
        assert result.isfinite().all(), (name, part)
        error = (result.double() - twin.double()).norm() / twin.double().norm().clamp_min(1e-30)
        assert error <= budget, f"{name}, part {part}: error {error:.1e}, budget {budget:.1e}"
    print(f"ok {name}")


def check_log_sum_exp(num_positions: int, num_items: int, dtype: torch.dtype, corrected: bool) -> None:
    torch.manual_seed(num_positions + num_items)
    z = torch.randn(num_positions, SIZES[-1]).to(dtype).float().requires_grad_()
    items = (torch.randn(num_items, SIZES[-1]) / 3).to(dtype).float().requires_grad_()
    correction = None
    if corrected:
        ids = torch.randint(50, (num_items,))
        correction = Correction(torch.randn(num_items), ids, torch.randint(50, (num_positions,)))
    weights = torch.randn(len(SIZES), num_positions)
    temperatures = (0.5, 1.0, 2.0, 1.5)

    def results(impl: str, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        lse = nested_log_sum_exp(z, items, SIZES, temperatures, correction, impl, dtype)
        return lse.detach(), *torch.autograd.grad((lse * weights).sum(), (z, items))

    name = f"log-sum-exp, {num_positions} × {num_items}, {dtype}, {'corrected' if corrected else 'whole catalogue'}"
    compare(name, results("triton", dtype), results("plain", None), BUDGET[dtype])


def check_scan(lengths: list[int], width: int, dtype: torch.dtype, modulus: float) -> None:
    torch.manual_seed(len(lengths) + width)
    phase = 6 * torch.rand(width)
    decay = (modulus * torch.stack((phase.cos(), phase.sin()))).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(int(starts[-1]), 2, width).to(dtype)
    upstream = torch.randn_like(x)

    def results(impl: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = [part.detach().to(dtype).requires_grad_() for part in (decay, x)]
        states = packed_scan(given[0], given[1], starts, impl)
        return states.detach(), *torch.autograd.grad(states, given, upstream.to(dtype))

    compare(
        f"scan, {lengths}, {width}, {dtype}", results("triton", dtype), results("plain", torch.float64), BUDGET[dtype]
    )


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton reads it when it is imported"
    for dtype in BUDGET:
        for (num_positions, num_items), corrected in itertools.product(((1, 1), (33, 70), (5, 131)), (False, True)):
            if (num_positions, num_items) == (1, 1) and corrected:
                continue  # a hit would leave no item
            check_log_sum_exp(num_positions, num_items, dtype, corrected)
        for lengths, width in (([2], 1), ([3, 0, 1, 17], 70), ([5], 64)):
            check_scan(lengths, width, dtype, modulus=0.9)
    check_log_sum_exp(3, 4200, torch.float32, False)  # two programs share the items


if __name__ == "__main__":
    main()
