"""Commands in processes of their own that start in milliseconds: forked from the server of tests.fixtures.processes.

The process gets a session, an environment, a folder, closed or redirected streams, and the signals of a fresh process.
What it leaves running is found by its session, and by a variable in the environment of what it has started.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path

import psutil

from fmrl_dist.base.command_start import start_command
from fmrl_dist.base.errors import run_command
from tests.fixtures.commands import Ended
from tests.fixtures.processes import REPOSITORY, SERVER_VARIABLES, clean_environment, start_in_server
from tests.fuzz.commands import Command

TIMEOUT_S = 120.0
MARK = "FMRL_FUZZ_CASE"
READY = "ready"  # exists in the logs once a command is about to start
Setup = Callable[[Path], AbstractContextManager[object]]  # of the case's folder


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    process: ForkServerProcess
    logs: Path
    mark: str

    def wait_until_ready(self) -> None:
        """Wait until the command is about to start."""
        while not (self.logs / READY).exists():
            assert self.process.exitcode is None
            time.sleep(0.001)

    def wait(self) -> Ended:
        """Its end; exit codes as a shell shows them."""
        self.process.join(TIMEOUT_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hung: {self._text('out')}\n{self._text('err')}")
        code = self.process.exitcode
        return Ended(code if code >= 0 else 128 - code, self._text("out"), self._text("err"))

    def left(self) -> list[str]:
        """Command lines of what it has started and what still runs."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if (
                    process.pid != self.process.pid
                    and process.status() != psutil.STATUS_ZOMBIE
                    and self._is_of(process)
                ):
                    found.append(" ".join(process.cmdline()))
        return found

    def _is_of(self, process: psutil.Process) -> bool:
        return os.getsid(process.pid) == self.process.pid or process.environ().get(MARK) == self.mark

    def _text(self, name: str) -> str:
        return (self.logs / name).read_text(errors="replace")


def start(command: Command, folder: Path, logs: Path, setup: Setup | None = None, words: Sequence[str] = ()) -> Started:
    """Start a command in ``folder``, with further ``words``; ``setup`` is entered in its process."""
    logs.mkdir(parents=True, exist_ok=True)
    (logs / READY).unlink(missing_ok=True)
    for name in ("out", "err"):
        (logs / name).write_text("")
    mark = uuid.uuid4().hex
    environment = clean_environment() | SERVER_VARIABLES | {MARK: mark}
    process = start_in_server(_run, command.module, [*command.argv(folder), *words], folder, logs, environment, setup)
    return Started(process, logs, mark)


def _run(
    module: str, argv: list[str], folder: Path, logs: Path, environment: dict[str, str], setup: Setup | None
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    for number in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_APPEND), stream)
    code = 0
    with contextlib.nullcontext() if setup is None else setup(folder):
        (logs / READY).touch()
        try:
            sys.argv = ["-m"]  # as long as Python looks for the module
            start_command()
            sys.argv = [module, *argv]
            run_command(importlib.import_module(module).main)
        except SystemExit as end:
            code = int(end.code or 0)
    _exit_function()  # what multiprocessing does at exit
    os._exit(code)  # nothing of the server's


def check_end(command: Command, ended: Ended) -> bool:
    """Whether it succeeded; else it must have refused in one line, or have shown the log of what it had started."""
    if ended.code == 0:
        assert ended.stderr == "", ended
        return True
    if ended.code == 1 and command.starts_processes:
        assert "Traceback" not in ended.stdout + ended.stderr, ended
        return False
    assert ended.code == 2, ended
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended
    return False
