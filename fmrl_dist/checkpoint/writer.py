"""Write checkpoints in the background, one at a time; each is a snapshot of the moment it was requested."""

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
    """Saves checkpoints of a run in a background thread. Use it as a context manager: it waits for the last one.

    Args:
        folder: the run's ``checkpoints``.
        facts: recorded in each checkpoint.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], keep: int) -> None:
        self._folder, self._facts, self._keep = folder, facts, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, state: TrainState, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Copy everything, and start writing it once the previous checkpoint is written.

        Raises:
            UserError: the previous checkpoint could not be written.
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
                f"a checkpoint cannot be written to {self._folder} ({error.strerror or error}); the previous one is "
                "intact: free some space, then resume with --resume auto"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)  # a failing run still completes the save in progress
        if error is None:
            self.wait()


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, unaffected by further training."""
    return tensor.detach().to("cpu", copy=True).contiguous()
