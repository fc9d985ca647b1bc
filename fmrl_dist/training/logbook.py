"""A run's log: ``metrics.jsonl`` and TensorBoard, on rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import write_atomically

MEND = "repair it, or move it away and lose these figures, then resume with --resume auto"


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
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def kept_lines(path: Path, step: int, repeats_validation: bool = False) -> list[str]:
    """The lines of a log up to ``step``, perhaps without its validation; empty if there is no file.

    Raises:
        UserError: a line other than the last, which may be half-written, is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {MEND}") from None
    kept, repeated = [], (step, "valid") if repeats_validation else None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            place = int(record["step"]), record.get("split")
        except (ValueError, LookupError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not a record of a step; {MEND}") from None
        if place[0] <= step and place != repeated:
            kept.append(f"{line}\n")
    return kept
