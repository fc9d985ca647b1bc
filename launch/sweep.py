"""``python -m launch.sweep SPACE.yaml --workers N``: search a space (launch/space.py) for what validates best.

N workers (launch/sweep_worker.py), an array of SLURM jobs or processes of this machine, share a study and train its
trials, each as a run of its own. The same command goes on with a sweep that was interrupted, or has got more trials.
A run evaluates on test when it ends, as any run does; nothing here reads that: trials are compared by validation alone.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmrl_dist.config import CommandParser
from fmrl_dist.errors import UserError, require, run_command
from launch.jobs import LIVE, Script, require_slurm, sbatch_text, states, submit
from launch.space import Space, metric_of, overrides, read_space
from launch.study import Study, Trial, best_of, import_optuna
from launch.sweep_folder import BEST, has_begun, open_folder, prepare_folder, run_of, training_words, worker_lock, write

SCRIPT = "launch/sweep.slurm"
ACCELERATE = "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
POLL_S = 0.5
SLURM_POLL_S = 10.0


def worker_scripts(folder: Path, workers: int) -> list[Script]:
    """What each worker runs."""
    module = (sys.executable, "-m", "launch.sweep_worker", str(folder))
    return [Script(SCRIPT, (str(folder), str(i)), (*module, str(i)), {}) for i in range(workers)]


def describe(space: Space, folder: Path) -> str:
    """What a sweep would do, in lines."""
    config = space.config()
    lines = [f"{folder}: {space.trials} trials over {space.base}, by validation {metric_of(config)}"]
    lines += [f"  {key}: {value}" for key, value in space.raw["parameters"].items()]
    lines += [f"  {' '.join(overrides({key: word}))}" for key, word in space.fixed.items()]
    return "\n".join(lines)


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
        write(folder / BEST, config.to_yaml())
        print(f"wrote {folder / BEST}")
        return
    why = f"{left} trials are left; see the workers' logs in {folder / 'jobs'}, and call the command again"
    print(f"error: {why if left else 'all trials failed'}", file=sys.stderr)
    raise SystemExit(1)


def is_over(study: Study, space: Space) -> bool:
    """Whether every trial that was asked for has ended."""
    trials = study.trials()
    return len(trials) >= space.trials and all(trial.state != "running" for trial in trials)


def wait_for_slurm(job_ids: Sequence[str], study: Study, space: Space) -> None:
    """Until the sweep is over, or all of its jobs have ended."""
    while not is_over(study, space):
        if all(state not in (*LIVE, "UNKNOWN") for state in states(job_ids).values()):
            return
        time.sleep(SLURM_POLL_S)


def parse_sbatch(words: Sequence[str]) -> Mapping[str, str]:
    """``key=value`` words as options of sbatch."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        require(
            bool(key and equals), f"--sbatch {word!r} is not key=value; write --sbatch time=04:00:00 gpus-per-node=1"
        )
        options[key.lstrip("-")] = value
    return options


def _shortened(word: str) -> str:
    """A word as a table shows it: floats by four digits."""
    try:
        return word if word.lstrip("-").isdecimal() else f"{float(word):.4g}"
    except ValueError:
        return word


def main(argv: list[str]) -> None:
    parser = CommandParser("python -m launch.sweep", description="Search a space for the config that validates best.")
    parser.add_argument("space", type=Path, help="YAML file, such as configs/sweep-demo.yaml; launch/space.py says how")
    parser.add_argument("--workers", type=int, default=1, help="that train trials at the same time (default: 1)")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm", help="default: slurm")
    parser.add_argument("--folder", type=Path, help="default: runs/<study>-sweep; all nodes share it")
    parser.add_argument("--sbatch", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for each worker")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    parser.add_argument("--wait", action="store_true", help="for the end, then show the best (local always does)")
    parser.add_argument("--status", action="store_true", help="print the trials so far, and end")
    arguments = parser.parse_args(argv)
    require(arguments.workers >= 1, f"--workers is {arguments.workers}; expected at least 1")
    options, local = parse_sbatch(arguments.sbatch), arguments.cluster == "local"
    require(not (local and options), "--sbatch is for --cluster slurm; leave it out")
    space = read_space(arguments.space)
    folder = arguments.folder or Path("runs") / f"{space.study}-sweep"
    if arguments.status:
        recorded, study = open_folder(folder)
        print(status_text(folder, recorded, study.trials()))
        return
    scripts = worker_scripts(folder, arguments.workers)
    name, jobs_folder = f"{space.study}-sweep", folder / "jobs"
    if arguments.dry_run:
        print(describe(space, folder))
        commands = [shlex.join(script.local if local else ("bash", script.path, *script.words)) for script in scripts]
        if not local:
            print(sbatch_text(scripts, jobs_folder, name, options, max_at_once=len(scripts)), end="")
        print("\n".join(commands))
        return
    import_optuna()
    if not local:
        require_slurm()
    require_free(folder, arguments.workers)
    require_store(space)
    space = prepare_folder(folder, space)
    study = Study(folder, space)
    jobs = submit(scripts, arguments.cluster, jobs_folder, name, options, max_at_once=len(scripts))
    if local:
        for job in jobs:
            while not job.done():
                time.sleep(POLL_S)
    else:
        print(f"{name}: job(s) {', '.join(job.job_id for job in jobs)}, logs in {jobs_folder}")
        print(f"see how it goes: python -m launch.sweep {arguments.space} --folder {folder} --status", flush=True)
        if not arguments.wait:
            return
        wait_for_slurm([job.job_id for job in jobs], study, space)
    finish(folder, space, study)


if __name__ == "__main__":
    run_command(main)
