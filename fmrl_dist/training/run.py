"""The fixed parts of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmrl_dist.config.sections import Config
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a training run."""

    config: Config
    runtime: Runtime
    folder: Path
    store: Store
    order: Order
    total_steps: int

    @property
    def inline(self) -> bool:
        """Whether item features are inline in the store's blocks; else they are in a table."""
        return self.config.store.feature_mode == "inline"

    @property
    def evaluate_every_steps(self) -> int:
        return self.config.eval.every_steps or self.order.steps_per_epoch
