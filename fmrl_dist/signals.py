"""Signals that ask a run to save and end: USR1 (its time is nearly over: submit it again), TERM (cancelled, preempted).

A handler only notes the signal. The ranks agree on it once a step, save together, and leave; rank 0 then puts
``requeue`` into the run's folder if any of them was sent USR1, for the batch script to see: through a launcher, exit
codes tell no more than zero or not.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE_FILE = "requeue"


class StopRequest:
    """What signals have asked of this process while the context lasts."""

    def __init__(self) -> None:
        self.term = self.usr1 = False
        self._leave_at_once = False
        self._before: dict[signal.Signals, object] = {}

    @property
    def ended_in_evaluation(self) -> bool:
        """Whether the ranks have been stopped wherever each of them was."""
        return self._leave_at_once and (self.term or self.usr1)

    def leave_at_once(self) -> None:
        """From now on a signal ends the process where it is, without an error: there is nothing left to save."""
        self._leave_at_once = True
        if self.term or self.usr1:
            raise Stopped

    def _note(self, number: int, _: FrameType | None) -> None:
        self.term |= number == signal.SIGTERM
        self.usr1 |= number == signal.SIGUSR1
        if self._leave_at_once:
            raise Stopped

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there does Python run handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave back


class Stopped(BaseException):
    """A signal has ended the run after its last checkpoint. No Exception: whoever tries again must not catch it."""


def ask_for_requeue(folder: Path) -> None:
    """Tell the batch script that the run wants to be submitted again."""
    (folder / REQUEUE_FILE).touch()


def forget_requeue(folder: Path) -> None:
    """Take back what an earlier life of the run has asked for."""
    (folder / REQUEUE_FILE).unlink(missing_ok=True)
