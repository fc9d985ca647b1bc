"""Signals that make a run save and end: USR1 (its time is nearly over: submit it again), TERM (cancelled, preempted).

A handler only records the signal. The ranks agree on it once per step, save together, and exit. During an evaluation,
each notified rank stops before its next tile of items, and the ranks agree where they would sum their results. If any
rank received USR1, rank 0 then writes ``requeue`` into the run's folder for the batch script: through a launcher, exit
codes only distinguish zero from non-zero.
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
    """The signals received by this process while the context is active."""

    def __init__(self) -> None:
        self.term = self.usr1 = False
        self.requeue = False  # what all ranks have agreed on; a signal that comes later changes nothing
        self.cut_short = False  # until_requested() has dropped items
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.term or self.usr1

    def until_requested(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items until a signal is received; a partial result must then be discarded."""
        for item in items:
            if self.requested:
                self.cut_short = True
                return
            yield item

    def raise_together(self, runtime: Runtime, mine: bool) -> None:
        """End all ranks if any of them must end; all ranks must call it.

        Raises:
            Stopped: on every rank; ``requeue`` then tells whether any rank received USR1.
        """
        num_stopped, num_requeued = runtime.agree(mine, self.usr1)
        if num_stopped:
            self.requeue = num_requeued > 0
            raise Stopped

    def _note(self, number: int, _: FrameType | None) -> None:
        self.term |= number == signal.SIGTERM
        self.usr1 |= number == signal.SIGUSR1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python runs handlers only there
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # returned by signal()


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run, or an evaluation, early; raised on all ranks."""


def ask_for_requeue(folder: Path) -> None:
    """Ask the batch script to submit the run again."""
    (folder / REQUEUE_FILE).touch()


def forget_requeue(folder: Path) -> None:
    """Remove the request of an earlier job of this run."""
    (folder / REQUEUE_FILE).unlink(missing_ok=True)
