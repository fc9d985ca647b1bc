"""Rates of the machine that bound everything else: large matrix products, and copies within the device's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.stage import StageRun
from fmrl_dist.base.errors import run_command

BUDGET_S = 2.0


def main(argv: list[str]) -> None:
    run = StageRun.start("machine", argv)
    size = 256 if run.is_dry_run else 8192
    for name, dtype, tf32 in (
        ("float32, IEEE", torch.float32, False),
        ("float32, TF32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
        timing = run.time({"": product(a, b)}, BUDGET_S)[""]
        rates = [2 * size**3 / seconds / 1e12 for seconds in timing.seconds]
        run.record(product=f"{name}, {size}³", seconds=str(timing), teraflops=max(rates), median=_median(rates))
        torch.backends.cuda.matmul.allow_tf32 = False
    num_bytes = 2**22 if run.is_dry_run else 2**32
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    timing = run.time({"": lambda: target.copy_(source)}, BUDGET_S)[""]
    rates = [2 * num_bytes / seconds / 1e9 for seconds in timing.seconds]
    run.record(copy=f"{num_bytes / 2**20:.0f} MiB", seconds=str(timing), gb_per_s=max(rates), median=_median(rates))
    run.finish()


def product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: a @ b


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    run_command(main)
