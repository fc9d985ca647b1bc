"""The learning rate of each step (paper section 5.3): linear warm-up, then a half cosine."""

from __future__ import annotations

import math

from fmrl_dist.base.errors import require
from fmrl_dist.checkpoint.same_run import schedule_epochs
from fmrl_dist.training.run import Run


def step_learning_rate(run: Run, step: int) -> float:
    """Learning rate of ``step`` (0-based)."""
    train = run.config.train
    return learning_rate(step, train.lr, train.warmup_steps, schedule_steps(run), train.min_lr_ratio)


def learning_rate(step: int, peak: float, warmup_steps: int, schedule_steps: int, min_ratio: float) -> float:
    """Rate of ``step`` (0-based): linear warm-up, then a half cosine down to ``min_ratio`` of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(schedule_steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def schedule_steps(run: Run) -> int:
    """Where the cosine ends."""
    return schedule_epochs(run.config) * run.order.steps_per_epoch


def check_learning_rate(run: Run, first_step: int) -> None:
    """Refuse steps that would all be taken at a rate of 0, and announce where some would.

    Raises:
        UserError: the cosine has reached 0, and there is nothing but steps at that rate left.
    """
    end = schedule_steps(run)
    if run.config.train.min_lr_ratio > 0 or run.total_steps <= end:
        return
    require(
        first_step < end,
        f"the cosine of {schedule_epochs(run.config)} epochs (train.schedule_epochs) has ended at learning rate 0: "
        "more steps would change nothing; start a new run that goes further with --train.epochs, from these weights "
        f"with --train.init {run.folder}",
    )
    run.runtime.say(f"from step {end} on the learning rate is 0 (train.schedule_epochs, train.min_lr_ratio)")
