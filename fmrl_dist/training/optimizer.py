"""AdamW's parameter groups (paper section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmrl_dist.model.nested import chunks

ID_TABLE = "encoder.id_table"
LR_FACTOR = "lr_factor"  # key of a group: its learning rate as a multiple of the schedule's
# Code tables are not decayed: a step looks up some of the rows, and would shrink the others.
DECAYED = (
    *("encoder.weight", "encoder.gate", "encoder.gate_noise"),
    *("lru.B", "lru.C"),
    *("attention.qkv", "attention.out", "bidirectional.qkv", "bidirectional.out"),
    *("ffn.gate.weight", "ffn.w_1.weight", "ffn.w_2.weight"),
)


def build_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    id_lr_factor: float = 1.0,
    id_weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW that decays nested matrices and the item encoder's.

    It never decays Λ, γ, filters, norms, biases, stand-ins and code tables.

    An id table that is a parameter of the model has a group of its own, with its own decay and learning rate.
    """
    kinds: dict[str, list[nn.Parameter]] = {"decayed": [], "kept": [], "ids": []}
    for name, parameter in model.named_parameters():
        kinds["ids" if name == ID_TABLE else "decayed" if name.endswith(DECAYED) else "kept"].append(parameter)
    groups = [
        {"params": kinds["decayed"], "weight_decay": weight_decay, LR_FACTOR: 1.0},
        {"params": kinds["kept"], "weight_decay": 0.0, LR_FACTOR: 1.0},
        {"params": kinds["ids"], "weight_decay": id_weight_decay, LR_FACTOR: id_lr_factor},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,  # one pass over the memory, which dominates the cost of a step
    )


def id_learning_rates(sizes: Sequence[int], width: int, factor: float, power: float) -> Tensor:
    """Learning rates of an id table's channels, as multiples of the schedule's, float32 [width].

    Small sizes learn from few channels, which are far from overfitting: the channels that size m adds to the next
    smaller one have factor · max(1, D / 2m)^power (not in the paper).

    Args:
        sizes: Matryoshka sizes m_1 < … < m_S; the last is D.
        width: channels of the table, one of them.
        factor: of the last channels.
        power: how fast the rates grow in sizes below D / 2; 0: not at all.
    """
    widths = torch.tensor([end - begin for begin, end in chunks(sizes)])
    rates = torch.tensor([factor * max(1.0, sizes[-1] / (2 * size)) ** power for size in sizes])
    return rates.repeat_interleave(widths)[:width]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, each a multiple of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_FACTOR]
