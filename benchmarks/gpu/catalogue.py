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
from fmrl_dist.data.batches import Packed
from fmrl_dist.training.optimizer import build_optimizer

FEATURE_DIM = 768
PRECISION = "bf16"
BUDGET_S = 1.0
LONGEST_S = 3.0  # of a step; a case that will take longer, by the one before, is left out
NUM_POSITIONS = 4_096
CATALOGUES = (10_000, 100_000, 1_000_000, 10_000_000)


def main(argv: list[str]) -> None:
    run = StageRun.start("catalogue", argv)
    sizes, feature_dim = (TOY_SIZES, TOY_FEATURE_DIM) if run.is_dry_run else (SIZES, FEATURE_DIM)
    num_positions = 21 if run.is_dry_run else NUM_POSITIONS
    seconds_an_item: dict[tuple[str, str], float] = {}
    for num_items in (50, 100) if run.is_dry_run else CATALOGUES:
        columns = make_columns(num_items, num_columns_of(feature_dim), DTYPES[PRECISION] or torch.float32, run.device)
        full = make_batch(num_positions, num_items, run.device)
        for softmax, batch in (("full", full), ("sampled", with_negatives(full, num_items))):
            for impl in run.impls(PRECISION):
                expected_s = seconds_an_item.get((softmax, impl), 0) * num_items
                if softmax == "sampled" or expected_s <= LONGEST_S:
                    median = measure(run, columns, batch, impl, softmax, sizes, feature_dim)
                    seconds_an_item[softmax, impl] = median / num_items
        del columns
        run.free()
    run.finish()


def measure(
    run: StageRun,
    columns: torch.Tensor,
    batch: Packed,
    impl: str,
    softmax: str,
    sizes: tuple[int, ...],
    feature_dim: int,
) -> float:
    """Record a row; returns the median seconds of a step."""
    module = make_module(columns, feature_dim, sizes, impl, PRECISION)
    optimizer = build_optimizer(module.model, 1e-4, (0.9, 0.999), 1e-8, 0.01)

    def step() -> float:
        return one_step(module(batch).mean() / len(batch.targets), optimizer)

    step()
    memory = run.peak_gib(step)
    timing = run.time({"": step}, BUDGET_S)[""]
    run.record(
        softmax=softmax,
        impl=impl,
        items=len(columns),
        seconds=str(timing),
        ns_per_item=timing.median / len(columns) * 1e9,
        peak_gib=memory,
        columns_gib=columns.nbytes / 2**30,
    )
    return timing.median


if __name__ == "__main__":
    run_command(main)
