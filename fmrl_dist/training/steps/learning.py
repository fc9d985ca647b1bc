"""One optimiser step: the losses of every size, weighted (eq. 14), their gradient, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.config.sections import Config
from fmrl_dist.data.batches import Packed
from fmrl_dist.training.learner import Learner
from fmrl_dist.training.run import Run
from fmrl_dist.training.steps.agreement import StepResult
from fmrl_dist.training.steps.schedule import step_learning_rate


def learn(run: Run, learner: Learner, step: int, batches: Sequence[Packed], num_targets: int) -> StepResult:
    """One optimiser step, on the micro-batches of this process.

    Args:
        run: its fixed parts.
        learner: what is changed.
        step: its number, from 0.
        batches: of this process.
        num_targets: of all processes' batches.
    """
    runtime, engine = run.runtime, learner.engine
    seed_dropout(run.config.train.seed, step, runtime.rank)
    learner.module.begin_step(step)
    weights_S = torch.tensor(size_weights(run.config), device=runtime.device)
    loss_of = partial(mean_loss, weights_S, runtime.world_size, num_targets)
    loss_sums = torch.zeros_like(weights_S)
    for number, batch in enumerate(batches, 1):
        loss_sums += engine.add_gradients(batch.to(runtime.device), loss_of, last=number == len(batches))
    lr = step_learning_rate(run, step)
    engine.set_learning_rate(lr)
    return StepResult(loss_sums, engine.clip_and_step(), lr, batches)


def mean_loss(weights_S: Tensor, world_size: int, num_targets: int, loss_sums: Tensor) -> Tensor:
    """The loss to differentiate (eq. 14), []: engines average over ranks, so it is multiplied by their number."""
    return (weights_S @ loss_sums) / weights_S.sum() * world_size / max(num_targets, 1)


def size_weights(config: Config) -> tuple[float, ...]:
    """c_m of each size's loss."""
    return config.loss.size_weights or (1.0,) * len(config.model.sizes)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed a step's dropout from (seed, step, rank), so that checkpoints need no generator state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))
