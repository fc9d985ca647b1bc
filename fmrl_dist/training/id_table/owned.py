"""The id table under a split catalogue: each rank holds and updates the rows of the items that it scores.

W ranks, V items, v of them this rank's, n distinct inputs and targets of one rank's batch, w width of the table. The
softmax over a rank's items uses its own rows. Those of the batch come from their owners:

    1. ids       each rank asks the owners for the rows of its batch      [n]
    2. rows      they answer                                              [n, w]
    3. backward  the gradients of these rows return, after the step's last micro-batch; the owner adds them up in rank
                 order to what its own items have

No rank holds more than V/W rows, with their gradient and moments; a step exchanges rows of the batch only. Every row
has a gradient in every step, so this is AdamW as for the whole table, and a run may go on with either.

At the start, and for a checkpoint, the whole table passes through a CPU's memory: every rank draws or reads it and
keeps its share, and rank 0 collects it to write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fmrl_dist.config.train_section import TrainConfig
from fmrl_dist.distributed.collectives import exchange_counts, exchange_rows
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.evaluation.split_catalogue import tile_bounds
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.id_table.rows import IdDropout, attached, detach_table

COLLECTED_AT_ONCE = 2**16  # rows of each rank


@dataclass(frozen=True)
class Fetched:
    """Rows that a batch of this rank has fetched, and those that it has lent."""

    rows: Tensor  # [n, w]
    asked: list[int]  # of each rank
    lent: Tensor  # int64, own rows that others fetched, in rank order
    answered: list[int]  # to each rank


class OwnedIdTable:
    """The rows of this rank's items and their AdamW.

    Args:
        model: on the CPU, with the whole table, which leaves it.
        bounds: first item of each rank, then V.
        train: the optimiser's settings.
        dropout: of rows.
        cold: bool [V] on the CPU, items whose rows stay as they are.
        runtime: this process and its group.
    """

    def __init__(
        self,
        model: FMRLRec,
        bounds: Sequence[int],
        train: TrainConfig,
        dropout: IdDropout,
        cold: Tensor,
        runtime: Runtime,
    ) -> None:
        self._encoder, self._dropout, self._runtime = model.encoder, dropout, runtime
        self._bounds, self._train = list(bounds), train
        begin, end = bounds[runtime.rank], bounds[runtime.rank + 1]
        device = runtime.device
        self._rows = nn.Parameter(detach_table(model)[begin:end].to(device, copy=True))
        self._rows.grad = torch.zeros_like(self._rows)
        self._items = torch.arange(begin, end, device=device)
        self._cold = cold[begin:end].nonzero()[:, 0].to(device)
        self._optimizer = torch.optim.AdamW(
            [self._rows],
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            weight_decay=train.id_weight_decay,
            fused=True,
        )
        self._optimizer.state[self._rows] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(self._rows, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(self._rows, requires_grad=False),
        }
        self._fetched: list[Fetched] = []  # by the micro-batches of this step

    def begin_step(self, step: int) -> None:
        self._dropout.begin_step(step)

    def of_batch(self, ids: Tensor) -> Tensor:
        self._fetched.append(self._fetch(ids))
        return self._dropout(self._fetched[-1].rows.requires_grad_(), ids)

    def of_scored(self) -> Tensor:
        return self._dropout(self._rows, self._items)

    @property
    def num_weights(self) -> int:
        return self._bounds[-1] * self._rows.shape[1]

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self._train.id_lr_factor

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        gradient = self._rows.grad
        assert gradient is not None
        for fetched in self._fetched:
            rows = fetched.rows
            own = torch.zeros_like(rows) if rows.grad is None else rows.grad
            returned = exchange_rows(own, fetched.asked, fetched.answered)
            parts = zip(fetched.lent.split(fetched.answered), returned.split(fetched.answered), strict=True)
            for items, part in parts:
                gradient[items] += part  # distinct in a part
        self._fetched = []
        gradient /= self._runtime.world_size
        gradient.index_fill_(0, self._cold, 0.0)
        norms = self._runtime.gather(torch.linalg.vector_norm(gradient)[None])
        return torch.linalg.vector_norm(norms)

    def step(self, factor: Tensor, finite: Tensor) -> None:
        assert self._rows.grad is not None
        self._rows.grad *= factor
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # its kernel then changes nothing
        self._optimizer.step()
        self._rows.grad.zero_()

    def evaluated(self) -> AbstractContextManager[None]:
        bounds = tile_bounds(self._bounds[-1], self._runtime.world_size)  # an evaluation shares items by whole tiles
        begin, end = bounds[self._runtime.rank : self._runtime.rank + 2]
        rows = self._fetch(torch.arange(begin, end, device=self._items.device)).rows
        return attached(self._encoder, rows, begin)

    def weights(self) -> Tensor | None:
        return self._collect(self._rows.detach())

    def moments(self) -> dict[str, Tensor]:
        found = {name: self._collect(tensor) for name, tensor in self._optimizer.state[self._rows].items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, moments: dict[str, Tensor]) -> None:
        begin, end = self._bounds[self._runtime.rank : self._runtime.rank + 2]
        for name, own in self._optimizer.state[self._rows].items():
            own.copy_(moments[name][begin:end] if own.dim() else moments[name])

    def _fetch(self, ids: Tensor) -> Fetched:
        """Rows of sorted items from the ranks that own them."""
        edges = torch.searchsorted(ids, torch.tensor(self._bounds, device=ids.device))
        asked = edges.diff().tolist()
        answered = exchange_counts(asked, ids.device)
        lent = exchange_rows(ids[:, None], asked, answered)[:, 0] - self._bounds[self._runtime.rank]
        return Fetched(exchange_rows(self._rows.detach()[lent], answered, asked), asked, lent, answered)

    def _collect(self, own: Tensor) -> Tensor | None:
        """All ranks' rows on rank 0, in its CPU's memory; a number, which all have, from rank 0 alone."""
        is_main, lengths = self._runtime.is_main, [end - begin for begin, end in pairwise(self._bounds)]
        if not own.dim():
            return own if is_main else None
        whole = torch.empty(self._bounds[-1] if is_main else 0, own.shape[1])
        for first in range(0, max(lengths), COLLECTED_AT_ONCE):
            sent = own[first : first + COLLECTED_AT_ONCE]
            counts = [min(max(length - first, 0), COLLECTED_AT_ONCE) for length in lengths]
            to_main = [len(sent)] + [0] * (len(lengths) - 1)
            received = exchange_rows(sent, to_main, counts if is_main else [0] * len(lengths))
            if is_main:
                for begin, part in zip(self._bounds, received.split(counts), strict=False):
                    whole[begin + first : begin + first + len(part)] = part
        return whole if is_main else None
