"""A mixer, forward and backward, by the length of the histories: ours against plain PyTorch over a padded batch.

The work of :mod:`benchmarks.mixers`, whose sides are compared before they are timed.
"""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.stage import StageRun
from benchmarks.mixers import lengths_of, make_steps
from fmrl_dist.base.errors import UserError, run_command

MIXERS = ("lru", "attention", "filter", "bsarec")
LENGTHS = ("mixed", "50", "200", "1000", "5000")
NUM_ROWS = 25_600
BUDGET_S = 1.0


def main(argv: list[str]) -> None:
    run = StageRun.start("mixers", argv)
    num_rows, lengths = (60, ("mixed", "50")) if run.is_dry_run else (NUM_ROWS, LENGTHS)
    for mixer in MIXERS:
        for length in lengths:
            measure(run, mixer, length, num_rows)
            run.free()
    run.finish()


def measure(run: StageRun, mixer: str, length: str, num_rows: int) -> None:
    """One case: record a row."""
    try:
        steps = make_steps(mixer, lengths_of(length, num_rows), device=run.device)
    except UserError as error:
        run.refuse(str(error))
        return
    sides = {name: partial(step, 0) for name, step in steps.items()}
    for side in sides.values():
        side()  # compiles
    memory = {name: run.peak_gib(side) for name, side in sides.items()}
    times = run.time(sides, BUDGET_S)
    run.record(
        mixer=mixer,
        events=length,
        ours=str(times["ours"]),
        plain=str(times["plain"]),
        plain_over_ours=times["plain"].over(times["ours"]),
        ours_gib=memory["ours"],
        plain_gib=memory["plain"],
    )


if __name__ == "__main__":
    run_command(main)
