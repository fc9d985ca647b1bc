"""``python -m launch.sweep SPACE.yaml --workers N``: search a space (launch/sweeps/space.py) for what validates best.

N workers (launch/sweeps/worker.py), an array of SLURM jobs or processes of this machine, share a study and train its
trials, each as a run of its own. The same command goes on with a sweep that was interrupted, or has got more trials.
A run evaluates on test when it ends, as any run does; nothing here reads that: trials are compared by validation alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import write_atomically
from fmrl_dist.config.command_line import CommandParser
from launch.slurm.follow import (
    RECORD,
    Submitted,
    cancel_recorded,
    read_record,
    require_ended,
    summary,
    write_record,
)
from launch.slurm.jobs import (
    LIVE,
    Script,
    has_slurm,
    import_submitit,
    patient_states,
    require_slurm,
    sbatch_text,
    states,
    submit,
)
from launch.sweeps.folder import (
    BEST,
    JOBS,
    SPACE,
    has_begun,
    open_folder,
    prepare_folder,
    run_of,
    training_words,
    worker_lock,
)
from launch.sweeps.space import Space, metric_of, overrides, read_space
from launch.sweeps.study import Study, Trial, best_of, import_optuna

SCRIPT = "launch/sweep.slurm"
ACCELERATE = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
SBATCH_NAME = re.compile(r"[a-z][a-z0-9-]*")
OURS = ("array", "chdir", "dependency", "error", "job-name", "nodes", "ntasks-per-node", "output", "parsable", "wrap")
POLL_S = 0.5
SLURM_POLL_S = 10.0
FORGOTTEN_S = 300.0


def worker_scripts(folder: Path, workers: int) -> list[Script]:
    """What each worker runs."""
    module = (sys.executable, "-m", "launch.sweeps.worker", str(folder))
    environment = {"FMRL_VENV": sys.prefix, **{k: v for k, v in os.environ.items() if k.startswith("FMRL_")}}
    return [Script(SCRIPT, (str(folder), str(i)), (*module, str(i)), environment) for i in range(workers)]


def dry_run_text(space: Space, folder: Path, workers: int, cluster: str, options: Mapping[str, str]) -> str:
    """What a sweep would do: its space, the batch script of its array, and each worker's command."""
    lines = [f"{folder}: {space.trials} trials over {space.base}, by validation {metric_of(space.config())}"]
    lines += [f"  --{key} {word}" for key, word in space.fixed.items()]
    for key, value in space.raw["parameters"].items():
        lines.append(
            f"  --{key} {yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()}"
        )
    scripts = worker_scripts(folder, workers)
    if cluster == "local":
        return "\n".join([*lines, *(shlex.join(script.local) for script in scripts)])
    lines += [f"### {shlex.join(('bash', script.path, *script.words))}" for script in scripts]
    return "\n".join([*lines, sbatch_text(scripts, folder / JOBS, job_name(space), options, max_at_once=workers)])


def sweep(space: Space, folder: Path, workers: int, cluster: str, options: Mapping[str, str], wait: bool) -> None:
    """Start the workers of a sweep, or go on with it; see it to its end here, and on SLURM if asked to ``wait``."""
    import_optuna()
    import_submitit()
    if cluster == "slurm":
        require_slurm()
    require_free(folder, workers)
    require_store(space)
    space = prepare_folder(folder, space)
    study = Study(folder, space)
    if is_over(study, space):
        finish(folder, space, study)
        return
    if has_slurm():
        require_ended(folder / JOBS, f"the sweep in {folder}")
    scripts, name = worker_scripts(folder, workers), job_name(space)
    if cluster == "local":
        sweep_here(scripts, folder, name)
    else:
        jobs = submit(scripts, cluster, folder / JOBS, name, options, max_at_once=workers)
        ids, logs = tuple(job.job_id for job in jobs), tuple(str(job.paths.stdout) for job in jobs)
        write_record(folder / JOBS, [Submitted("workers", ids, logs)])
        print(f"{name}: job(s) {', '.join(ids)}, logs in {folder / JOBS}")
        print(f"see how it goes: python -m launch.sweep {folder / SPACE} --folder {folder} --status", flush=True)
        if not wait:
            return
        wait_for_slurm(ids, study, space)
    finish(folder, space, study)


