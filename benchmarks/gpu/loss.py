"""The full softmax's loss over a projected catalogue, forward and backward: ``tiled`` against ``triton``.

Time, and that of the first call, in which Triton compiles; peak memory beyond the inputs; and the rate of the products
that the plain formula asks for: projection, scores and their gradients, without recomputation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.stage import StageRun, worst_error
from benchmarks.gpu.work import DTYPES, FEATURE_DIM, SIZES, TOY_FEATURE_DIM, TOY_SIZES, make_columns, num_columns_of
from fmrl_dist.base.errors import run_command
from fmrl_dist.losses.nested_cross_entropy import catalogue_cross_entropy
from fmrl_dist.losses.settings import LossSettings

BUDGET_S = 2.0
LONGEST_S = 2.0  # of one run; a case that will take longer, by the run before, is left out
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # between the two
WORK = ((1_600, 10_000), (1_600, 100_000), (1_600, 1_000_000), (25_600, 100_000), (25_600, 1_000_000))  # N, V


def main(argv: list[str]) -> None:
    run = StageRun.start("loss", argv)
    sizes, feature_dim = (TOY_SIZES, TOY_FEATURE_DIM) if run.is_dry_run else (SIZES, FEATURE_DIM)
    seconds_of: dict[tuple[str, str], float] = {}  # of one position and item, by precision and implementation
    for num_positions, num_items in ((17, 70),) if run.is_dry_run else WORK:
        for precision in reversed(DTYPES):
            scores = num_positions * num_items
            impls = [
                impl for impl in run.impls(precision) if seconds_of.get((precision, impl), 0) * scores <= LONGEST_S
            ]
            medians = measure(run, num_positions, num_items, precision, sizes, feature_dim, impls)
            seconds_of |= {(precision, impl): median / scores for impl, median in medians.items()}
            run.free()
    run.finish()


def measure(
    run: StageRun,
    num_positions: int,
    num_items: int,
    precision: str,
    sizes: tuple[int, ...],
    feature_dim: int,
    impls: list[str],
) -> dict[str, float]:
    """One case: record a row for each implementation; returns the median seconds of each."""
    case = f"N {num_positions:,}, V {num_items:,}, {precision}"
    dtype, width = DTYPES[precision], sizes[-1]
    num_columns = num_columns_of(feature_dim)
    columns = make_columns(num_items, num_columns, dtype or torch.float32, run.device)
    generator = torch.Generator(run.device).manual_seed(2)
    z, own = (torch.randn(num_positions, width, generator=generator, device=run.device) for _ in range(2))
    projection = torch.randn(width, num_columns, generator=generator, device=run.device)
    trained = [z.requires_grad_(), projection.requires_grad_()]

    def side(impl: str) -> Callable[[], tuple[Tensor, ...]]:
        def forward_backward() -> tuple[Tensor, ...]:
            losses = catalogue_cross_entropy(
                z, own, columns, projection, None, LossSettings(sizes, impl=impl, dtype=dtype)
            )
            return losses.detach(), *torch.autograd.grad(losses.sum(), trained)

        return forward_backward

    sides = {impl: side(impl) for impl in impls}
    results: dict[str, tuple[Tensor, ...]] = {}
    first_s, memory = {}, {}
    for impl in impls:
        first_s[impl] = run.seconds(lambda impl=impl: results.update({impl: sides[impl]()}))  # type: ignore[misc]
        memory[impl] = run.peak_gib(sides[impl])
    if len(results) == 2 and (error := worst_error(*results.values())) > TOLERANCE[precision]:
        run.refuse(f"loss, {case}: {' and '.join(impls)} differ by {error:.1e}")
        return {}
    results.clear()
    operations = 2 * num_items * width * (2 * num_columns + 3 * num_positions)
    times = run.time(sides, BUDGET_S)
    for impl, timing in times.items():
        run.record(
            loss=case,
            impl=impl,
            seconds=str(timing),
            times_tiled=timing.over(times["tiled"]) if "tiled" in times else "",
            teraflops=operations / timing.median / 1e12,
            peak_gib=memory[impl],
            first_call_s=first_s[impl],
        )
    return {impl: timing.median for impl, timing in times.items()}


if __name__ == "__main__":
    run_command(main)
