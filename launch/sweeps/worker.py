"""``python -m launch.sweeps.worker FOLDER INDEX``: train trials of a sweep, one after another, until none is left.

``launch/sweep.slurm`` runs this; ``python -m launch.sweep`` starts it. A trial is a run that ``--resume auto`` goes
on with: where a worker was killed, the next one of its index goes on with its trial. A trial that fails is noted, and
the next one begins.

At USR1 and TERM what is trained saves and ends; its trial stays as it is. The worker then leaves
``worker-<index>.stopped`` with the signal's name in its folder, for the batch script to see, and ends well too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fmrl_dist.base.errors import run_command
from fmrl_dist.base.files import write_atomically
from fmrl_dist.config.command_line import CommandParser
from launch.sweeps.folder import open_folder, run_of, stopped_file, training_words, worker_lock
from launch.sweeps.space import metric_of
from launch.sweeps.study import Study, Trial

POLL_S = 0.2
REMIND_S = 10.0  # what is still starting does not listen yet
LOCK_PATIENCE_S = 60.0  # until the lock of a node that has died is free, on a network file system
# A line that says what went wrong, and those that launchers add below it.
FAILURE = re.compile(r"error: |[A-Za-z_.]*(Error|Exception)\b")
OF_LAUNCHERS = ("subprocess.CalledProcessError", "torch.distributed.elastic")


class Signals:
    """The last signal that asked this process to stop."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = signal.Signals(number)


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal, whose name this holds, has ended a trial before it was done, or the worker between two."""


def work(folder: Path, worker: int, launcher: Sequence[str] | None, signals: Signals) -> None:
    """Train until no trial is left for this worker.

    Args:
        folder: of the sweep.
        worker: index of this worker; no two may have the same.
        launcher: command that starts the module whose name and words follow; whoever signals this process signals it
            too. None: this Python, which is sent what this process is sent.
        signals: what this process has been asked.

    Raises:
        Stopped: a signal came.
        SystemExit: all trials of the sweep are over, and all have failed.
    """
    with worker_lock(folder, worker, LOCK_PATIENCE_S) as lock:
        space, study = open_folder(folder)
        while signals.number is None and (trial := study.take(worker)) is not None:
            print(f"worker {worker}: trial {trial.number}, {json.dumps(trial.words)}", flush=True)
            metric = metric_of(space.config(trial.words))
            train(folder, study, trial, metric, launcher, lock, signals)
    if signals.number is not None:
        raise Stopped(signals.number.name)
    trials = study.trials()
    print(f"worker {worker}: no trial is left to begin", flush=True)
    if all(trial.state == "failed" for trial in trials):
        print(f"error: all {len(trials)} trials of {folder} failed; the last: {trials[-1].why}", file=sys.stderr)
        raise SystemExit(1)


def train(
    folder: Path, study: Study, trial: Trial, metric: str, launcher: Sequence[str] | None, lock: int, signals: Signals
) -> None:
    """Train a trial, or what is left of it, and tell the study.

    Raises:
        Stopped: a signal came before it was done.
    """
    run = run_of(folder, trial)
    words = [*training_words(folder, trial.words, run), "--resume", "auto"]
    with run.with_suffix(".log").open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [*(launcher or (sys.executable, "-m")), "fmrl_dist.train", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        )
        status = process.wait() if launcher else wait(process, signals)
    if status == 0 and (run / "evaluation.json").exists():
        value = best_value(run, metric)
        study.complete(trial.number, value)
        print(f"trial {trial.number}: {metric} {value:.4f}", flush=True)
    elif status == 0 or signals.number is not None:
        told = signals.number or (signal.SIGUSR1 if (run / "requeue").exists() else signal.SIGTERM)
        raise Stopped(told.name)
    else:
        why = cause(run.with_suffix(".log").read_bytes()[begin:].decode(errors="replace"), status)
        study.fail(trial.number, why)
        print(f"trial {trial.number} failed: {why}", flush=True)


def wait(process: subprocess.Popen[bytes], signals: Signals) -> int:
    """Wait for a process to end, and hand signals on to it and its descendants; returns its exit status."""
    reminded = -REMIND_S
    while (status := process.poll()) is None:
        if signals.number is not None and time.monotonic() - reminded >= REMIND_S:
            tell(process.pid, signals.number)
            reminded = time.monotonic()
        time.sleep(POLL_S)
    return status


def tell(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and all its descendants, wherever a launcher has put them."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def best_value(run: Path, metric: str) -> float:
    """The highest value of a metric that validation has found in a run: that of its best checkpoint."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(float(line[metric]) for line in lines if line["split"] == "valid")


def cause(log: str, status: int) -> str:
    """The line of a failed run's log that says why: the first that names an error, else the last."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if FAILURE.match(line) and not line.startswith(OF_LAUNCHERS)]
    return [*errors[:1], *lines[-1:], f"exit code {status} without a word"][0]


def main(argv: list[str]) -> None:
    parser = CommandParser("python -m launch.sweeps.worker", description="Train trials of a sweep until none is left.")
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("worker", type=int, help="index of this worker, from 0")
    parser.add_argument(
        "--launcher",
        nargs=argparse.REMAINDER,
        help="command that starts a module, all words that follow (default: this Python, one process)",
    )
    arguments = parser.parse_args(argv)
    try:
        work(arguments.folder, arguments.worker, arguments.launcher, Signals())
    except Stopped as stopped:
        write_atomically(stopped_file(arguments.folder, arguments.worker), f"{stopped}\n".removeprefix("SIG").encode())
        print("stopped by a signal; the trial goes on when its worker is started again", flush=True)


if __name__ == "__main__":
    run_command(main)
