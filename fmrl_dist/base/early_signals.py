"""How a command ends that gets INT, TERM or HUP while it has nothing to clean up: at once, with one line.

That is so while it imports, which takes seconds, and after it has done its work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import typing
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_at_once(number: int, _: FrameType | None) -> typing.NoReturn:
    """The handler: one line on stderr, and the exit code that a shell shows for the signal."""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"ended by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def end_while_importing() -> None:
    """Have a signal end this process at once, if ``python -m`` starts a command of ours in it.

    A package calls this as it is imported. While Python imports the package of a module that ``-m`` names,
    ``sys.argv[0]`` is "-m"; at any other time the importing program keeps its own handlers.
    """
    if sys.argv[:1] == ["-m"]:
        for number in ENDING:
            signal.signal(number, end_at_once)
