"""Where a training step's time goes: its share of the machine's matmul rate, and the operators by time.

The machine's rate is that of 2,048 × 2,048 products of the same dtype in this process. A step's multiplications are
counted from the shapes of the products that the profiler saw, two operations each with its addition.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import describe_setting
from benchmarks.measuring.timing import Timing, interleave
from benchmarks.nesting import make_step, over
from benchmarks.step import SIZES, draw, pack, read_histories
from fmrl_dist.base.errors import run_command

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
SHOWN = 14


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.roofline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=Path, required=True, help="Beauty's sequences.parquet (column item_ids)")
    parser.add_argument("--histories", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    histories, num_items = read_histories(arguments.sequences)
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    for precision in arguments.precision:
        step = make_step(SIZES, 0.0, num_items, precision, "tiled")
        for num_histories in arguments.histories:
            batches = [draw(histories, number, num_histories) for number in range(arguments.rounds)]
            (times,) = interleave({"": over(step, batches)}, arguments.rounds).values()
            rate = matmul_rate(torch.float32 if precision == "fp32" else torch.bfloat16)
            with torch.profiler.profile(record_shapes=True) as profile:
                step(batches[0])
            targets = np.median([len(pack(batch).targets) for batch in batches])
            print(f"\n{precision}, {num_histories} histories (median {targets:.0f} targets)\n")
            print(report(profile.events(), times, rate), flush=True)


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of a large product; the best of five."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    (times,) = interleave({"": lambda _: a @ b}, 5).values()
    return float(2 * size**3 / min(times.seconds))


def report(events: Any, times: Timing, rate: float) -> str:
    """Achieved share of the rate, and the operators that take the time."""
    microseconds: dict[str, float] = defaultdict(float)
    operations = 0
    for event in events:
        microseconds[event.name] += event.self_cpu_time_total
        if event.name in PRODUCTS:
            (n, k), (_, m) = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            operations += 2 * n * k * m
    total = sum(microseconds.values())
    lines = [
        f"step {times}; {operations / 1e9:.0f} GFLOP of products at {operations / times.median / 1e9:.0f} GFLOP/s, "
        f"{operations / times.median / rate:.0%} of the {rate / 1e9:.0f} GFLOP/s of a large product",
        "",
        "| operator | share of the profiled time |",
        "|---|---|",
    ]
    ranked = sorted(microseconds.items(), key=lambda item: -item[1])[:SHOWN]
    return "\n".join([*lines, *(f"| {name} | {value / total:.1%} |" for name, value in ranked)])


if __name__ == "__main__":
    run_command(main)
