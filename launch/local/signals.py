"""How the commands of this package react to signals, whatever signal dispositions they have inherited.

A shell that starts a command in the background lets it ignore INT, and so do all processes that the command starts. So
a command that must react to INT, TERM or HUP (its terminal is gone) installs its own handlers, and never relies on INT
to end another process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class EndedBySignal(SystemExit):
    """A signal ends the command, with the exit code that a shell shows for it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class SignalListener:
    """The last of some signals that this process has received; see :func:`listening`."""

    received: signal.Signals | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler of the signals."""
        self.received = signal.Signals(number)


@contextmanager
def listening(numbers: Sequence[signal.Signals]) -> Iterator[SignalListener]:
    """Note signals, instead of ending by them, while the context lasts."""
    listener = SignalListener()
    with _handling(numbers, listener.note):
        yield listener


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Raise :class:`EndedBySignal` when one of :data:`ENDING` arrives while the context lasts."""

    def raise_it(number: int, _: FrameType | None) -> None:
        raise EndedBySignal(number)

    with _handling(ENDING, raise_it):
        yield


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    kept = [number for number in numbers if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers if number not in kept}  # as nohup promises
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
