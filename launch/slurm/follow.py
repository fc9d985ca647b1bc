"""The record of submitted jobs, ``submitted.json`` beside their logs, and what has become of them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from launch.slurm.jobs import LIVE, cancel, import_submitit, patient_states, queue_states, require_slurm

RECORD = "submitted.json"
TAIL_LINES = 20
MIN_POLL_S, MAX_POLL_S = 2.0, 30.0
ACCOUNTING_S = 120.0  # in which sacct must know of the jobs that have left the queue, when none is left in it


@dataclass(frozen=True)
class Submitted:
    """A stage whose jobs SLURM has."""

    stage: str
    jobs: tuple[str, ...]  # "12", or the tasks of an array: "12_0", "12_1", …
    logs: tuple[str, ...]  # of each job


def write_record(folder: Path, stages: Sequence[Submitted]) -> None:
    """Write the record, in one piece."""
    aside = folder / f".{RECORD}"
    aside.write_text(json.dumps({"stages": [asdict(stage) for stage in stages]}, indent=2) + "\n")
    os.replace(aside, folder / RECORD)


def read_record(folder: Path) -> list[Submitted]:
    """The stages that were submitted last.

    Raises:
        UserError: there is none, or the file is not a record.
    """
    path = folder / RECORD
    require(path.is_file(), f"no jobs were submitted: {path} does not exist")
    try:
        stages = json.loads(path.read_text())["stages"]
        return [Submitted(stage["stage"], tuple(stage["jobs"]), tuple(stage["logs"])) for stage in stages]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a record of jobs; look for its jobs with squeue, and remove it") from None


def all_jobs(stages: Sequence[Submitted]) -> list[str]:
    return [job for stage in stages for job in stage.jobs]


def require_ended(folder: Path, what: str) -> None:
    """Refuse to submit again what waits or runs."""
    if not (folder / RECORD).exists():
        return
    told = ", ".join(f"{job} {state}" for job, state in live_jobs(read_record(folder)).items())
    require(not told, f"{what} is under way: {told}; wait, or end it with --cancel")


def live_jobs(stages: Sequence[Submitted]) -> dict[str, str]:
    """Jobs that wait or run, with their states."""
    return {job: state for job, state in queue_states(all_jobs(stages)).items() if state in LIVE}


def cancel_recorded(folder: Path) -> None:
    """Cancel what waits or runs of the jobs that were submitted last.

    Raises:
        UserError: none were.
    """
    live = live_jobs(read_record(folder))
    if live:
        cancel(list(live))
    print(f"cancelled: {', '.join(live) or 'nothing, all jobs have ended'}")


def summary(stage: Submitted, now: Mapping[str, str]) -> str:
    """One line: the stage's job and its state; of an array, how many tasks are in which."""
    counts = Counter(now[job] for job in stage.jobs)
    told = ", ".join(state if len(stage.jobs) == 1 else f"{n} {state}" for state, n in sorted(counts.items()))
    return f"{stage.stage:<9} job {stage.jobs[0].split('_')[0]:<8} {told}"


def follow(stages: Sequence[Submitted]) -> None:
    """Print a line whenever a stage's state changes, until all jobs have ended.

    Raises:
        SystemExit: a stage has failed; its name, its log's path and the log's end are printed.
        UserError: SLURM does not say what has become of a job, or has not answered for a while.
    """
    import_submitit()
    require_slurm()
    start = time.monotonic()
    told: dict[str, str] = {}
    over: dict[str, str] = {}  # how jobs have ended, which a cluster without accounting forgets
    ended_before, known_until = False, start
    while True:
        now = patient_states(all_jobs(stages))
        now = {job: over.get(job, state) if state == "UNKNOWN" else state for job, state in now.items()}
        over |= {job: state for job, state in now.items() if state not in (*LIVE, "UNKNOWN")}
        for stage in stages:
            line = summary(stage, now)
            if told.get(stage.stage) != line and "UNKNOWN" not in line:
                told[stage.stage] = line
                print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)
        any_live = any(state in LIVE for state in now.values())
        ended = not any_live and "UNKNOWN" not in now.values()
        if ended and ended_before:  # one that is submitted again can look as if it had ended, for a moment
            break
        ended_before = ended
        if any_live or ended:
            known_until = time.monotonic()
        unknown = ", ".join(job for job, state in now.items() if state == "UNKNOWN")
        require(
            time.monotonic() - known_until < ACCOUNTING_S,
            f"neither squeue nor sacct knows what has become of {unknown}; see their logs",
        )
        time.sleep(min(MIN_POLL_S + (time.monotonic() - start) / 60, MAX_POLL_S))
    for stage in stages:
        for job, log in zip(stage.jobs, stage.logs, strict=True):
            if now[job] != "COMPLETED":
                fail(stage.stage, f"job {job} is {now[job]}", Path(log))


def fail(stage: str, what: str, log: Path) -> None:
    """Say which stage has failed, and how its log ends; ends the command."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(there is no log: it has not started)"]
    # What follows in a local job's log is submitit's traceback.
    lines = list(takewhile(lambda line: not line.startswith("submitit ERROR"), lines))
    shown = lines[-TAIL_LINES:]
    if errors := [line for line in lines[:-TAIL_LINES] if line.startswith("error: ")]:
        shown = [errors[-1], "…", *shown]  # the cause; a launcher writes pages after it
    print(f"{stage} failed: {what}; its log is {log} and ends with", flush=True)
    print("\n".join(f"    {line}" for line in shown), flush=True)
    raise SystemExit(1)