def job_name(space: Space) -> str:
    return f"{space.study}-sweep"


def require_free(folder: Path, workers: int) -> None:
    """Refuse where one of the workers is at work, or where a trial waits for a worker that will not come."""
    if not has_begun(folder):
        return
    for worker in range(workers):
        with worker_lock(folder, worker, patience_s=0):
            pass
    _, study = open_folder(folder)
    if late := [trial for trial in study.trials() if trial.state == "running" and trial.worker >= workers]:
        raise UserError(
            f"trial {late[0].number} waits for worker {late[0].worker}, which has begun it; "
            f"take at least --workers {max(trial.worker for trial in late) + 1}"
        )


def require_store(space: Space) -> None:
    """Build the demo's store where it is missing, before the workers would side by side; refuse without another."""
    config = space.config()
    path = config.store.path
    if "://" in path or (Path(path) / "manifest.json").exists():
        return
    build = ["-m", "shards.build", "--config", str(space.base), *overrides(space.fixed)]
    require(config.data.demo is not None, f"store {path} does not exist; build it with python {shlex.join(build)}")
    print(f"building the demo store {path} …", flush=True)
    status = subprocess.run([sys.executable, *build], check=False).returncode
    require(status == 0, "the demo store could not be built; see the lines above")


def status_text(folder: Path, space: Space, trials: Sequence[Trial]) -> str:
    """A table of the trials, and the best one with the command that trains it."""
    metric, counts = metric_of(space.config()), Counter(trial.state for trial in trials)
    told = ", ".join(f"{counts[state]} {state}" for state in ("complete", "running", "failed") if counts[state])
    lines = [f"{folder}: {len(trials)} of {space.trials} trials have begun{f': {told}' if told else ''}"]
    if trials:
        head = ["trial", "state", metric, *space.parameters]
        rows = [
            [str(t.number), t.state, "" if t.value is None else f"{t.value:.6f}", *map(_shortened, t.words.values())]
            for t in trials
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        table = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows)]
        failures = ["", *(f"  {trial.why}" if trial.why else "" for trial in trials)]
        lines += [f"{'  '.join(row)}{why}" for row, why in zip(table, failures, strict=True)]
    best = best_of(list(trials))
    if best is not None:
        words = training_words(folder, best.words, folder / "best")
        lines += [f"best: trial {best.number}, validation {metric} {best.value:.6f}, in {run_of(folder, best)}"]
        lines += [f"  {ACCELERATE} -m fmrl_dist.train {shlex.join(words)}"]
    return "\n".join(lines)


def print_jobs(folder: Path) -> None:
    """How many workers are in which state, where there is a SLURM to ask."""
    if (folder / JOBS / RECORD).exists() and has_slurm():
        (workers,) = read_record(folder / JOBS)
        print(summary(workers, states(workers.jobs)))


def finish(folder: Path, space: Space, study: Study) -> None:
    """Print what has come of the trials, and write the config of the best.

    Raises:
        SystemExit: trials are left, or all have failed.
    """
    trials = study.trials()
    print(status_text(folder, space, trials))
    best = best_of(trials)
    left = max(space.trials - len(trials), 0) + sum(trial.state == "running" for trial in trials)
    if best is not None and not left:
        config = space.config({**best.words, "run.dir": str(folder / "best")})
        write_atomically(folder / BEST, config.to_yaml().encode())
        print(f"wrote {folder / BEST}")
        return
    why = f"{left} trials are left; see the workers' logs in {folder / JOBS}, and call the command again"
    print(f"error: {why if left else 'all trials failed'}", file=sys.stderr)
    raise SystemExit(1)


def is_over(study: Study, space: Space) -> bool:
    """Whether every trial that was asked for has ended."""
    trials = study.trials()
    return len(trials) >= space.trials and all(trial.state != "running" for trial in trials)


def sweep_here(scripts: Sequence[Script], folder: Path, name: str) -> None:
    """Run workers on this machine until all have ended; INT and TERM end them, and what they train is saved.

    Raises:
        SystemExit: such a signal came.
    """
    told: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for submitit's processes: of a terminal's, they would die first
    jobs = submit(scripts, "local", folder / JOBS, name, {})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    while not all(job.done() for job in jobs):
        if told:
            end_workers([int(job.job_id) for job in jobs])
        time.sleep(POLL_S)
    if told:
        del jobs  # submitit's complain when the process ends before them
        print("stopped; the same command goes on", flush=True)
        raise SystemExit(128 + told[0])


