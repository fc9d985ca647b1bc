"""The id table under a sampled softmax: every rank holds it, and a step reads and updates just the batch's rows.

W ranks, n distinct items of one rank's batch (inputs, targets, negatives), w width of the table. The ranks exchange
ids and gradients of their rows, add them up in rank order, and all make the same update. Time and traffic of a step,
W·n·(w + 2) numbers received by each rank, do not grow with the catalogue.

AdamW is applied to the rows of the global batch alone, as ``torch.optim.SparseAdam`` does: moments and weights of all
other rows stay as they are, and decay, too, is of these rows. Bias correction counts all steps. :func:`update_rows` in
terms of a whole table is its specification (``tests/training/test_id_table.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.config.train_section import TrainConfig
from fmrl_dist.distributed.collectives import to_everyone
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.id_table.rows import IdDropout, attached, detach_table
from fmrl_dist.training.optimizer import id_learning_rates

Rows = tuple[Tensor, Tensor]  # int64 [n], sorted and distinct, and [n, w]


class ReplicatedIdTable:
    """A table that every rank holds, with AdamW for the rows of each global batch.

    Args:
        model: its table leaves it.
        train: the optimiser's settings.
        dropout: of rows.
        cold: bool [V] on the CPU, items whose rows stay as they are.
        runtime: this process and its group.
    """

    def __init__(self, model: FMRLRec, train: TrainConfig, dropout: IdDropout, cold: Tensor, runtime: Runtime) -> None:
        self._encoder, self._train, self._dropout, self._runtime = model.encoder, train, dropout, runtime
        self._table = detach_table(model).to(runtime.device, copy=True)
        if runtime.world_size > 1:
            dist.broadcast(self._table, 0)  # as data parallelism does with parameters
        self._cold = cold.to(self._table.device)
        self._moments = torch.zeros_like(self._table), torch.zeros_like(self._table)
        self._num_steps = torch.zeros((), device=self._table.device)
        self._factors = id_learning_rates(
            model.sizes, self._table.shape[1], train.id_lr_factor, train.id_lr_power_in_force
        ).to(self._table.device)
        self._lr = torch.zeros_like(self._factors)
        self._read: list[Rows] = []  # by the micro-batches of this step; the rows are leaves with gradients
        self._gradient: Rows | None = None

    def begin_step(self, step: int) -> None:
        self._dropout.begin_step(step)

    def of_batch(self, ids: Tensor) -> Tensor:
        rows = self._table[ids].requires_grad_()
        self._read.append((ids, rows))
        return self._dropout(rows, ids)

    def of_scored(self) -> Tensor:
        raise AssertionError("a sampled softmax scores no catalogue")

    @property
    def num_weights(self) -> int:
        return self._table.numel()

    def set_learning_rate(self, lr: float) -> None:
        self._lr = lr * self._factors

    def gradient_norm(self) -> Tensor:
        own = [(ids, torch.zeros_like(rows) if rows.grad is None else rows.grad) for ids, rows in self._read]
        self._read = []
        ids, gradient = add_up(own)
        num_ranks = self._runtime.world_size
        if num_ranks > 1:
            of_all = zip(to_everyone(ids[:, None]), to_everyone(gradient), strict=True)
            ids, gradient = add_up([(ids[:, 0], rows) for ids, rows in of_all])
        gradient = (gradient / num_ranks).masked_fill(self._cold[ids][:, None], 0.0)
        self._gradient = ids, gradient
        return torch.linalg.vector_norm(gradient)

    def step(self, factor: Tensor, finite: Tensor) -> None:
        assert self._gradient is not None, "gradient_norm comes first"
        (ids, gradient), self._gradient = self._gradient, None
        self._num_steps += finite
        tensors = self._table, *self._moments
        before = [tensor[ids] for tensor in tensors]
        after = update_rows(before, gradient * factor, self._num_steps, self._lr, self._train)
        for tensor, old, new in zip(tensors, before, after, strict=True):
            tensor[ids] = torch.where(finite, new, old)

    def evaluated(self) -> AbstractContextManager[None]:
        return attached(self._encoder, self._table)

    def weights(self) -> Tensor | None:
        return self._table if self._runtime.is_main else None

    def moments(self) -> dict[str, Tensor]:
        if not self._runtime.is_main:
            return {}
        return dict(zip(("step", "exp_avg", "exp_avg_sq"), (self._num_steps, *self._moments), strict=True))

    def restore(self, moments: dict[str, Tensor]) -> None:
        self._num_steps.copy_(moments["step"])
        for own, name in zip(self._moments, ("exp_avg", "exp_avg_sq"), strict=True):
            own.copy_(moments[name])


def add_up(parts: list[Rows]) -> Rows:
    """Sum of rows by their ids, in the order of the parts: no atomic additions, so two runs give the same bits."""
    ids = torch.cat([part for part, _ in parts]).unique()
    total = parts[0][1].new_zeros(len(ids), parts[0][1].shape[1])
    for part, rows in parts:
        total[torch.searchsorted(ids, part)] += rows  # distinct in a part
    return ids, total


def update_rows(
    rows: list[Tensor], gradient: Tensor, num_steps: Tensor, lr: Tensor, train: TrainConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and both moments [n, w] after a step of AdamW.

    Args:
        rows: weights, first and second moments before it.
        gradient: [n, w].
        num_steps: [], including this one.
        lr: of this step by channel, [w].
        train: AdamW's settings.
    """
    weights, mean, square = rows
    steps = num_steps.double()
    mean = train.beta1 * mean + (1 - train.beta1) * gradient
    square = train.beta2 * square + (1 - train.beta2) * gradient**2
    corrected = square.sqrt() / (1 - train.beta2**steps).sqrt().to(square.dtype) + train.eps
    step_size = (lr / (1 - train.beta1**steps)).to(mean.dtype)
    return weights * (1 - lr * train.id_weight_decay) - step_size * mean / corrected, mean, square
