"""``python -m launch.sweep SPACE.yaml --workers N``: search a space (launch/sweeps/space.py) for the best config.

N workers (launch/sweeps/worker.py), an array of SLURM jobs or processes of this machine, share a study and train its
trials, each as a run of its own. The same command resumes a sweep that was interrupted, or that has more trials now.
Every run evaluates on test when it ends, but the sweep does not read that: trials are compared by validation alone.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.locks import only_writer
from fmrl_dist.base.urls import is_url
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import refuse_credentials_in_words
from fmrl_dist.config.data_section import check_path
from launch.local.processes import LocalJob, end_jobs
from launch.local.signals import ENDING, EndedBySignal, ending_signals_raise, listening
from launch.slurm.follow import summary
from launch.slurm.job_states import (
    LIVE,
    UNKNOWN,
    cancel,
    has_slurm,
    import_submitit,
    patient_states,
    require_slurm,
    states,
)
from launch.slurm.jobs import BatchJob, batch_script, sbatch_text, submit
from launch.slurm.options import add_sbatch_option, parse_sbatch
from launch.slurm.record import RECORD, cancel_recorded, read_record, require_ended, write_record
from launch.sweeps.folder import (
    JOBS,
    SPACE,
    has_started,
    open_folder,
    prepare_folder,
    record_store,
    refused_when_gone,
    worker_lock,
)
from launch.sweeps.report import finish, is_over, status_text
from launch.sweeps.space import SearchSpace, metric_of, overrides, read_space
from launch.sweeps.study import SweepStudy, import_optuna

SCRIPT = "launch/sweep.slurm"
STAGE = "workers"  # for --sbatch and in the record of jobs
RESERVED = ("nodes", "ntasks-per-node")
POLL_S = 0.5
SLURM_POLL_S = 10.0
FORGOTTEN_S = 300.0


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for.

    Args:
        space: what to search.
        folder: of the sweep; all nodes share it.
        workers: that train trials at the same time.
        options: of sbatch, for each worker's job.
    """

    space: SearchSpace
    folder: Path
    workers: int
    options: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of the jobs."""
        return f"{self.space.study}-sweep"

    @property
    def job(self) -> BatchJob:
        """The array of workers on SLURM."""
        return BatchJob(
            stage=STAGE,
            name=self.name,
            scripts=tuple(batch_script(SCRIPT, str(self.folder), str(index)) for index in range(self.workers)),
            folder=self.folder / JOBS,
            options=self.options,
            max_at_once=self.workers,
        )

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """What each worker runs on this machine."""
        worker = (sys.executable, "-m", "launch.sweeps.worker", str(self.folder))
        return [(*worker, str(index)) for index in range(self.workers)]


def main(argv: list[str]) -> None:
    refuse_credentials_in_words(argv)
    arguments = sweep_parser().parse_args(argv)
    local = arguments.cluster == "local"
    require(arguments.workers >= 1, f"--workers is {arguments.workers}; expected at least 1")
    options = parse_sbatch(arguments.sbatch, (STAGE,), RESERVED)[STAGE]
    require(not (options and local), "--sbatch needs SLURM; leave it out, or --cluster local")
    require(
        not (arguments.cancel and local),
        "--cancel needs SLURM; workers of this machine end with the command that started them",
    )
    require(Path(SCRIPT).is_file(), f"{Path.cwd()} is not the repository's root; start a sweep from there")
    space = read_space(arguments.space)
    folder = arguments.folder or Path("runs") / f"{space.study}-sweep"
    check_path("--folder", str(folder))
    sweep = Sweep(space, folder, arguments.workers, options)
    if arguments.status:
        print_status(folder)
    elif arguments.cancel:
        cancel_recorded(folder / JOBS)
    elif arguments.dry_run:
        print(dry_run_text(sweep, local))
    else:
        run_sweep(sweep, local, arguments.wait)


def sweep_parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m launch.sweep", description="Search a space for the config that validates best.")
    parser.add_argument(
        "space", type=Path, help="YAML file, such as configs/sweeps/demo.yaml; launch/sweeps/space.py explains it"
    )
    parser.add_argument("--workers", type=int, default=1, help="that train trials at the same time (default: 1)")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="default: slurm")
    parser.add_argument("--folder", type=Path, help="default: runs/<study>-sweep; all nodes share it")
    add_sbatch_option(parser, (STAGE,))
    parser.add_argument("--wait", action="store_true", help="until the end, then show the best (local always does)")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    actions.add_argument("--status", action="store_true", help="print the trials so far and SLURM's jobs, and end")
    actions.add_argument("--cancel", action="store_true", help="end SLURM's jobs, which save what they train")
    return parser


def dry_run_text(sweep: Sweep, local: bool) -> str:
    """What a sweep would do: its space, the batch script of its array, and each worker's command."""
    space = sweep.space
    lines = [f"{sweep.folder}: {space.trials} trials over {space.base}, by validation {metric_of(space.config())}"]
    lines += [f"  --{key} {argument}" for key, argument in space.fixed.items()]
    for key, value in space.raw["parameters"].items():
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()
        lines.append(f"  --{key} {text}")
    if local:
        return "\n".join([*lines, *map(shlex.join, sweep.commands)])
    lines += [f"### {shlex.join(('bash', script.path, *script.arguments))}" for script in sweep.job.scripts]
    return "\n".join([*lines, sbatch_text(sweep.job)])


