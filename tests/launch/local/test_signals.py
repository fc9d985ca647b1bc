"""The handlers of this package's commands."""

from __future__ import annotations

import os
import signal

import pytest

from launch.local.signals import ENDING, EndedBySignal, ending_signals_raise, listening


@pytest.fixture(autouse=True)
def ignored_int() -> object:
    """As in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_raises_while_the_context_lasts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(EndedBySignal) as ended, ending_signals_raise():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_hup_stays_ignored_where_nohup_has_it_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals_raise(), listening(ENDING) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_listener_notes_the_last_signal() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with listening(ENDING) as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
    assert [signal.getsignal(number) for number in ENDING] == before
