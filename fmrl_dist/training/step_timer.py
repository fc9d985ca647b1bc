"""What this process' time goes to between two log records: the one clock that metrics and the rank monitor read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

DATA_WAIT, FORWARD, MEETING = "data_wait_s", "forward_s", "meeting_s"


class StepTimer:
    """Seconds since the last record, in all and by what they went to.

    Args:
        module: whose forward passes are timed; on a GPU only their launch is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin_forward()),
            module.register_forward_hook(lambda *_: self._end_forward()),
        ]
        self.restart()

    def restart(self) -> None:
        """Start anew, without what has passed since the last record: evaluating and saving."""
        self.seconds = dict.fromkeys((DATA_WAIT, FORWARD, MEETING), 0.0)
        self.steps = 0
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    @contextmanager
    def timing(self, column: str) -> Iterator[None]:
        """Count the context's duration as ``DATA_WAIT`` or ``MEETING``."""
        began = time.monotonic()
        yield
        self.seconds[column] += time.monotonic() - began

    def close(self) -> None:
        """Time the module no longer."""
        for hook in self._hooks:
            hook.remove()

    def _begin_forward(self) -> None:
        self._forward_began = time.monotonic()

    def _end_forward(self) -> None:
        self.seconds[FORWARD] += time.monotonic() - self._forward_began
