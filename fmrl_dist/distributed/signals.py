"""Signals that ask a run to save and end: USR1 (its time is nearly over: submit it again), TERM (cancelled, preempted).

A handler only notes the signal. The ranks agree on it once a step, save together, and leave; amid an evaluation each
that is told stops at its next tile of items, and they agree where they would add up. Rank 0 then puts ``requeue`` into
the run's folder if any of them was sent USR1, for the batch script to see: through a launcher, exit codes tell no more
than zero or not.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

from fmrl_dist.distributed.processes import Runtime

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE_FILE = "requeue"


class StopRequest:
    """What signals have asked of this process while the context lasts."""

    def __init__(self) -> None:
        self.term = self.usr1 = False
        self.cut_short = False  # until_requested() has left something out
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.term or self.usr1

    def until_requested(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to the next one once a signal has come; a partial result must then be discarded."""
        for item in items:
            if self.requested:
                self.cut_short = True
                return
            yield item

    def raise_together(self, runtime: Runtime, mine: bool) -> None:
        """End all ranks if any of them has to; to be called by all.

        Raises:
            Stopped: on every rank; ``usr1`` says whether any of them was sent it.
        """
        num_stopped, num_requeued = runtime.agree(mine, self.usr1)
        if num_stopped:
            self.usr1 = num_requeued > 0
            raise Stopped

    def _note(self, number: int, _: FrameType | None) -> None:
        self.term |= number == signal.SIGTERM
        self.usr1 |= number == signal.SIGUSR1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there does Python run handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave back


class Stopped(Exception):  # noqa: N818 - it is none
    """A signal has ended the run, or an evaluation, before its end; raised on all ranks."""


def ask_for_requeue(folder: Path) -> None:
    """Tell the batch script that the run wants to be submitted again."""
    (folder / REQUEUE_FILE).touch()


def forget_requeue(folder: Path) -> None:
    """Take back what an earlier life of the run has asked for."""
    (folder / REQUEUE_FILE).unlink(missing_ok=True)
