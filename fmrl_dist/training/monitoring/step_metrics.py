"""Losses, throughput and data wait between two log records; sums stay on the device until a record is made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.training.monitoring.step_timer import DATA_WAIT, StepTimer


@dataclass
class StepMetrics:
    """Sums since the last record."""

    sizes: tuple[int, ...]
    size_weights: tuple[float, ...]  # of the sizes' losses
    runtime: Runtime
    timer: StepTimer  # restarted by the training loop after each record
    _losses: Tensor | None = None
    _targets: int = 0

    def add(self, loss_sums: Tensor, num_targets: int) -> None:
        """Add one step: this process' loss sums [S], the global number of targets."""
        self._losses = loss_sums if self._losses is None else self._losses + loss_sums
        self._targets += num_targets

    def record(self) -> dict[str, float]:
        """Mean losses over all processes since the last record. All processes must call it together."""
        assert self._losses is not None
        losses = (self.runtime.sum(self._losses) / max(self._targets, 1)).tolist()
        weighted = sum(weight * value for weight, value in zip(self.size_weights, losses, strict=True))
        result = {"loss": weighted / sum(self.size_weights)}
        result |= {f"loss@{size}": value for size, value in zip(self.sizes, losses, strict=True)}
        result["tokens_per_s"] = self._targets / self.timer.elapsed_s
        result["data_wait_share"] = self.timer.seconds[DATA_WAIT] / self.timer.elapsed_s
        self._losses, self._targets = None, 0
        return result

    @staticmethod
    def line(record: dict[str, float]) -> str:
        return (
            f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, "
            f"data wait {record['data_wait_share']:.1%}"
        )
