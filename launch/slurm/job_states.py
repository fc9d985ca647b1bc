"""SLURM's answers about jobs: whether there is a SLURM here, which states its jobs are in; and how to cancel them."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from fmrl_dist.base.errors import UserError, require

COMMANDS = ("sbatch", "scancel", "squeue", "srun", "sacct")
SILENCE_S = 600.0  # longest time in which SLURM, busy or restarting, does not answer
ASK_AGAIN_S = 2.0
UNKNOWN = "UNKNOWN"
LIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
)


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """The state of each job or array task: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, …

    The controller is asked first. It forgets a job some minutes after its end (``MinJobAge``); then the accounting
    is asked. A job is UNKNOWN where the accounting does not know it yet, or where there is no accounting.

    Raises:
        UserError: squeue does not answer.
    """
    known = queue_states(job_ids)
    forgotten = [job_id for job_id in job_ids if job_id not in known]
    ended = _accounted_states(forgotten) if forgotten else {}
    return {job_id: known.get(job_id) or ended.get(job_id, UNKNOWN) for job_id in job_ids}


def patient_states(job_ids: Sequence[str]) -> dict[str, str]:
    """:func:`states`; while squeue does not answer, it is asked again, and one line says so.

    Raises:
        UserError: it has not answered for ten minutes.
    """
    asked = time.monotonic()
    while True:
        try:
            return states(job_ids)
        except UserError as error:
            if time.monotonic() - asked > SILENCE_S:
                raise
            warn_once(f"{error}; retrying for {SILENCE_S / 60:.0f} minutes")
            time.sleep(ASK_AGAIN_S)


def queue_states(job_ids: Sequence[str]) -> dict[str, str]:
    """The states of those jobs that the controller knows: all that have not ended, and those that ended recently.

    Raises:
        UserError: squeue does not answer.
    """
    require_slurm()
    queue = _ask("squeue", "--states=all", "--noheader", "--array", "--format=%i %T", f"--jobs={_numbers(job_ids)}")
    found = dict(line.split() for line in queue.splitlines())
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}


@functools.cache
def warn_once(line: str) -> None:
    """Print a line to stderr, but only the first time."""
    print(line, file=sys.stderr, flush=True)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, with all tasks of their arrays; those that have ended are left alone."""
    _ask("scancel", *dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def has_slurm() -> bool:
    """Whether this machine can submit jobs and ask about them."""
    return not _missing_commands()


def require_slurm() -> None:
    """Refuse to continue where no jobs can be submitted."""
    missing = _missing_commands()
    require(
        not missing, f"no SLURM here: {', '.join(missing)} not found; submit from a login node, or run without SLURM"
    )


def _missing_commands() -> list[str]:
    return [name for name in COMMANDS if shutil.which(name) is None]


def import_submitit() -> Any:
    """submitit, which is in an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install it with pip install -e '.[slurm]'") from None
    return submitit


def _accounted_states(job_ids: Sequence[str]) -> dict[str, str]:
    """The accounting's states of jobs that have ended; on a cluster without accounting none, and a line says so."""
    submitit = import_submitit()
    try:
        table = _ask("sacct", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={_numbers(job_ids)}")
    except UserError as error:
        warn_once(f"{error}; jobs that squeue no longer knows are {UNKNOWN}")
        return {}
    return {
        job_id: row["State"].split()[0]  # "CANCELLED by 0"
        for job_id, row in submitit.SlurmJob.watcher.read_info(table).items()
        if row["State"].split()[0] not in LIVE
    }


def _numbers(job_ids: Sequence[str]) -> str:
    """The value of ``--jobs``: arrays are asked about as a whole."""
    return ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def _ask(*command: str) -> str:
    """The output of one of SLURM's commands. That a job is no longer known is not an error."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    complaint = " ".join(result.stderr.split())
    if result.returncode != 0 and "Invalid job id" not in complaint:
        raise UserError(f"{command[0]} does not answer: {complaint}; try again, or ask the cluster's administrators")
    return result.stdout
