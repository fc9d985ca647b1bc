"""How a command ends: on a user's mistake with one line and exit code 2, quietly where nobody reads its output."""

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
    """Bad input. The message says what was found, what was expected and how to mend it, on one line."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``; end a :class:`UserError` with one line on stderr and exit code 2.

    So ends a full disk. A command whose output is no longer read (``| head -1``) ends without a word. Any other
    exception keeps its traceback and Python's exit code 1: that is a crash, and ours to mend.
    """
    try:
        status = _run(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if _stdout_is_read():
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of it once more at exit
        status = EXIT_NO_READER
    if status:
        sys.exit(status)


def _run(main: Callable[[list[str]], None]) -> int | str | None:
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {hide_credentials(str(error))}\n")  # in one piece: other ranks may write the same
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.stderr.write(f"error: {error.strerror} ({error.filename or 'while writing'}); make room and go on\n")
        return EXIT_USER_ERROR
    except SystemExit as end:  # of --help, --version, --print-config
        return end.code
    return 0


def _stdout_is_read() -> bool:
    """Whether somebody still holds the other end: of a pipe that nobody reads, the kernel reports an error."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
