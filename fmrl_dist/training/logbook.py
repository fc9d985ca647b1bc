"""What a run writes down as it goes: ``metrics.jsonl``, TensorBoard, and a progress bar; on rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from fmrl_dist.base.files import write_atomically

PLAIN_LINE_EVERY_S = 10.0


class Logbook:
    """Scalars of a run, one flat object a line.

    Args:
        folder: the run's folder.
        step: where the run goes on; later lines, of work that is done again, are cut off.
        tensorboard: also write ``folder/tensorboard``.
        enabled: false on ranks other than 0, where nothing is written.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, enabled: bool) -> None:
        self._file, self._board = None, None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        write_atomically(path, "".join(kept_lines(path, step)).encode())
        self._file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it has ``step``, ``epoch`` and ``split``."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name not in ("step", "epoch", "split"):
                    self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def kept_lines(path: Path, step: int) -> list[str]:
    """Lines of a file of records, up to those of ``step``; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [f"{line}\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]


class Progress:
    """A bar with rate and time left on a terminal, else a plain line every ten seconds."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        self._total, self._first, self._enabled = total, done, enabled
        self._began = self._printed = time.monotonic()
        terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if terminal else None

    def update(self, done: int, facts: str) -> None:
        """``done`` steps are behind us; ``facts`` is shown beside them."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._enabled and (now - self._printed >= PLAIN_LINE_EVERY_S or done == self._total):
            self._printed = now
            left_s = (now - self._began) / max(done - self._first, 1) * (self._total - done)
            self.say(f"step {done}/{self._total}, at most {left_s / 60:.1f} min left, {facts}")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
