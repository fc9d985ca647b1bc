"""A run's log: ``metrics.jsonl`` and TensorBoard, on rank 0 only."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.json_text import read_objects
from fmrl_dist.base.yaml_text import shown

MEND = "restore it from a copy, or move it away to log anew from here"


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
    """The lines of a log up to ``step``, perhaps without its validation; empty if there is no file.

    Raises:
        UserError: a line is not a record with a step.
    """
    repeated = (step, "valid") if repeats_validation else None
    kept = []
    for line, record in read_objects(path, MEND) if path.exists() else ():
        own = record.get("step")
        if not isinstance(own, int):
            raise UserError(f"{path} has a line with step {shown(own)}; expected a number: {MEND}")
        if own <= step and (own, record.get("split")) != repeated:
            kept.append(f"{line}\n")
    return kept
