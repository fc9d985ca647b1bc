"""How a command ends: with one line and exit code 2 on a user's mistake, silently when nobody reads its output."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType

from fmrl_dist.base.parent_process import end_with_launcher
from fmrl_dist.base.urls import hide_credentials

EXIT_USER_ERROR = 2
CANNOT_WRITE = {  # and how to mend it
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that can be written to",
    errno.ESTALE: "mount it again",
    errno.ENOTDIR: "choose a path that does not lead through a file",
    errno.EEXIST: "choose a path that does not lead through a file",  # a folder was to be made there
    errno.ELOOP: "choose a path without a circle of links",
    errno.ENAMETOOLONG: "choose a shorter path",
}
EXIT_NO_READER = 128 + signal.SIGPIPE  # what a shell shows for a program that ``| head`` ended


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and how to fix it, on one line."""


class SignalError(BaseException):
    """TERM or HUP; not an Exception, so that nothing but cleaning up happens on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _end(number: int, _: FrameType | None) -> None:
    raise SignalError(number)


HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _end, signal.SIGHUP: _end}


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``; a :class:`UserError` ends it with one line on stderr and exit code 2.

    A disk that is full, read-only or gone, or a path that leads through a file, ends it the same way. A command whose
    output is no longer read (``| head -1``) ends silently. INT, TERM and HUP end it with one line, cleaned up, whatever
    the parent process had them set to; a command that saves at a signal (``fmrl_dist.train``) has handlers of its own
    while it does. Any other exception keeps its traceback, without the credentials of URLs, and Python's exit code 1:
    that is a crash, a bug of ours. A command that a launcher has started ends when the launcher has died, as at TERM.
    """
    sys.excepthook = _show_traceback
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    try:
        status = _run(main)
        sys.stdout.flush()
    except BrokenPipeError:
        if _stdout_is_read():
            raise  # a different pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it again at exit
        status = EXIT_NO_READER
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        sys.exit(status)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(hide_credentials("".join(traceback.format_exception(kind, error, trace))))


def _run(main: Callable[[list[str]], None]) -> int | str | None:
    try:
        end_with_launcher()  # here, as its signal may come at once
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {hide_credentials(str(error))}\n")  # one write: other ranks may print the same line
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, SignalError) as error:
        number = error.number if isinstance(error, SignalError) else signal.SIGINT
        sys.stderr.write(f"ended by {number.name}\n")
        return 128 + number
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where, mend = error.filename or "while writing", CANNOT_WRITE[error.errno]
        sys.stderr.write(f"error: {error.strerror} ({where}); {mend}, then run this again\n")
        return EXIT_USER_ERROR
    except SystemExit as end:  # raised by --help, --version, --print-config
        return end.code
    return 0


def _stdout_is_read() -> bool:
    """Whether the other end of stdout is open: for a pipe that nobody reads, the kernel reports an error."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
