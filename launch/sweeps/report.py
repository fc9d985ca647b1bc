"""The state of a sweep: a table of its trials, and the config of the best."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fmrl_dist.base.files import write_atomically
from launch.sweeps.folder import BEST, JOBS, run_of, training_arguments
from launch.sweeps.space import SearchSpace, as_argument, metric_of
from launch.sweeps.study import SweepStudy, Trial, best_of

ACCELERATE = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


def status_text(folder: Path, space: SearchSpace, trials: Sequence[Trial]) -> str:
    """A table of the trials, and the best one with the command that trains it."""
    metric, counts = metric_of(space.config()), Counter(trial.state for trial in trials)
    by_state = ", ".join(f"{counts[state]} {state}" for state in ("complete", "running", "failed") if counts[state])
    lines = [f"{folder}: {len(trials)} of {space.trials} trials have started{f': {by_state}' if by_state else ''}"]
    if trials:
        head = ["trial", "state", metric, *space.parameters]
        rows = [
            [str(trial.number), trial.state, "" if trial.value is None else f"{trial.value:.6f}"]
            + [_shortened(argument) for argument in trial.parameters.values()]
            for trial in trials
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        failures = ["", *(f"  {trial.why}" if trial.why else "" for trial in trials)]
        lines += [f"{'  '.join(row)}{why}" for row, why in zip(table, failures, strict=True)]
    best = best_of(trials)
    if best is not None:
        arguments = training_arguments(folder, best.parameters, folder / "best")
        lines += [f"best: trial {best.number}, validation {metric} {best.value:.6f}, in {run_of(folder, best)}"]
        lines += [f"  {ACCELERATE} -m fmrl_dist.train {shlex.join(arguments)}"]
        if trials[0].value is not None and trials[0].parameters == base_arguments(space):
            lines += [f"the base's own values: trial 0, validation {metric} {trials[0].value:.6f}"]
    return "\n".join(lines)


def base_arguments(space: SearchSpace) -> dict[str, str] | None:
    """The base's own values as a trial's arguments; None if the space lacks one."""
    values = space.base_values()
    if values is None:
        return None
    return {key: value if isinstance(value, str) else as_argument(value) for key, value in values.items()}


def is_over(study: SweepStudy, space: SearchSpace) -> bool:
    """Whether every requested trial has ended."""
    trials = study.trials()
    return len(trials) >= space.trials and all(trial.state != "running" for trial in trials)


def finish(folder: Path, space: SearchSpace, study: SweepStudy) -> None:
    """Print what came of the trials, and write the config of the best.

    Raises:
        SystemExit: trials are left, or all have failed.
    """
    trials = study.trials()
    print(status_text(folder, space, trials))
    best = best_of(trials)
    left = max(space.trials - len(trials), 0) + sum(trial.state == "running" for trial in trials)
    if best is not None and not left:
        config = space.config({**best.parameters, "run.dir": str(folder / "best")})
        write_atomically(folder / BEST, config.to_yaml().encode())
        print(f"wrote {folder / BEST}")
        return
    why = f"{left} trials are left; see the workers' logs in {folder / JOBS}, and run the command again"
    print(f"error: {why if left else 'all trials failed'}", file=sys.stderr)
    raise SystemExit(1)


def _shortened(argument: str) -> str:
    """An argument as the table shows it: floats with four digits."""
    try:
        return argument if argument.lstrip("-").isdecimal() else f"{float(argument):.4g}"
    except ValueError:
        return argument
