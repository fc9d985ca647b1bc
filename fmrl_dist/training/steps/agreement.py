"""What all processes must know before a step, in one exchange: the only one of the training loop per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.data.batches import Packed
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.distributed.signals import StopRequest


@dataclass(frozen=True)
class StepResult:
    """One optimiser step on this process; tensors stay on the device."""

    loss_sums: Tensor  # [S], summed over this process' positions
    grad_norm: Tensor  # [], over all processes' gradients, before clipping
    lr: float
    batches: Sequence[Packed]

    @property
    def num_not_finite(self) -> Tensor:
        """1 where a loss or the gradient is not finite, else 0; int64 []."""
        return (~(self.loss_sums.isfinite().all() & self.grad_norm.isfinite())).long()


@dataclass(frozen=True)
class Agreement:
    """Sums over all processes."""

    num_targets: int  # of the global batch
    num_damaged: int  # reports of blocks that could not be read; two processes may report the same one
    num_save_due: int  # 1 if rank 0's clock says that a checkpoint is due
    num_stop: int  # processes that received a signal to stop
    num_requeue: int  # processes that received USR1: the job asks to be requeued
    num_not_finite: int  # processes whose last step had a loss or gradient that is not finite


def agree(
    runtime: Runtime,
    batches: Sequence[Packed],
    damaged: Sequence[int],
    save_is_due: bool,
    stop: StopRequest,
    last_step: StepResult | None,
) -> Agreement:
    """Exchange what each process knows; all must call it together, before each step."""
    counts = runtime.agree(
        count_targets(batches),
        len(damaged),
        runtime.is_main and save_is_due,
        stop.requested,
        stop.usr1,
        0 if last_step is None else last_step.num_not_finite,
    )
    return Agreement(*counts)


def count_targets(batches: Sequence[Packed]) -> int:
    return sum(len(batch.targets) for batch in batches)


def stop_if_not_finite(runtime: Runtime, step: int, last_step: StepResult | None, num_not_finite: int) -> None:
    """End all processes if the last step was not finite on any; the message names the step and this process' users.

    No checkpoint has been saved since: saving follows the step's record, which reveals a loss that is not finite. Where
    the gradient is not finite, the optimiser has left the weights as they were
    (:meth:`fmrl_dist.training.engine.Engine.clip_and_step`).

    Args:
        runtime: this process and its group.
        step: the last step, counted from 1.
        last_step: its result.
        num_not_finite: the agreed count.

    Raises:
        UserError: on every process.
    """
    if not num_not_finite or last_step is None:
        return
    what, of_users = "another rank's loss", ""
    if not bool(last_step.loss_sums.isfinite().all()):
        users = [user for batch in last_step.batches for user in batch.users.tolist()]
        what, of_users = "loss", f"; users of the batch: {users[:8]}…"
    elif not bool(last_step.grad_norm.isfinite()):
        what = "gradient"
    raise UserError(
        f"step {step}, rank {runtime.rank}: {what} is not finite{of_users}. "
        "The last checkpoint is untouched; lower train.lr, or look for extreme features with shards.verify"
    )
