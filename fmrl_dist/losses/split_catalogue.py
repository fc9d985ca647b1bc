"""The full softmax with the catalogue split over the ranks: each scores its own items for the positions of all ranks.

W ranks, N positions of this rank, P of all together, V items, v of them this rank's, D width, S sizes. One process'
:func:`fmrl_dist.losses.log_sum_exp.catalogue_log_sum_exp` is the specification; the result is the same, to rounding:

    1. outputs       every rank's z goes to all ranks                           [N, D]  →  [P, D]
    2. partial sums  log-sum-exp over the rank's items, by the one-process operator      →  [S, P]
    3. return        each partial goes to the rank whose position it is          [P, S]  →  [W, N, S]
    4. whole         log-sum-exp of the W partials                                       →  [S, N]

With distillation, what each rank's items teach travels with the partials: 2S + 1 numbers instead of S.

Backward, each exchange runs in the other direction. Step 4 gives each partial its share of the softmax, step 2 the
gradients of projection and id table from the rank's items, and step 1 sums the gradients of an output over all ranks'
items.

A rank's gradient of the projection comes from its items, for the positions of all ranks. The training loop multiplies
losses by W and data parallelism averages gradients over the ranks, so the result is the sum over all ranks' items and
positions. The gradient of its items' rows of an id table comes from here alone.

Cost: a rank projects, and holds, a W-th of the catalogue instead of all of it. A step sends (W - 1)·P·(D + S) numbers
forward and as many backward, over all ranks. The exchange is one ``all_to_all``, which gloo and NCCL have, for ranks
with any number of positions; sums are in rank order, so two runs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmrl_dist.distributed.collectives import exchange_counts, exchange_rows
from fmrl_dist.losses.distillation import Normalizers, merge
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.log_sum_exp import catalogue_log_sum_exp
from fmrl_dist.losses.settings import LossSettings


@dataclass(frozen=True)
class CatalogueSlice:
    """The consecutive items that this rank scores, possibly no items. Every item belongs to exactly one rank."""

    columns: RowMatrix  # [v, C], what the projection maps
    begin: int  # the first of them in the catalogue


def split_log_sum_exp(
    z: Tensor, part: CatalogueSlice, weight: Tensor, table: Tensor | None, settings: LossSettings
) -> Normalizers:
    """Log-sum-exp over all ranks' items for this rank's positions. Every rank must call it, forward and backward.

    Args:
        z: outputs [N, D] of this rank, float32 or float64, the same dtype on all; N may be 0 and differ.
        part: this rank's items.
        weight: W_proj [D, C], the same on all ranks.
        table: id table [v, w] of this rank's items; None for nothing.
        settings: as in :func:`fmrl_dist.losses.log_sum_exp.nested_log_sum_exp`.

    Returns:
        Differentiable in z, weight and table; the gradient of weight is this rank's summand.
    """
    num_ranks, own = dist.get_world_size(), [len(z)] * dist.get_world_size()
    counts = exchange_counts(own, z.device)
    gathered_z = _Exchange.apply(z.repeat(num_ranks, 1), own, counts)
    partial = catalogue_log_sum_exp(gathered_z, part.columns, weight, table, settings)
    if partial.teacher is None or partial.taught is None:
        return merge(Normalizers(_returned(partial.sizes, counts, own)))
    everything = torch.cat((partial.sizes, partial.taught, partial.teacher[None]))
    sizes, taught, teacher = _returned(everything, counts, own).split((len(partial.sizes), len(partial.taught), 1), 1)
    return merge(Normalizers(sizes, teacher[:, 0].detach(), taught))


def _returned(partials_KP: Tensor, counts: list[int], own: list[int]) -> Tensor:
    """Numbers [K, P] of this rank's items for all positions → those of every rank's items for its own, [W, K, N]."""
    rows: Tensor = _Exchange.apply(partials_KP.T, counts, own)  # [W·N, K]
    return rows.view(len(own), own[0], len(partials_KP)).transpose(1, 2)


def exchanged_bytes(
    num_positions: int, num_ranks: int, width: int, num_sizes: int, itemsize: int = 4, distilled: bool = False
) -> int:
    """Bytes that all ranks together send in one step, forward and backward, for P positions (module's docstring)."""
    partials = 2 * num_sizes + 1 if distilled else num_sizes
    return 2 * (num_ranks - 1) * num_positions * (width + partials) * itemsize


class _Exchange(torch.autograd.Function):
    """Rows [·, K]: the first ``sent[0]`` go to rank 0, the next to rank 1, …; back come ``received[r]`` from rank r."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.counts = sent, received
        return exchange_rows(rows, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.counts
        return exchange_rows(grad, received, sent), None, None
