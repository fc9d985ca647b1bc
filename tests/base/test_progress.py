"""The progress bar on a terminal, and the line without one."""

from __future__ import annotations

import contextlib
import os
import pty
import termios

import pytest

from fmrl_dist.base.progress import Progress


def test_bar_on_a_terminal_shows_facts_and_time_left() -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with os.fdopen(writer, "w") as terminal, contextlib.redirect_stderr(terminal):
        progress = Progress("step", total=10, done=2)
        progress.update(7, "loss 1.2500, 900 tokens/s, data wait 3.0%")
        progress.update(10, "loss 1.0000, 900 tokens/s, data wait 2.0%")
        progress.close()
    shown = read_to_the_end(reader)
    assert "2/10" in shown, "a resumed run starts where it stopped"
    assert "10/10" in shown
    assert "loss 1.0000, 900 tokens/s, data wait 2.0%" in shown
    assert "00:00<" in shown


def read_to_the_end(reader: int) -> str:
    """All output to a terminal whose other end is closed; the kernel may deliver it in pieces."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: no more output
        while piece := os.read(reader, 1 << 16):
            pieces.append(piece)
    os.close(reader)
    return b"".join(pieces).decode()


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("item", total=4000, done=1000, name="text", line_every_s=0)
    progress.advance(1000)
    progress.update(4000, "2 unreadable")
    progress.close()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("text: 2,000 of 4,000 items, ") and first.endswith(" left")
    assert last.startswith("text: 4,000 of 4,000 items, ") and last.endswith(" 00:00 left, 2 unreadable")


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("step", total=1, enabled=False)
    progress.update(1)
    progress.say("done")
    assert capsys.readouterr().out == ""
