"""Checkpoints are written behind the training's back, one at a time; what is written is a snapshot of the moment."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import TrainState, save_checkpoint


class CheckpointWriter:
    """Saves checkpoints of a run in a thread of its own. Use it as a context: it waits for the last one.

    Args:
        folder: the run's ``checkpoints``.
        facts: recorded in each.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], keep: int) -> None:
        self._folder, self._facts, self._keep = folder, facts, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, state: TrainState, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Copy everything, and begin to write it once the one before is written.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        model, optimizer = ({name: _copy(tensor) for name, tensor in part.items()} for part in (model, optimizer))
        state = replace(state, skipped_blocks=list(state.skipped_blocks))
        self._pending = self._thread.submit(
            save_checkpoint, self._folder, state, model, optimizer, self._facts, self._keep
        )

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            raise UserError(
                f"a checkpoint cannot be written to {self._folder} ({error.strerror or error}); the one before is "
                "untouched: make room, then go on by --resume auto"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)  # a run that fails still ends with what it had begun to save
        if error is None:
            self.wait()


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, and not the tensor that training goes on to change."""
    return tensor.detach().to("cpu", copy=True).contiguous()
