"""The scripts of ``launch/`` as jobs of submitit: on SLURM, or as processes of this machine.

On SLURM a job *is* its script. The batch script that submitit writes starts Python in its own place, which unpickles a
:class:`Script`, and that starts ``bash launch/train.slurm …`` in its place. So time limit, preemption and cancelling
reach the very script that one gives to sbatch, the job has that script's exit code, and one that is submitted again is
never taken for finished: there is no pickled result, only SLURM's word (:func:`states`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrl_dist.base.errors import UserError, require

if TYPE_CHECKING:  # the extra `slurm`: imported where it is needed
    import submitit

OPTION = re.compile(r"#SBATCH --([a-z][a-z-]*)(?:=(\S+))?")
COMMANDS = ("sbatch", "scancel", "squeue", "srun", "sacct")
MAX_AT_ONCE = 16
SILENCE_S = 600.0  # in which SLURM, busy or started anew, must answer again
ASK_AGAIN_S = 2.0
LOCAL_MINUTES = 10 * 365 * 24 * 60  # submitit's local executor wants a time limit
GPUS = "CUDA_VISIBLE_DEVICES"
LIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
)


@dataclass(frozen=True)
class Script:
    """One of launch/*.slurm with its words; picklable; what a job of a submitit executor calls."""

    path: str  # "launch/train.slurm"
    words: tuple[str, ...]
    local: tuple[str, ...]  # the command that does the same without SLURM
    environment: Mapping[str, str]  # on top

    def __call__(self) -> None:
        """On SLURM become the script: this does not return. Locally run the command.

        Raises:
            RuntimeError: the local command failed; its output is the job's log.
        """
        if os.environ["SUBMITIT_EXECUTOR"] == "slurm":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored stays so
            os.execvpe("bash", ["bash", self.path, *self.words], {**os.environ, **self.environment})
        inherited = {name: value for name, value in os.environ.items() if name != GPUS}  # the executor hides all GPUs
        # A session of its own: whatever ends the wait ends all that the command has started.
        process = subprocess.Popen(self.local, env={**inherited, **self.environment}, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        if status != 0:
            raise RuntimeError(f"exit code {status}: {shlex.join(self.local)}")


def submit(
    scripts: Sequence[Script],
    cluster: str,
    folder: Path,
    name: str,
    options: Mapping[str, str],
    after: Sequence[str] = (),
    max_at_once: int = MAX_AT_ONCE,
) -> list[submitit.Job[None]]:
    """One job, or an array of ``len(scripts)``; submit from the repository's root.

    Args:
        scripts: of one path, whose ``#SBATCH`` lines hold for all.
        cluster: slurm | local: processes of this machine, which all start at once and see its GPUs.
        folder: for logs and submitit's own files; all nodes must share it. A job's log is its ``paths.stdout``.
        name: of the job.
        options: of sbatch, by long name, over those of the script; "" for one that takes no value.
        after: ids of jobs that must complete first; if one fails, SLURM cancels this one.
        max_at_once: tasks of an array that run at the same time.

    Raises:
        UserError: submitit is missing, there is no SLURM here, or sbatch refuses.
    """
    executors = import_submitit()
    if cluster == "local":
        assert not after, "local jobs start at once"
        local = executors.LocalExecutor(folder)
        local.update_parameters(timeout_min=LOCAL_MINUTES, stderr_to_stdout=True)
        gpus = {GPUS: os.environ[GPUS]} if GPUS in os.environ else {}
        seeing = [replace(script, environment={**gpus, **script.environment}) for script in scripts]
        return [local.submit(script) for script in seeing]
    require_slurm()
    executor = executors.SlurmExecutor(folder, python=_python())
    executor.update_parameters(**_parameters(scripts[0].path, name, options, after, max_at_once))
    before = set(folder.iterdir()) if folder.exists() else set()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
            jobs: list[submitit.Job[None]] = executor.submit_array(scripts)
    except RuntimeError as error:
        for written in set(folder.iterdir()) - before:
            written.unlink()
        complaint = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise UserError(f"sbatch refuses {name}: {complaint}; mend its options") from None
    return jobs


def sbatch_text(
    scripts: Sequence[Script],
    folder: Path,
    name: str,
    options: Mapping[str, str],
    after: Sequence[str] = (),
    max_at_once: int = MAX_AT_ONCE,
) -> str:
    """The batch script that :func:`submit` gives to sbatch; needs no SLURM."""
    import_submitit()
    from submitit.slurm.slurm import _make_sbatch_string  # only an executor on a SLURM has it in public

    parameters: dict[str, Any] = _parameters(scripts[0].path, name, options, after, max_at_once)
    if len(scripts) > 1:
        parameters["map_count"] = len(scripts)
    folder = folder.absolute()
    command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def script_options(path: Path) -> dict[str, str]:
    """The ``#SBATCH --name=value`` lines of a script, by name; "" for one without a value.

    Raises:
        UserError: a line is written in another way that sbatch takes: these are written by hand, cluster by cluster.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            break  # as sbatch does
        if line.startswith("#SBATCH"):
            match = OPTION.fullmatch(line.rstrip())
            require(
                match is not None,
                f"{path}, line {number}: {line!r} is not understood; "
                "expected #SBATCH --name or #SBATCH --name=value, with a long name and no comment after it",
            )
            assert match is not None
            found[match[1]] = match[2] or ""
    return found


def states(job_ids: Sequence[str]) -> dict[str, str]:
    """SLURM's word on each job or task of an array: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, …

    The controller's word, which forgets a job some minutes after its end (``MinJobAge``), and after that the
    accounting's: UNKNOWN where that does not know yet, or there is none.

    Raises:
        UserError: squeue does not answer.
    """
    known = queue_states(job_ids)
    forgotten = [job_id for job_id in job_ids if job_id not in known]
    ended = _accounted_states(forgotten) if forgotten else {}
    return {job_id: known.get(job_id) or ended.get(job_id, "UNKNOWN") for job_id in job_ids}


def patient_states(job_ids: Sequence[str]) -> dict[str, str]:
    """:func:`states`; while squeue does not answer it is asked again, and that is said once.

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
            announce(f"{error}; asked again for {SILENCE_S / 60:.0f} minutes")
            time.sleep(ASK_AGAIN_S)


def queue_states(job_ids: Sequence[str]) -> dict[str, str]:
    """The controller's word on the jobs that it knows: all that have not ended, and those that have lately.

    Raises:
        UserError: squeue does not answer.
    """
    require_slurm()
    queue = _ask("squeue", "--states=all", "--noheader", "--array", "--format=%i %T", f"--jobs={_numbers(job_ids)}")
    found = dict(line.split() for line in queue.splitlines())
    return {job_id: found[job_id] for job_id in job_ids if job_id in found}


@functools.cache
def announce(line: str) -> None:
    """Say something once, however often it is found again."""
    print(line, file=sys.stderr, flush=True)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, with all tasks of their arrays; those that have ended stay as they are."""
    _ask("scancel", *dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def has_slurm() -> bool:
    """Whether jobs can be submitted, and asked for, from this machine."""
    return not _absent_commands()


def require_slurm() -> None:
    """Refuse where no jobs can be submitted."""
    absent = _absent_commands()
    require(not absent, f"no SLURM here: {', '.join(absent)} not found; submit from a login node, or run without SLURM")


def _absent_commands() -> list[str]:
    return [name for name in COMMANDS if shutil.which(name) is None]


def import_submitit() -> Any:
    """submitit, which comes with an extra."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install it with pip install -e '.[slurm]'") from None
    return submitit


def _accounted_states(job_ids: Sequence[str]) -> dict[str, str]:
    """The accounting's word on jobs that have ended; nothing, which is announced, on a cluster without one."""
    executors = import_submitit()
    try:
        table = _ask("sacct", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={_numbers(job_ids)}")
    except UserError as error:
        announce(f"{error}; what squeue no longer knows is UNKNOWN")
        return {}
    return {
        job_id: row["State"].split()[0]  # "CANCELLED by 0"
        for job_id, row in executors.SlurmJob.watcher.read_info(table).items()
        if row["State"].split()[0] not in LIVE
    }


def _numbers(job_ids: Sequence[str]) -> str:
    """For ``--jobs``: an array is asked for as a whole."""
    return ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def _python() -> str:
    """The command that takes the place of the batch script's shell, so that signals for the one reach the other."""
    return f"exec {shlex.quote(sys.executable)}"


def _parameters(
    path: str, name: str, options: Mapping[str, str], after: Sequence[str], max_at_once: int
) -> dict[str, Any]:
    """submitit's parameters for a script.

    What it would set by itself is unset: its time of five minutes, its accounting key, its signal before the end, and
    srun, which the script calls itself.
    """
    sbatch = {**script_options(Path(path)), **options}
    for own in ("job-name", "output", "array"):
        sbatch.pop(own, None)
    if after:
        sbatch |= {"dependency": ":".join(("afterok", *after)), "kill-on-invalid-dep": "yes"}
    return {
        "job_name": name,
        "time": None,
        "wckey": None,
        "signal_delay_s": 0,
        "use_srun": False,
        "stderr_to_stdout": True,
        "array_parallelism": max_at_once,
        "additional_parameters": {key: value or True for key, value in sbatch.items()},
    }


def _ask(*words: str) -> str:
    """Output of one of SLURM's commands; that a job is no longer known is no error."""
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    complaint = " ".join(result.stderr.split())
    if result.returncode != 0 and "Invalid job id" not in complaint:
        raise UserError(f"{words[0]} does not answer: {complaint}; try again, or ask who runs the cluster")
    return result.stdout
