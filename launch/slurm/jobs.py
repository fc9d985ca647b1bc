"""The scripts of ``launch/`` as SLURM jobs, submitted through submitit.

A job *is* its script. The batch script that submitit writes is replaced by Python, which unpickles a
:class:`BatchScript`, and Python is replaced by ``bash launch/train.slurm …``. So time limit, preemption and
cancellation reach the same script that one gives to sbatch by hand, the job has that script's exit code, and a requeued
job is never mistaken for a finished one: there is no pickled result, only SLURM's answer (launch/slurm/job_states.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.data_section import check_path
from launch.slurm.job_states import import_submitit, require_slurm
from launch.slurm.record import SubmittedStage

SUBMITITS = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh", re.ASCII)
SBATCH_LINE = re.compile(r"#SBATCH --([a-z][a-z-]*)(?:=(\S+))?")


@dataclass(frozen=True)
class BatchScript:
    """One of launch/*.slurm with its arguments. Picklable; the job calls it."""

    path: str  # "launch/train.slurm"
    arguments: tuple[str, ...]
    environment: Mapping[str, str]  # on top of what sbatch passes on

    def __call__(self) -> None:
        """Replace this process by the script; does not return."""
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and children would inherit that
        os.execvpe("bash", ["bash", self.path, *self.arguments], {**os.environ, **self.environment})


def batch_script(path: str, *arguments: str) -> BatchScript:
    """A script with the variables that launch/environment.sh reads.

    ``FMRL_CHAIN``: the command that submits an evaluation in parts also submits the job that joins them.
    """
    ours = {name: value for name, value in os.environ.items() if name.startswith("FMRL_")}
    here = {"FMRL_ROOT": "", "FMRL_CHAIN": "1"}  # the job runs in the folder that it is submitted from
    return BatchScript(path, arguments, {"FMRL_VENV": sys.prefix, **ours, **here})


@dataclass(frozen=True)
class BatchJob:
    """One job, or an array with a task for each of several scripts; submitted from the repository's root."""

    stage: str  # its name in the record
    name: str
    scripts: tuple[BatchScript, ...]  # all with one path, whose #SBATCH lines apply to the job
    folder: Path  # for logs and submitit's own files; all nodes must share it
    options: Mapping[str, str]  # of sbatch, by long name, overriding the script's; "" for one that takes no value
    max_at_once: int = 16  # tasks of an array that run at the same time


def submit(job: BatchJob, after: str = "") -> SubmittedStage:
    """Submit a job, to start once the job with the id ``after`` has completed; if that fails, SLURM cancels this one.

    Raises:
        UserError: submitit is missing, there is no SLURM here, or sbatch rejects the job.
    """
    submitit = import_submitit()
    require_slurm()
    executor = submitit.SlurmExecutor(job.folder, python=_python())
    executor.update_parameters(**_parameters(job, after))
    before = set(job.folder.iterdir()) if job.folder.exists() else set()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
            tasks = executor.submit_array(job.scripts)
    except RuntimeError as error:
        for written in set(job.folder.iterdir()) - before:
            if SUBMITITS.fullmatch(written.name):
                written.unlink()
        complaint = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise UserError(f"sbatch rejects {job.name}: {complaint}; change its options") from None
    return SubmittedStage(
        stage=job.stage,
        jobs=tuple(task.job_id for task in tasks),
        logs=tuple(str(task.paths.stdout) for task in tasks),
    )


def sbatch_text(job: BatchJob, after: str = "") -> str:
    """The batch script that :func:`submit` gives to sbatch; needs no SLURM."""
    import_submitit()
    from submitit.slurm.slurm import _make_sbatch_string  # public only in an executor, which needs a SLURM

    parameters = _parameters(job, after)
    if len(job.scripts) > 1:
        parameters["map_count"] = len(job.scripts)
    folder = job.folder.absolute()
    command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def script_options(path: Path) -> dict[str, str]:
    """The ``#SBATCH --name=value`` lines of a script, by name; "" for one without a value.

    Raises:
        UserError: a line has another form that sbatch accepts: clusters' administrators and users edit these by hand.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            break  # as sbatch does
        if line.startswith("#SBATCH"):
            match = SBATCH_LINE.fullmatch(line.rstrip())
            if match is None:
                raise UserError(
                    f"{path}, line {number}: cannot read {line!r}; "
                    "expected #SBATCH --name or #SBATCH --name=value, with a long name and no comment after it"
                )
            found[match[1]] = match[2] or ""
    return found


def _python() -> str:
    """The command that replaces the batch script's shell, so that signals to the shell reach it."""
    return f"exec {shlex.quote(sys.executable)}"


def _parameters(job: BatchJob, after: str) -> dict[str, Any]:
    """submitit's parameters for a job.

    They unset what submitit sets by default: a time limit of five minutes, an accounting key, a signal before the end,
    and srun, which the script calls itself.
    """
    check_path("the folder of the jobs' logs", str(job.folder.absolute()))  # a part of the batch script
    sbatch = {**script_options(Path(job.scripts[0].path)), **job.options}
    for set_by_submitit in ("job-name", "output", "array"):
        sbatch.pop(set_by_submitit, None)
    if after:
        sbatch |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return {
        "job_name": job.name,
        "time": None,
        "wckey": None,
        "signal_delay_s": 0,
        "use_srun": False,
        "stderr_to_stdout": True,
        "array_parallelism": job.max_at_once,
        "additional_parameters": {key: value or True for key, value in sbatch.items()},
    }
