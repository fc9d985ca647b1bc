"""A whole training step (forward, backward, AdamW): by precision and implementation, and eight sizes against one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.stage import StageRun
from benchmarks.gpu.work import (
    DTYPES,
    FEATURE_DIM,
    SIZES,
    TOY_FEATURE_DIM,
    TOY_SIZES,
    make_batch,
    make_columns,
    make_module,
    num_columns_of,
)
from benchmarks.step import one_step
from fmrl_dist.base.errors import run_command
from fmrl_dist.training.optimizer import build_optimizer

BUDGET_S = 3.0
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # of the first step's loss, between implementations


def main(argv: list[str]) -> None:
    run = StageRun.start("step", argv)
    num_items = 70 if run.is_dry_run else 100_000
    for precision in reversed(DTYPES):
        for num_positions in (19,) if run.is_dry_run else (1_600, 25_600):
            measure(run, num_positions, num_items, precision)
            run.free()
    run.finish()


def measure(run: StageRun, num_positions: int, num_items: int, precision: str) -> None:
    """One case: each implementation with all sizes, and the tiled one with the largest size alone."""
    sizes, feature_dim = (TOY_SIZES, TOY_FEATURE_DIM) if run.is_dry_run else (SIZES, FEATURE_DIM)
    columns = make_columns(num_items, num_columns_of(feature_dim), DTYPES[precision] or torch.float32, run.device)
    batch = make_batch(num_positions, num_items, run.device)
    case = f"{num_positions:,} positions, {num_items:,} items, {precision}"

    def side(impl: str, sizes: tuple[int, ...]) -> Callable[[], float]:
        module = make_module(columns, feature_dim, sizes, impl, precision)
        optimizer = build_optimizer(module.model, 1e-4, (0.9, 0.999), 1e-8, 0.01)
        return lambda: one_step(module(batch).mean() / len(batch.targets), optimizer)

    sides = {f"{impl}, {len(sizes)} sizes": side(impl, sizes) for impl in run.impls(precision)}
    losses = [work() for work in sides.values()]
    if max(losses) - min(losses) > LOSS_TOLERANCE[precision] * max(losses):
        run.refuse(f"step, {case}: {', '.join(sides)} give losses {losses}")
        return
    sides["tiled, 1 size"] = side("tiled", sizes[-1:])
    memory = {name: run.peak_gib(work) for name, work in sides.items()}
    times = run.time(sides, BUDGET_S)
    for name, timing in times.items():
        run.record(
            step=case,
            side=name,
            seconds=str(timing),
            positions_per_s=round(num_positions / timing.median),
            times_one_size=timing.over(times["tiled, 1 size"]),
            peak_gib=memory[name],
        )


if __name__ == "__main__":
    run_command(main)
