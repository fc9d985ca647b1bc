"""The progress bar on a terminal; what a run writes otherwise is tested where it is run (test_training)."""

from __future__ import annotations

import contextlib
import os
import pty
import termios
from pathlib import Path

from fmrl_dist.training.logbook import Logbook, Progress


def test_bar_on_a_terminal_shows_facts_and_time_left() -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with os.fdopen(writer, "w") as terminal, contextlib.redirect_stderr(terminal):
        progress = Progress(total=10, done=2, enabled=True)
        progress.update(7, "loss 1.2500, 900 tokens/s, data wait 3.0%")
        progress.update(10, "loss 1.0000, 900 tokens/s, data wait 2.0%")
        progress.close()
    shown = read_to_the_end(reader)
    assert "2/10" in shown, "a resumed run starts where it was"
    assert "10/10" in shown
    assert "loss 1.0000, 900 tokens/s, data wait 2.0%" in shown
    assert "00:00<" in shown


def read_to_the_end(reader: int) -> str:
    """What a terminal was shown whose other end is closed; the kernel may hand it over piece by piece."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: nothing will come any more
        while piece := os.read(reader, 1 << 16):
            pieces.append(piece)
    os.close(reader)
    return b"".join(pieces).decode()


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with Logbook(tmp_path, step=0, tensorboard=True, enabled=False) as logbook:
        logbook.write({"step": 1, "epoch": 0, "split": "train", "loss": 1.0})
    assert list(tmp_path.iterdir()) == []
