"""One training step on the CPU and on the GPU: the loss of every size and every gradient.

The reference is float32 on the CPU. In float32 the GPU may differ by rounding. In bfloat16 it may err as much as the
CPU errs in bfloat16, times ``BF16_FACTOR``: the same products are rounded, but sums run in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.stage import StageRun, relative_error
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
    with_negatives,
)
from fmrl_dist.base.errors import run_command
from fmrl_dist.data.batches import Packed

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-4
CASES = (("full", "lru"), ("sampled", "lru"), ("sampled", "attention"), ("sampled", "filter"))  # softmax and mixer
BF16_FACTOR = 2.0


@dataclass(frozen=True)
class LossesAndGradients:
    """What one step gives, on the CPU."""

    losses: Tensor  # [S]
    gradients: dict[str, Tensor]


def main(argv: list[str]) -> None:
    run = StageRun.start("equality", argv)
    sizes, feature_dim = (TOY_SIZES, TOY_FEATURE_DIM) if run.is_dry_run else (SIZES, FEATURE_DIM)
    num_positions, num_items = (23, 61) if run.is_dry_run else (1501, 12_101)
    cpu = torch.device("cpu")
    columns = make_columns(num_items, num_columns_of(feature_dim), torch.float32, cpu)
    full = make_batch(num_positions, num_items, cpu)
    batches: dict[str, Packed] = {"full": full, "sampled": with_negatives(full, num_items)}
    for softmax, mixer in CASES:

        def result(
            device: torch.device, precision: str, impl: str, batch: Packed = batches[softmax], mixer: str = mixer
        ) -> LossesAndGradients:
            typed = columns.to(device, DTYPES[precision] or torch.float32)
            module = make_module(typed, feature_dim, sizes, impl, precision, mixer)
            losses = module(batch.to(device))
            losses.sum().backward()
            gradients = {n: p.grad.cpu() for n, p in module.model.named_parameters() if p.grad is not None}
            return LossesAndGradients(losses.detach().cpu(), gradients)

        reference = result(cpu, "fp32", "tiled")
        for precision in DTYPES:
            on_cpu = reference if precision == "fp32" else result(cpu, precision, "tiled")
            for impl in run.impls(precision):
                found = result(run.device, precision, impl)
                compare(run, f"{mixer}, {softmax} softmax, {precision}, {impl}", found, reference, on_cpu)
    run.finish()


def compare(
    run: StageRun, name: str, found: LossesAndGradients, reference: LossesAndGradients, on_cpu: LossesAndGradients
) -> None:
    """Record the largest errors, and refuse what exceeds its tolerance; ``on_cpu`` is of the same precision."""
    if set(found.gradients) != set(reference.gradients):
        run.refuse(f"{name}: other parameters have gradients: {set(found.gradients) ^ set(reference.gradients)}")
        return
    loss_error, loss_budget = (relative_error(part.losses, reference.losses) for part in (found, on_cpu))
    loss_tolerance = max(LOSS_TOLERANCE, BF16_FACTOR * loss_budget)
    rows = []
    for parameter, expected in reference.gradients.items():
        error, budget = (relative_error(part.gradients[parameter], expected) for part in (found, on_cpu))
        tolerance = max(GRADIENT_TOLERANCE, BF16_FACTOR * budget)
        rows.append((error / tolerance, parameter, error, tolerance))
    share, parameter, error, tolerance = max(rows)
    equal = loss_error <= loss_tolerance and share <= 1
    run.record(
        step=name,
        loss_error=loss_error,
        loss_tolerance=loss_tolerance,
        worst_gradient=parameter,
        gradient_error=error,
        gradient_tolerance=tolerance,
        equal=equal,
    )
    if not equal:
        run.refuse(f"{name}: GPU and CPU differ")


if __name__ == "__main__":
    run_command(main)