def end_workers(pids: Sequence[int]) -> None:
    """Send TERM to the workers below some of submitit's processes."""
    import psutil

    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for process in psutil.Process(pid).children(recursive=True):
                if "launch.sweeps.worker" in process.cmdline():
                    process.terminate()


def wait_for_slurm(job_ids: Sequence[str], study: Study, space: Space) -> None:
    """Until the sweep is over, or all of its jobs have ended; they do not depend on whoever waits for them.

    Jobs that SLURM has not known for some minutes have ended, too: without accounting it forgets them.
    """
    known_until = time.monotonic()
    try:
        while not is_over(study, space):
            now = patient_states(job_ids).values()
            if any(state in LIVE for state in now):
                known_until = time.monotonic()
            elif "UNKNOWN" not in now or time.monotonic() - known_until > FORGOTTEN_S:
                return
            time.sleep(SLURM_POLL_S)
    except KeyboardInterrupt:
        print("\nno longer waited for; the jobs go on: see --status and --cancel")
        raise SystemExit(128 + signal.SIGINT) from None


def parse_sbatch(words: Sequence[str]) -> Mapping[str, str]:
    """``option=value`` words as options of sbatch, by long name."""
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        require(SBATCH_NAME.fullmatch(name) is not None, f"--sbatch {word}: expected OPTION[=VALUE], such as time=120")
        require(name not in OURS, f"--sbatch {word}: the sweep sets {name} itself; leave it out")
        options[name] = value
    return options


def _shortened(word: str) -> str:
    """A word as a table shows it: floats by four digits."""
    try:
        return word if word.lstrip("-").isdecimal() else f"{float(word):.4g}"
    except ValueError:
        return word


def main(argv: list[str]) -> None:
    parser = CommandParser("python -m launch.sweep", description="Search a space for the config that validates best.")
    parser.add_argument(
        "space", type=Path, help="YAML file, such as configs/sweeps/demo.yaml; launch/sweeps/space.py says how"
    )
    parser.add_argument("--workers", type=int, default=1, help="that train trials at the same time (default: 1)")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="default: slurm")
    parser.add_argument("--folder", type=Path, help="default: runs/<study>-sweep; all nodes share it")
    parser.add_argument(
        "--sbatch",
        metavar="OPTION[=VALUE]",
        nargs="+",
        action="extend",
        default=[],
        help="of sbatch, by long name, for each worker: time=120 gpus-per-node=1",
    )
    parser.add_argument("--wait", action="store_true", help="for the end, then show the best (local always does)")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    actions.add_argument("--status", action="store_true", help="print the trials so far and SLURM's jobs, and end")
    actions.add_argument("--cancel", action="store_true", help="end SLURM's jobs; what they train is saved")
    arguments = parser.parse_args(argv)
    require(arguments.workers >= 1, f"--workers is {arguments.workers}; expected at least 1")
    options = parse_sbatch(arguments.sbatch)
    require(not (options and arguments.cluster == "local"), "--sbatch is for SLURM; leave it out, or --cluster local")
    require(
        not (arguments.cancel and arguments.cluster == "local"),
        "--cancel is for SLURM; workers of this machine end with the command that started them",
    )
    require(Path(SCRIPT).is_file(), f"{Path.cwd()} is not the repository's root; start a sweep from there")
    space = read_space(arguments.space)
    folder = arguments.folder or Path("runs") / f"{space.study}-sweep"
    if arguments.status:
        recorded, study = open_folder(folder)
        print(status_text(folder, recorded, study.trials()))
        print_jobs(folder)
    elif arguments.cancel:
        cancel_recorded(folder / JOBS)
    elif arguments.dry_run:
        print(dry_run_text(space, folder, arguments.workers, arguments.cluster, options))
    else:
        sweep(space, folder, arguments.workers, arguments.cluster, options, arguments.wait)


if __name__ == "__main__":
    run_command(main)
