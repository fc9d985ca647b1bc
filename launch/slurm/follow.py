"""Follow submitted jobs until they end, and report how they ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fmrl_dist.base.errors import require
from launch.slurm.job_states import LIVE, UNKNOWN, import_submitit, patient_states, require_slurm
from launch.slurm.record import SubmittedStage, all_jobs

TAIL_LINES = 20
MIN_POLL_S, MAX_POLL_S = 2.0, 30.0
ACCOUNTING_S = 120.0  # longest time until sacct knows the jobs that have left the queue, once the queue is empty


def summary(stage: SubmittedStage, now: Mapping[str, str]) -> str:
    """One line: the stage's job and its state; for an array, the number of tasks in each state."""
    counts = Counter(now[job] for job in stage.jobs)
    shown = ", ".join(state if len(stage.jobs) == 1 else f"{n} {state}" for state, n in sorted(counts.items()))
    return f"{stage.stage:<9} job {stage.number:<8} {shown}"


def follow(stages: Sequence[SubmittedStage]) -> None:
    """Print a line whenever a stage's state changes, until all jobs have ended.

    Raises:
        SystemExit: a stage failed; its name, its log's path and the log's end have been printed.
        UserError: SLURM does not know what became of a job, or has not answered for a while.
    """
    import_submitit()
    require_slurm()
    final = _wait_for_all(stages)
    for stage in stages:
        for job, log in zip(stage.jobs, stage.logs, strict=True):
            if final[job] != "COMPLETED":
                fail(stage.stage, f"job {job} is {final[job]}", Path(log))


def _wait_for_all(stages: Sequence[SubmittedStage]) -> dict[str, str]:
    """The final state of every job; prints each stage's state whenever it changes."""
    start = known_until = time.monotonic()
    printed: dict[str, str] = {}
    final: dict[str, str] = {}  # kept here because a cluster without accounting forgets them
    ended_before = False
    while True:
        now = patient_states(all_jobs(stages))
        now = {job: final.get(job, state) if state == UNKNOWN else state for job, state in now.items()}
        final |= {job: state for job, state in now.items() if state not in (*LIVE, UNKNOWN)}
        for stage in stages:
            line = summary(stage, now)
            if printed.get(stage.stage) != line and UNKNOWN not in line:
                printed[stage.stage] = line
                print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)
        any_live = any(state in LIVE for state in now.values())
        ended = not any_live and UNKNOWN not in now.values()
        if ended and ended_before:  # a job that is being requeued may look as if it had ended, for a moment
            return now
        ended_before = ended
        if any_live or ended:
            known_until = time.monotonic()
        unknown = ", ".join(job for job, state in now.items() if state == UNKNOWN)
        require(
            time.monotonic() - known_until < ACCOUNTING_S,
            f"neither squeue nor sacct knows the state of {unknown}; see their logs",
        )
        time.sleep(min(MIN_POLL_S + (time.monotonic() - start) / 60, MAX_POLL_S))


def fail(stage: str, what: str, log: Path) -> NoReturn:
    """Print which stage failed and how its log ends; end the command with exit code 1."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(no log: the job has not started)"]
    shown = lines[-TAIL_LINES:]
    if errors := [line for line in lines[:-TAIL_LINES] if line.startswith("error: ")]:
        shown = [errors[-1], "…", *shown]  # the cause; launchers write pages of traceback after it
    print(f"{stage} failed: {what}; its log is {log} and ends with", flush=True)
    print("\n".join(f"    {line}" for line in shown), flush=True)
    raise SystemExit(1)
