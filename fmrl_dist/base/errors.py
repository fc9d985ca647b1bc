"""How a command ends: with one line and exit code 2 on a user's mistake, silently when nobody reads its output."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable

from fmrl_dist.base.urls import hide_credentials

EXIT_USER_ERROR = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
EXIT_NO_READER = 128 + signal.SIGPIPE  # what a shell shows for a program that ``| head`` ended


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and how to fix it, on one line."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``; a :class:`UserError` ends it with one line on stderr and exit code 2.

    A full disk ends it the same way. A command whose output is no longer read (``| head -1``) ends silently. Any other
    exception keeps its traceback and Python's exit code 1: that is a crash, a bug of ours.
    """
    try:
        status = _run(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if _stdout_is_read():
            raise  # a different pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it again at exit
        status = EXIT_NO_READER
    if status:
        sys.exit(status)


def _run(main: Callable[[list[str]], None]) -> int | str | None:
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {hide_credentials(str(error))}\n")  # one write: other ranks may print the same line
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.stderr.write(f"error: {error.strerror} ({error.filename or 'while writing'}); free space and rerun\n")
        return EXIT_USER_ERROR
    except SystemExit as end:  # raised by --help, --version, --print-config
        return end.code
    return 0


def _stdout_is_read() -> bool:
    """Whether the other end of stdout is open: for a pipe that nobody reads, the kernel reports an error."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
