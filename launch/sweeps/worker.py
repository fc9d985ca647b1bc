"""``python -m launch.sweeps.worker FOLDER INDEX``: train trials of a sweep, one after another, until none is left.

``launch/sweep.slurm`` and ``python -m launch.sweep`` start it. A trial is a run with ``--resume auto``: if a worker is
killed, the next worker with its index resumes the trial. A trial that fails is recorded, and the next one starts.

At USR1 and TERM the training saves and ends; its trial stays unfinished. The worker then writes the signal's name into
``worker-<index>.stopped`` in its folder, for the batch script to read, and exits with 0 too.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.json_text import read_objects
from fmrl_dist.config.command_line import CommandParser
from launch.local.processes import process_tree, send_signal
from launch.local.signals import SignalListener, listening
from launch.sweeps.folder import open_folder, refused_when_gone, run_of, stopped_file, training_arguments, worker_lock
from launch.sweeps.space import metric_of
from launch.sweeps.study import SweepStudy, Trial

POLL_S = 0.2
REMIND_S = 10.0  # a process that is still starting does not handle signals yet
LOCK_PATIENCE_S = 60.0  # until a network file system releases the lock of a node that has died
# A line that names an error, and the lines that launchers add below it.
FAILURE = re.compile(r"error: |[A-Za-z_.]*(Error|Exception)\b")
FROM_LAUNCHERS = ("subprocess.CalledProcessError", "torch.distributed.elastic")


class WorkerStopped(Exception):  # noqa: N818 - not an error
    """A signal, whose name is the message, has ended the worker: during a trial or between two."""


@dataclass(frozen=True)
class Worker:
    """A worker of the sweep in ``folder``.

    Args:
        folder: of the sweep.
        index: of this worker; no two may have the same.
        signals: those that this process receives.
        launcher: command that starts the module whose name and arguments follow; what sends signals to this process
            must send them to the launcher's processes too. Empty: the training is a child of this process, which passes
            the signals on.
    """

    folder: Path
    index: int
    signals: SignalListener
    launcher: tuple[str, ...] = ()

    def work(self) -> None:
        """Train until no trial is left for this worker.

        Raises:
            WorkerStopped: a signal arrived.
            SystemExit: the sweep has no trial left, and all have failed.
        """
        with worker_lock(self.folder, self.index, LOCK_PATIENCE_S) as lock:
            space, study = open_folder(self.folder)
            while self.signals.received is None and (trial := study.take(self.index)) is not None:
                print(f"worker {self.index}: trial {trial.number}, {json.dumps(trial.parameters)}", flush=True)
                self._train(study, trial, metric_of(space.config(trial.parameters)), lock)
        if self.signals.received is not None:
            raise WorkerStopped(self.signals.received.name)
        trials = study.trials()
        print(f"worker {self.index}: no trial is left to start", flush=True)
        if all(trial.state == "failed" for trial in trials):
            print(f"error: all {len(trials)} trials of {self.folder} failed; last: {trials[-1].why}", file=sys.stderr)
            raise SystemExit(1)

    def _train(self, study: SweepStudy, trial: Trial, metric: str, lock: int) -> None:
        """Train a trial, or the rest of it, and record its result in the study.

        Raises:
            WorkerStopped: a signal arrived before it was finished.
        """
        run = run_of(self.folder, trial)
        arguments = [*training_arguments(self.folder, trial.parameters, run), "--resume", "auto"]
        with run.with_suffix(".log").open("ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [*(self.launcher or (sys.executable, "-m")), "fmrl_dist.train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
            )
            status = process.wait() if self.launcher else wait(process, self.signals)
        if status == 0 and (run / "finished.json").exists():
            value = best_value(run, metric)
            study.complete(trial.number, value)
            print(f"trial {trial.number}: {metric} {value:.4f}", flush=True)
        elif status == 0 or self.signals.received is not None:
            requeued = (run / "requeue").exists()
            raise WorkerStopped((self.signals.received or (signal.SIGUSR1 if requeued else signal.SIGTERM)).name)
        else:
            why = failure_in(run.with_suffix(".log").read_bytes()[start:].decode(errors="replace"), status)
            study.fail(trial.number, why)
            print(f"trial {trial.number} failed: {why}", flush=True)


def wait(process: subprocess.Popen[bytes], signals: SignalListener) -> int:
    """Wait for a process to end, and pass signals on to it and its descendants; returns its exit status."""
    sent = -REMIND_S
    while (status := process.poll()) is None:
        if signals.received is not None and time.monotonic() - sent >= REMIND_S:
            send_signal(process_tree(psutil.Process(process.pid)), signals.received)
            sent = time.monotonic()
        time.sleep(POLL_S)
    return status


def best_value(run: Path, metric: str) -> float:
    """The highest value of a metric on validation in a run: that of its best checkpoint.

    Raises:
        UserError: the run's log is damaged, or has no such figure.
    """
    path, mend = run / "metrics.jsonl", "restore it, or delete the run to train it anew"
    require(path.is_file(), f"{path} does not exist, but the run is finished; {mend}")
    found = [record.get(metric) for _, record in read_objects(path, mend) if record.get("split") == "valid"]
    values = [float(value) for value in found if isinstance(value, int | float)]
    require(0 < len(values) == len(found), f"{path} has no {metric} in each of its {len(found)} validations; {mend}")
    return max(values)


def failure_in(log: str, status: int) -> str:
    """The line of a failed run's log that says why it failed: the first that names an error, else the last."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if FAILURE.match(line) and not line.startswith(FROM_LAUNCHERS)]
    return [*errors[:1], *lines[-1:], f"exit code {status} and no output"][0]


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("python -m launch.sweeps.worker", description="Train trials of a sweep until none is left.")
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("worker", type=int, help="index of this worker, from 0")
    parser.add_argument(
        "--launcher",
        nargs=argparse.REMAINDER,
        default=[],
        help="command that starts a module; takes all following arguments (default: this Python, one process)",
    )
    arguments = parser.parse_args(argv)
    with listening((signal.SIGTERM, signal.SIGUSR1)) as signals:
        worker = Worker(arguments.folder, arguments.worker, signals, launcher=tuple(arguments.launcher))
        try:
            with refused_when_gone(worker.folder):
                worker.work()
        except WorkerStopped as stopped:
            name = str(stopped).removeprefix("SIG")
            write_atomically(stopped_file(worker.folder, worker.index), f"{name}\n".encode())
            print("stopped by a signal; the trial resumes when its worker is started again", flush=True)


if __name__ == "__main__":
    run_command(main)
