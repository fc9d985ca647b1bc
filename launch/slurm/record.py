"""The record of submitted jobs: ``submitted.json``, beside their logs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.json_text import read_object
from launch.slurm.job_states import LIVE, cancel, queue_states

RECORD = "submitted.json"
JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class SubmittedStage:
    """A stage whose jobs have been submitted."""

    stage: str
    jobs: tuple[str, ...]  # "12", or the tasks of an array: "12_0", "12_1", …
    logs: tuple[str, ...]  # of each job

    @property
    def number(self) -> str:
        """Of the job, or of the array as a whole."""
        return self.jobs[0].split("_")[0]


def write_record(folder: Path, stages: Sequence[SubmittedStage]) -> None:
    """Record the stages that were submitted last."""
    text = json.dumps({"stages": [asdict(stage) for stage in stages]}, indent=2)
    write_atomically(folder / RECORD, f"{text}\n".encode())


def read_record(folder: Path) -> list[SubmittedStage]:
    """The stages that were submitted last.

    Raises:
        UserError: there is no record, or the file is not one.
    """
    path = folder / RECORD
    require(path.is_file(), f"no jobs were submitted: {path} does not exist")
    mend = "find its jobs with squeue, and remove the file"
    stages = read_object(path, "record", mend).get("stages")
    is_record = isinstance(stages, list) and len(stages) > 0 and all(map(_is_stage, stages))
    require(is_record, f"{path} is not a record of jobs; {mend}")
    assert isinstance(stages, list)
    return [SubmittedStage(stage["stage"], tuple(stage["jobs"]), tuple(stage["logs"])) for stage in stages]


def _is_stage(value: Any) -> bool:
    """Whether a plain value is a recorded stage: a wrong id would be that of somebody else's job."""
    if not (isinstance(value, dict) and isinstance(value.get("stage"), str)):
        return False
    jobs, logs = value.get("jobs"), value.get("logs")
    return (
        isinstance(jobs, list)
        and isinstance(logs, list)
        and 0 < len(jobs) == len(logs)
        and all(isinstance(job, str) and JOB_ID.fullmatch(job) for job in jobs)
        and all(isinstance(log, str) for log in logs)
    )


def all_jobs(stages: Sequence[SubmittedStage]) -> list[str]:
    """The ids of all jobs and tasks."""
    return [job for stage in stages for job in stage.jobs]


def require_ended(folder: Path, what: str) -> None:
    """Refuse to continue while recorded jobs wait or run."""
    if not (folder / RECORD).exists():
        return
    live = ", ".join(f"{job} {state}" for job, state in _live_jobs(read_record(folder)).items())
    require(not live, f"{what} is in progress: {live}; wait for it, or end it with --cancel")


def cancel_recorded(folder: Path) -> None:
    """Cancel those recorded jobs that wait or run.

    Raises:
        UserError: there is no record.
    """
    live = _live_jobs(read_record(folder))
    if live:
        cancel(list(live))
    print(f"cancelled: {', '.join(live) or 'nothing, all jobs have ended'}")


def _live_jobs(stages: Sequence[SubmittedStage]) -> dict[str, str]:
    """Jobs that wait or run, with their states."""
    return {job: state for job, state in queue_states(all_jobs(stages)).items() if state in LIVE}
