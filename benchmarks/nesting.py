"""The price of nesting: a whole training step with eight sizes against the same code with the largest size alone.

The paper promises every size at the cost of one. Same batch, same width, same features; forward, backward, AdamW. A
third side lets the smaller of the eight sizes learn half from the largest.
``--masked-linear`` also times the nested linear layers against masked dense products, forward and backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import describe_setting
from benchmarks.measuring.timing import forget_peak, in_child, interleave, peak_resident_bytes
from benchmarks.step import FEATURE_DIM, FEATURE_NORM, SIZES, draw, one_step, pack, read_histories, training_module
from fmrl_dist.base.errors import run_command
from fmrl_dist.losses.settings import LOSS_IMPLS
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.nested import nested_linear, nested_mask
from fmrl_dist.training.optimizer import build_optimizer

SIDES = {"one size": (SIZES[-1:], 0.0), "eight sizes": (SIZES, 0.0), "distilled": (SIZES, 0.5)}  # sizes, and α


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.nesting", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=Path, required=True, help="Beauty's sequences.parquet (column item_ids)")
    parser.add_argument("--histories", type=int, default=192, help="of a batch; 192 have more than 1,024 targets")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--impl", choices=LOSS_IMPLS, default="tiled")
    parser.add_argument("--masked-linear", action="store_true")
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("SIDE", "PRECISION"), help="only print this side's peak memory"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    histories, num_items = read_histories(arguments.sequences)
    if arguments.memory_of:
        side, precision = arguments.memory_of
        step = make_step(*SIDES[side], num_items, precision, arguments.impl)
        forget_peak()
        for number in range(2):
            step(draw(histories, number, arguments.histories))
        print(peak_resident_bytes())
        return

    for name, value in describe_setting().items():
        print(f"{name:<12} {value}")
    batches = [draw(histories, number, arguments.histories) for number in range(arguments.rounds)]
    targets = [len(pack(batch).targets) for batch in batches]
    print(f"{'work':<12} V = {num_items:,}, {arguments.rounds} batches of {min(targets)} … {max(targets)} targets")
    for precision in ("fp32", "bf16"):
        steps = {name: make_step(*side, num_items, precision, arguments.impl) for name, side in SIDES.items()}
        times = interleave({name: over(step, batches) for name, step in steps.items()}, arguments.rounds)
        del steps
        one, eight, distilled = times.values()
        print(f"{precision}, {arguments.impl}: one size {one}, eight sizes {eight}, ratio {eight.over(one)}")
        print(f"{precision}, {arguments.impl}: distilled {distilled}, ratio to eight sizes {distilled.over(eight)}")
        given = ["--sequences", str(arguments.sequences), "--histories", str(arguments.histories)]
        memory = [int(in_child("benchmarks.nesting", *given, "--memory-of", name, precision)) for name in SIDES]
        one_gib, eight_gib, distilled_gib = (num_bytes / 2**30 for num_bytes in memory)
        print(f"{precision}: peak memory {one_gib:.2f}, {eight_gib:.2f} GiB, ratio {eight_gib / one_gib:.2f}")
        print(f"{precision}: peak memory, distilled {distilled_gib:.2f} GiB")
    if arguments.masked_linear:
        compare_linear(round(sum(targets) / len(targets)), arguments.rounds)


def make_step(
    sizes: tuple[int, ...], alpha: float, num_items: int, precision: str, impl: str
) -> Callable[[list[list[int]]], float]:
    """A step of our own training module."""
    torch.manual_seed(0)
    features = FEATURE_NORM * F.normalize(torch.randn(2, num_items, FEATURE_DIM), dim=2)
    module = training_module(FMRLRec(sizes, 2, {"a": FEATURE_DIM, "b": FEATURE_DIM}), features, precision, impl)
    if alpha:
        module.settings = replace(module.settings, distillation=(alpha,) * (len(sizes) - 1) + (0.0,))
    optimizer = build_optimizer(module.model, 1e-3, (0.9, 0.999), 1e-8, 0.01)

    def step(histories: list[list[int]]) -> float:
        batch = pack(histories)
        return one_step(module(batch).mean() / len(batch.targets), optimizer)

    return step


def over(step: Callable[[list[list[int]]], float], batches: list[list[list[int]]]) -> Callable[[int], object]:
    return lambda number: step(batches[number])


def compare_linear(num_rows: int, rounds: int) -> None:
    """Block products against one masked dense product, forward and backward, for one D → D layer."""
    width = SIZES[-1]
    x, weight = torch.randn(num_rows, 1, width, requires_grad=True), torch.randn(1, 1, width, width, requires_grad=True)
    bias, mask = torch.zeros(1, width), nested_mask(SIZES)

    def masked_dense() -> Tensor:
        return F.linear(x[:, 0], weight[0, 0] * mask, bias[0])[:, None]

    for dtype in (torch.float32, torch.bfloat16):

        def blocks(dtype: torch.dtype = dtype) -> Tensor:
            return nested_linear(x, weight, bias, SIZES, dtype)

        def dense(dtype: torch.dtype = dtype) -> Tensor:
            if dtype == torch.float32:
                return masked_dense()
            masked = (weight[0, 0] * mask).to(dtype)
            return F.linear(x[:, 0].to(dtype), masked).float()[:, None] + bias

        torch.testing.assert_close(blocks(), dense(), rtol=2e-2, atol=2e-2 * 32)
        times = interleave(
            {"dense": lambda _, f=dense: f().sum().backward(), "blocks": lambda _, f=blocks: f().sum().backward()},  # type: ignore[misc]
            3 * rounds,
        )
        print(
            f"nested linear, {num_rows} rows, {dtype}: masked dense {times['dense']}, blocks {times['blocks']}, "
            f"ratio {times['blocks'].over(times['dense'])}"
        )


if __name__ == "__main__":
    run_command(main)
