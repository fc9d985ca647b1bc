"""Commands as jobs of this machine: each with a log, and each ended together with everything it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

GRACE_S = 60.0  # from TERM to KILL: training saves a checkpoint first
POLL_S = 0.1


class LocalJob:
    """A command that runs in a session of its own, so that signals from the terminal do not reach it.

    Args:
        command: the program and its arguments.
        log: file for both output streams; replaced where it exists.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._first = psutil.Process(self._process.pid)

    @property
    def status(self) -> int | None:
        """The command's exit status; None while it runs."""
        return self._process.poll()

    def processes(self) -> list[psutil.Process]:
        """The command, then everything it has started: its descendants, and what has stayed in its session."""
        session = self._process.pid
        if psutil.pid_exists(session) and not self._first.is_running():
            return []  # the job has ended, and another process has got its id
        found = process_tree(self._first)
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == session:
                    found.append(process)
        return [process for process in dict.fromkeys(found) if is_alive(process)]


def end_jobs(jobs: Sequence[LocalJob], grace_s: float = GRACE_S) -> None:
    """Send TERM to all processes of some jobs, and KILL to those that are still alive after ``grace_s``.

    Returns when none is left. An exception meanwhile, such as that of a second signal, ends the grace period.
    """
    asked = [process for job in jobs for process in job.processes()]
    try:
        send_signal(asked, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while _alive(jobs, asked) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        while left := _alive(jobs, asked):
            send_signal(left, signal.SIGKILL)
            time.sleep(POLL_S)


def process_tree(root: psutil.Process) -> list[psutil.Process]:
    """A process, then all its descendants, whatever sessions and process groups they are in; empty if it has ended."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def send_signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those processes that have not ended."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs. One that has ended but whose parent has not noticed yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(jobs: Sequence[LocalJob], asked: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that were asked to end, and any that the jobs have started since."""
    return [*filter(is_alive, asked), *(process for job in jobs for process in job.processes())]
