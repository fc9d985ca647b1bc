"""Rows that go from every rank to every other, in one collective that gloo and NCCL both have.

W ranks. Every rank has to call each of these, with tensors on the device of the process group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows [sum(sent), K]: the first ``sent[0]`` go to rank 0, the next to rank 1, …; those that came, in rank order.

    Args:
        rows: of one K and dtype on all ranks.
        sent: number for each rank, W of them.
        received: number from each rank, what that one says in ``sent``.
    """
    result = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent))
    return result


def exchange_counts(sent: Sequence[int], device: torch.device) -> list[int]:
    """What each rank says for this one, W numbers."""
    return exchange_rows(torch.tensor(sent, device=device)[:, None], [1] * len(sent), [1] * len(sent))[:, 0].tolist()


def to_everyone(rows: Tensor) -> list[Tensor]:
    """Every rank's rows [·, K], in rank order; each rank may have another number of them."""
    num_ranks = dist.get_world_size()
    own = [len(rows)] * num_ranks
    received = exchange_counts(own, rows.device)
    return list(exchange_rows(rows.repeat(num_ranks, 1), own, received).split(received))
