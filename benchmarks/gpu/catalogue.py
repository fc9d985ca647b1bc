"""What the catalogue's size costs a training step: the full and the sampled softmax, to 10 million items."""

from __future__ import annotations

import torch

from benchmarks.gpu.stage import StageRun
from benchmarks.gpu.work import (
    DTYPES,
    SIZES,
    TOY_FEATURE_DIM,
    TOY_SIZES,
    make_batch,
    make_columns,
    make_module,
    num_columns_of,
    with_negatives,
)
from benchmarks.step import one_step
from fmrl_dist.base.errors import run_command
from fmrl_dist.training.optimizer import build_optimizer

FEATURE_DIM = 768
PRECISION = "bf16"
BUDGET_S = 2.0
NUM_POSITIONS = 4_096


def main(argv: list[str]) -> None:
    run = StageRun.start("catalogue", argv)
    for num_items in (50, 100) if run.is_dry_run else (10_000, 100_000, 1_000_000, 10_000_000):
        measure(run, num_items)
        run.free()
    run.finish()


def measure(run: StageRun, num_items: int) -> None:
    """Both softmaxes over one catalogue: record a row each."""
    sizes, feature_dim = (TOY_SIZES, TOY_FEATURE_DIM) if run.is_dry_run else (SIZES, FEATURE_DIM)
    num_positions = 21 if run.is_dry_run else NUM_POSITIONS
    columns = make_columns(num_items, num_columns_of(feature_dim), DTYPES[PRECISION] or torch.float32, run.device)
    full = make_batch(num_positions, num_items, run.device)
    for softmax, batch in (("full", full), ("sampled", with_negatives(full, num_items))):
        module = make_module(columns, feature_dim, sizes, "tiled", PRECISION)
        optimizer = build_optimizer(module.model, 1e-4, (0.9, 0.999), 1e-8, 0.01)

        def step(module=module, batch=batch, optimizer=optimizer) -> float:  # type: ignore[no-untyped-def]
            return one_step(module(batch).mean() / len(batch.targets), optimizer)

        step()
        memory = run.peak_gib(step)
        timing = run.time({"": step}, BUDGET_S)[""]
        run.record(
            softmax=softmax,
            items=num_items,
            seconds=str(timing),
            ns_per_item=timing.median / num_items * 1e9,
            peak_gib=memory,
            columns_gib=columns.nbytes / 2**30,
        )


if __name__ == "__main__":
    run_command(main)
