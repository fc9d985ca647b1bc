"""How this process spends its time between two log records; both the metrics and the rank monitor use this timer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

DATA_WAIT, FORWARD, MEETING = "data_wait_s", "forward_s", "meeting_s"


class StepTimer:
    """Seconds since the last record, in total and per activity.

    Args:
        module: its forward passes are timed; on a GPU only their launch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self._begin_forward()),
            module.register_forward_hook(lambda *_: self._end_forward()),
        ]
        self.restart()

    def restart(self) -> None:
        """Reset all times, so that evaluating and saving after a record do not count."""
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
        """Stop timing the module."""
        for hook in self._hooks:
            hook.remove()

    def _begin_forward(self) -> None:
        self._forward_began = time.monotonic()

    def _end_forward(self) -> None:
        self.seconds[FORWARD] += time.monotonic() - self._forward_began
