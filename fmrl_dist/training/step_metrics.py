"""Losses, rate and data wait between two log records; sums stay on the device until one is asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from fmrl_dist.distributed.processes import Runtime


@dataclass
class StepMetrics:
    """What has passed since the last record."""

    sizes: tuple[int, ...]
    size_weights: tuple[float, ...]  # of the sizes' losses in the loss
    runtime: Runtime
    _losses: Tensor | None = None
    _targets: int = 0
    _wait_s: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def waiting(self) -> StepMetrics:
        """A context whose duration counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._wait_began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._wait_s += time.monotonic() - self._wait_began

    def add(self, loss_sums: Tensor, num_targets: int) -> None:
        """One step: this rank's loss sums [S], the global number of targets."""
        self._losses = loss_sums if self._losses is None else self._losses + loss_sums
        self._targets += num_targets

    def record(self) -> dict[str, float]:
        """Mean losses over all ranks since the last record, and start anew. Called by every rank at once."""
        assert self._losses is not None
        losses = (self.runtime.sum(self._losses) / max(self._targets, 1)).tolist()
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        weighted = sum(weight * value for weight, value in zip(self.size_weights, losses, strict=True))
        result = {"loss": weighted / sum(self.size_weights)}
        result |= {f"loss@{size}": value for size, value in zip(self.sizes, losses, strict=True)}
        result["tokens_per_s"] = self._targets / elapsed_s
        result["data_wait_share"] = self._wait_s / elapsed_s
        self._losses, self._targets = None, 0
        self.restart_clock()
        return result

    def restart_clock(self) -> None:
        """Leave out what has passed since the last record: evaluating and saving."""
        self._wait_s, self._began = 0.0, time.monotonic()

    @staticmethod
    def line(record: dict[str, float]) -> str:
        return (
            f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, "
            f"data wait {record['data_wait_share']:.1%}"
        )
