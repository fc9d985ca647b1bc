"""Send rows from every rank to every other, with a collective that both gloo and NCCL support.

W ranks. Every rank must call each of these functions, with tensors on the device of the process group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows [sum(sent), K]: the first ``sent[0]`` go to rank 0, …; returns the received rows, in rank order.

    Args:
        rows: with the same K and dtype on all ranks.
        sent: number of rows for each rank, W numbers.
        received: number of rows from each rank, equal to that rank's ``sent``.
    """
    result = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent))
    return result


def exchange_counts(sent: Sequence[int], device: torch.device) -> list[int]:
    """The numbers that each rank sends to this one, W of them."""
    return exchange_rows(torch.tensor(sent, device=device)[:, None], [1] * len(sent), [1] * len(sent))[:, 0].tolist()


def to_everyone(rows: Tensor) -> list[Tensor]:
    """Every rank's rows [·, K], in rank order; the number of rows may differ between ranks."""
    num_ranks = dist.get_world_size()
    own = [len(rows)] * num_ranks
    received = exchange_counts(own, rows.device)
    return list(exchange_rows(rows.repeat(num_ranks, 1), own, received).split(received))
