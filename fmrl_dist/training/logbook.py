"""A run's log: ``metrics.jsonl`` and TensorBoard, on rank 0 only."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fmrl_dist.base.files import write_atomically


class Logbook:
    """Scalars of a run, one flat object per line.

    Args:
        folder: the run's folder.
        step: where the run resumes; later lines are removed, since their steps are repeated.
        repeats_validation: the validation of this very step is repeated too.
        tensorboard: also write ``folder/tensorboard``.
        enabled: false on ranks other than 0, which write nothing.
    """

    def __init__(
        self, folder: Path, step: int, tensorboard: bool, enabled: bool, repeats_validation: bool = False
    ) -> None:
        self._file, self._board = None, None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        write_atomically(path, "".join(kept_lines(path, step, repeats_validation)).encode())
        self._file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _leave_failed_writes_to_the_main_thread
            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which has ``step``, ``epoch`` and ``split``."""
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
        if self._board is not None and value is None:
            self._board.flush()  # raises what could not be written
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def _leave_failed_writes_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback where TensorBoard's thread cannot write: the next scalar raises it in the main thread."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


def kept_lines(path: Path, step: int, repeats_validation: bool = False) -> list[str]:
    """The lines of a log up to ``step``, perhaps without its validation; empty if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [(line, json.loads(line)) for line in lines if line.endswith("}")]  # the last one may be half-written
    repeated = (step, "valid") if repeats_validation else None
    return [
        f"{line}\n"
        for line, record in records
        if record["step"] <= step and (record["step"], record.get("split")) != repeated
    ]
