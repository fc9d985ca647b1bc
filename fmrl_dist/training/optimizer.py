"""AdamW's parameter groups and the learning rate of each step (paper section 5.3)."""

from __future__ import annotations

import math

import torch
from torch import nn

DECAYED = ("encoder.weight", "lru.B", "lru.C", "ffn.gate.weight", "ffn.w_1.weight", "ffn.w_2.weight")


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW that decays nested and projection matrices only; never Λ, γ, norms, biases, stand-ins or the id table."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith(DECAYED)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,  # one pass over the memory, which dominates the cost of a step
    )


def learning_rate(step: int, peak: float, warmup_steps: int, schedule_steps: int, min_ratio: float) -> float:
    """Rate of ``step`` (0-based): linear warm-up, then a half cosine down to ``min_ratio`` of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(schedule_steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
