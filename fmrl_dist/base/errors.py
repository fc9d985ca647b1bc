"""How a command ends: with one line and exit code 2 on a user's mistake, silently when nobody reads its output."""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from fmrl_dist.base.command_start import EXIT_USER_ERROR, end_at_once, taken_signals
from fmrl_dist.base.parent_process import end_with_launcher
from fmrl_dist.base.urls import hide_credentials

SYSTEM_ERRORS = {  # and how to mend it
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that can be written to",
    errno.ESTALE: "mount it again",
    errno.ENOTDIR: "choose a path that does not lead through a file",
    errno.EEXIST: "choose a path that does not lead through a file",  # a folder was to be made there
    errno.ELOOP: "choose a path without a circle of links",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EISDIR: "move this folder away",
    errno.EIO: "check the disk, or the connection to it",
}
AGAIN_S = 0.01  # until a signal is raised again whose exception Python has ignored
NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal that is gone
EXIT_NO_READER = 128 + signal.SIGPIPE  # what a shell shows for a program that ``| head`` ended


class UserError(ValueError):
    """Bad input. The message says what was found, what was expected and how to fix it, on one line."""


class SignalError(BaseException):
    """TERM or HUP; not an Exception, so that nothing but cleaning up happens on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


class _FirstSignal:
    """Raises the first signal while a command runs; those that follow must not interrupt its cleaning up."""

    def __init__(self) -> None:
        self.is_running = False
        self.number: signal.Signals | None = None
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, which leaves the line to the process that it works for
            os._exit(128 + number)
        if self.is_running:
            self.is_running, self.number = False, signal.Signals(number)
            raise KeyboardInterrupt if number == signal.SIGINT else SignalError(number)
        if self.number is None:
            end_at_once(number, frame)

    def raise_again(self, ignored: sys.UnraisableHookArgs) -> None:
        """``sys.unraisablehook``: where Python ignores exceptions, as in ``__del__``, a signal would be lost."""
        if self.number is None or not _comes_from_signal(ignored.exc_value):
            sys.__unraisablehook__(ignored)
            return
        again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), self.number))
        again.daemon = True
        self.is_running, self.number = True, None
        again.start()


def _comes_from_signal(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt | SignalError):
        error = error.__context__
    return error is not None


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``; a :class:`UserError` ends it with one line on stderr and exit code 2.

    A disk that is full, read-only, failing or gone, or a path that leads through a file, ends it the same way. A
    command whose output is no longer read (``| head -1``) ends silently. INT, TERM and HUP end it with one line,
    cleaned up, whatever the parent process had them set to (but HUP stays ignored where ``nohup`` has it so); while
    it cleans up, further ones change nothing. A command that saves at a signal (``fmrl_dist.train``) has handlers
    of its own while it does. Any other exception keeps its traceback, without the credentials of URLs, and Python's
    exit code 1: that is a crash, a bug of ours. A command that a launcher has started ends when the launcher has
    died, as at TERM.
    """
    sys.excepthook = _show_traceback
    first = _FirstSignal()
    before = {number: signal.signal(number, first.handle) for number in taken_signals()}
    hook, sys.unraisablehook = sys.unraisablehook, first.raise_again
    try:
        status = _run(main, first)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NO_READER or _stdout_is_read():
            raise  # another pipe, or a disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it again at exit
        status = EXIT_NO_READER
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
    if status:
        sys.exit(status)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(hide_credentials("".join(traceback.format_exception(kind, error, trace))))


def _run(main: Callable[[list[str]], None], first: _FirstSignal) -> int | str | None:
    try:
        try:
            first.is_running = True
            end_with_launcher()  # here, as its signal may come at once
            main(sys.argv[1:])
        finally:
            first.is_running = False
    except BaseException as error:  # after a signal, whatever the cleaning up of others has made of its exception
        if first.number is None:
            return _status_of(error)
    if first.number is not None:
        sys.stderr.write(f"ended by {first.number.name}\n")
        return 128 + first.number
    return 0


def _status_of(error: BaseException) -> int | str | None:
    """The exit status that an exception of a command means; what is a crash is raised again."""
    if isinstance(error, UserError):
        sys.stderr.write(one_line(f"error: {hide_credentials(str(error))}"))
        return EXIT_USER_ERROR
    is_of_stdout = isinstance(error, OSError) and error.errno in NO_READER and not _stdout_is_read()
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS and not is_of_stdout:
        where, mend = error.filename or "while reading or writing", SYSTEM_ERRORS[error.errno]
        closed = _unreadable(Path(where)) if error.errno == errno.EACCES and isinstance(where, str) else None
        if closed is not None:
            mend = f"{closed} cannot be read by this user: ask for the right to, or choose another"
        sys.stderr.write(one_line(f"error: {error.strerror} ({where}); {mend}, then run this again"))
        return EXIT_USER_ERROR
    if isinstance(error, SystemExit):  # raised by --help, --version, --print-config
        return error.code
    raise error


def _unreadable(path: Path) -> Path | None:
    """What keeps this user from reading ``path``, itself or a folder above it; None if it is there to be read."""
    for place in (*reversed(path.absolute().parents), path.absolute()):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except OSError:
            return None
        if not os.access(place, os.X_OK if is_folder and place != path.absolute() else os.R_OK):
            return place
    return None


def one_line(message: str) -> str:
    """A message as one line to write at once, since other ranks may write the same one.

    What a name or a value in it holds of line breaks, of control sequences for a terminal, and of what cannot be
    encoded, is shown escaped.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message) + "\n"


def _stdout_is_read() -> bool:
    """Whether the other end of stdout is open: for one that nobody reads, the kernel reports an error."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, select.POLLOUT)
    except (OSError, ValueError):  # no file, or a closed one
        return True
    return not any(events & select.POLLERR for _, events in poll.poll(0))
