"""How a command begins: what its package does before everything that takes seconds to import.

While a command imports, and after it has done its work, it has nothing to clean up: INT, TERM and HUP end it at once,
with one line (HUP unless ``nohup`` has it ignored). In between, :func:`fmrl_dist.base.errors.run_command` has them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import typing
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_USER_ERROR = 2


def start_command() -> None:
    """Prepare this process, if ``python -m`` starts a command of ours in it.

    A package calls this as it is imported. While Python imports the package of a module that ``-m`` names,
    ``sys.argv[0]`` is "-m"; at any other time nothing happens: the importing program keeps its own handlers.

    Raises:
        SystemExit: the current folder has been removed. Libraries would fail without saying so.
    """
    if sys.argv[:1] != ["-m"]:
        return
    for number in taken_signals():
        signal.signal(number, end_at_once)
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.stderr.write("error: the current folder has been removed; change to one that exists\n")
        raise SystemExit(EXIT_USER_ERROR) from None


def taken_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a command: all of :data:`ENDING`, but HUP where the parent process has it ignored.

    That is what ``nohup`` promises. INT is ignored in any command that a shell starts in the background, so nothing is
    meant by it.
    """
    hup_is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in ENDING if not (number == signal.SIGHUP and hup_is_ignored))


def end_at_once(number: int, _: FrameType | None) -> typing.NoReturn:
    """The handler: one line on stderr, and the exit code that a shell shows for the signal."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
