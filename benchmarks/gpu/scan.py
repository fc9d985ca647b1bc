"""The packed scan, forward and backward: doubling against the Triton kernel, by the length of the histories."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.stage import StageRun, worst_error
from fmrl_dist.base.errors import run_command
from fmrl_dist.model.scan import packed_scan

IMPLS = ("doubling", "triton")
BUDGET_S = 1.0
TOLERANCE = 1e-4
MODULI = (0.1, 0.99)  # |Λ|: the default ring's edge, and one that remembers
LENGTHS = (1, 9, 50, 200, 2000)


def main(argv: list[str]) -> None:
    run = StageRun.start("scan", argv)
    width, num_rows, lengths = (6, 24, (3,)) if run.is_dry_run else (1024, 25_600, LENGTHS)
    for length in lengths:
        for modulus in MODULI:
            measure(run, length, max(num_rows // length, 1), width, modulus)
    run.finish()


def measure(run: StageRun, length: int, num_histories: int, width: int, modulus: float) -> None:
    """One case: record a row."""
    generator = torch.Generator(run.device).manual_seed(0)
    phase = 6 * torch.rand(width, generator=generator, device=run.device)
    decay = (modulus * torch.stack((phase.cos(), phase.sin()))).requires_grad_()
    x = torch.randn(num_histories * length, 2, width, generator=generator, device=run.device).requires_grad_()
    starts = torch.arange(num_histories + 1, device=run.device) * length
    upstream = torch.randn(x.shape, generator=generator, device=run.device)

    def side(impl: str) -> Callable[[], tuple[Tensor, ...]]:
        def forward_backward() -> tuple[Tensor, ...]:
            states = packed_scan(decay, x, starts, impl)
            return states.detach(), *torch.autograd.grad(states, (decay, x), upstream)

        return forward_backward

    sides = {impl: side(impl) for impl in IMPLS}
    case = f"{num_histories:,} histories of {length:,}, width {width:,}, modulus {modulus:g}"
    if (error := worst_error(*(work() for work in sides.values()))) > TOLERANCE:
        run.refuse(f"scan, {case}: {' and '.join(IMPLS)} differ by {error:.1e}")
        return
    times = run.time(sides, BUDGET_S)
    # At least: x read, states written; their gradients read, x's written; both read once more for the decay's.
    num_bytes = 6 * x.nbytes
    run.record(
        scan=case,
        doubling=str(times["doubling"]),
        triton=str(times["triton"]),
        doubling_over_triton=times["doubling"].over(times["triton"]),
        triton_gb_per_s=num_bytes / times["triton"].median / 1e9,
    )


if __name__ == "__main__":
    run_command(main)