def run_sweep(sweep: Sweep, local: bool, wait: bool) -> None:
    """Start or resume a sweep. On this machine, or with ``wait``, return at its end; otherwise once it is submitted.

    Raises:
        UserError: its workers are running, its space or store has changed, the store is missing, or there is no SLURM.
        SystemExit: trials are left at the end, or all have failed; or a signal arrived.
    """
    import_optuna()
    if not local:
        import_submitit()
        require_slurm()
    require_free(sweep)
    require_store(sweep.space)
    sweep = replace(sweep, space=prepare_folder(sweep.folder, sweep.space))
    with refused_when_gone(sweep.folder):
        study = SweepStudy(sweep.folder, sweep.space)
        if not is_over(study, sweep.space):
            with only_writer(sweep.folder / JOBS):
                if has_slurm():
                    require_ended(sweep.folder / JOBS, f"the sweep in {sweep.folder}")
                record_store(sweep.folder, sweep.space.config().store)
                jobs = [] if local else submit_workers(sweep)
            if local:
                run_workers_here(sweep)
            else:
                if not wait:
                    return
                wait_for_slurm(jobs, study, sweep.space)
        finish(sweep.folder, sweep.space, study)


def require_free(sweep: Sweep) -> None:
    """Refuse if one of the workers is running, or if a trial belongs to a worker that would not be started."""
    if not has_started(sweep.folder):
        return
    for worker in range(sweep.workers):
        with worker_lock(sweep.folder, worker, patience_s=0):
            pass
    _, study = open_folder(sweep.folder)
    others = [trial for trial in study.trials() if trial.state == "running" and trial.worker >= sweep.workers]
    if others:
        raise UserError(
            f"trial {others[0].number} belongs to worker {others[0].worker}, which has started it; "
            f"use at least --workers {max(trial.worker for trial in others) + 1}"
        )


def require_store(space: SearchSpace) -> None:
    """Build the demo's store if it is missing, or all workers would build it; refuse if another store is missing."""
    config = space.config()
    path = config.store.path
    if is_url(path) or (Path(path) / "manifest.json").exists():
        return
    build = ["-m", "shards.build", "--config", str(space.base), *overrides(space.fixed)]
    if config.data.demo is None:
        raise UserError(f"store {path} does not exist; build it with {shlex.join(['python', *build])}")
    print(f"building the demo store {path} …", flush=True)
    status = subprocess.run([sys.executable, *build], check=False).returncode
    require(status == 0, "the demo store could not be built; see the lines above")


def submit_workers(sweep: Sweep) -> Sequence[str]:
    """Submit the array of workers and record it; returns the ids of its tasks."""
    workers = submit(sweep.job)
    try:
        write_record(sweep.folder / JOBS, [workers])
    except BaseException:
        cancel(workers.jobs)  # nobody would know of them
        raise
    print(f"{sweep.name}: job(s) {', '.join(workers.jobs)}, logs in {sweep.folder / JOBS}")
    status = f"python -m launch.sweep {sweep.folder / SPACE} --folder {sweep.folder} --status"
    print(f"see its progress: {status}", flush=True)
    return workers.jobs


def run_workers_here(sweep: Sweep) -> None:
    """Run workers on this machine until all have ended; INT and TERM end them, and they save what they train.

    Raises:
        SystemExit: such a signal arrived.
    """
    with listening(ENDING) as signals:
        jobs: list[LocalJob] = []
        try:
            for index, command in enumerate(sweep.commands):
                jobs.append(LocalJob(command, sweep.folder / JOBS / f"{sweep.name}_{index}_log.out"))
        except BaseException:  # such as a full disk
            end_jobs(jobs)
            raise
        while signals.received is None and any(job.status is None for job in jobs):
            time.sleep(POLL_S)
        if signals.received is not None:
            with ending_signals_raise():  # a second signal ends the grace period
                end_jobs(jobs)
            print("stopped; run the same command to resume", flush=True)
            raise EndedBySignal(signals.received)


def wait_for_slurm(job_ids: Sequence[str], study: SweepStudy, space: SearchSpace) -> None:
    """Wait until the sweep is over, or all its jobs have ended. They do not depend on this process.

    Jobs that SLURM has not known for some minutes have ended too: without accounting, it forgets them.
    """
    known_until = time.monotonic()
    try:
        with ending_signals_raise():
            while not is_over(study, space):
                now = patient_states(job_ids).values()
                if any(state in LIVE for state in now):
                    known_until = time.monotonic()
                elif UNKNOWN not in now or time.monotonic() - known_until > FORGOTTEN_S:
                    return
                time.sleep(SLURM_POLL_S)
    except EndedBySignal:
        print("\nno longer waiting; the jobs continue: see --status and --cancel")
        raise


def print_status(folder: Path) -> None:
    """The trials so far; where there is a SLURM, also how many workers are in which state."""
    space, study = open_folder(folder)
    print(status_text(folder, space, study.trials()))
    if (folder / JOBS / RECORD).exists() and has_slurm():
        workers, *others = read_record(folder / JOBS)
        require(not others, f"{folder / JOBS / RECORD} is not a record of a sweep's jobs; find them with squeue")
        print(summary(workers, states(workers.jobs)))


if __name__ == "__main__":
    run_command(main)
