"""Which outputs a mixer learns from: those of all positions, of all prefixes, or of masked items.

    lru, attention, filter   each position's output predicts its target: nothing has seen it
    circular, bsarec         outputs have seen their future: each target is predicted from a prefix of its own
    bidirectional            likewise: a share of a window's items is masked, and filled in (BERT4Rec's Cloze)

P positions of the batch, T of them learned from, D width, N items of the windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.model.fmrlrec import FMRLRec

LAST_ALONE = 1 / 11  # share of windows that mask their last item alone: BERT4Rec's ten random copies to one such


@dataclass(frozen=True)
class Outputs:
    """Outputs to learn from."""

    z: Tensor  # [T, D]
    positions: Tensor | None = None  # int64 [T], sorted: whose targets they predict; None for all

    def of(self, targets: Tensor) -> Tensor:
        """Rows of the targets [P, …] that are predicted, [T, …]."""
        return targets if self.positions is None else targets[self.positions]


def outputs_to_learn(
    model: FMRLRec, inputs: Tensor, targets: Tensor, starts: Tensor, from_start: Tensor, mask_rate: float
) -> Outputs:
    """What the loss is made of.

    Args:
        model: in training mode.
        inputs: embeddings of the windows' inputs, [N, D].
        targets: embeddings of their targets, [P, D].
        starts, from_start: of the windows, as :meth:`FMRLRec.forward` takes them.
        mask_rate: share of a window's items that are masked.
    """
    if model.mask is None:
        read = model if model.mixing.has_step else model.of_prefixes
        return Outputs(read(inputs, starts, from_start))
    lengths = starts.diff() + from_start  # a window's targets are all its items
    is_masked = masked_items(lengths, mask_rate)
    return Outputs(model.of_masked(targets, F.pad(lengths.cumsum(0), (1, 0)), is_masked), is_masked.nonzero()[:, 0])


def masked_items(lengths: Tensor, rate: float) -> Tensor:
    """Items to mask, bool [P], for windows of ``lengths`` [B] items, drawn from torch's generator.

    Of most windows each item by itself at ``rate``, of the others the last one alone; and the last of those that would
    have none.
    """
    num_items = int(lengths.sum())
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=num_items)
    last_alone = torch.rand(len(lengths)).to(lengths.device) < LAST_ALONE
    drawn = (torch.rand(num_items).to(lengths.device) < rate) & ~last_alone[owner]
    has_none = torch.zeros_like(lengths).index_add_(0, owner, drawn.long()) == 0
    return drawn.index_fill(0, (lengths.cumsum(0) - 1)[has_none & (lengths > 0)], True)
