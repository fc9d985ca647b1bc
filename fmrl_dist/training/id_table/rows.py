"""The id table as a training step reads it, and the table that is a parameter like any other.

V items, w width of the table, n distinct items of a batch. Who holds the rows and updates them depends on the loss:

    full softmax        every row has a gradient in every step: a parameter of the model (:class:`ModelIdTable`)
    sampled softmax     just the rows of the global batch have one: every rank holds the table, and all make the same
                        update of these rows (:mod:`fmrl_dist.training.id_table.replicated`)
    catalogue split     each rank holds and updates the rows of the items that it scores
                        (:mod:`fmrl_dist.training.id_table.owned`)

**Cold items**, which no training position reads or predicts, have a row of zeros: their embedding is that of their
features alone. A softmax would only push such a row away from all outputs, and drawn at random it is noise. So it
starts at zero and its gradient is left out.

**Id dropout** leaves the rows of a random share of the items out of a step, wherever these items occur, so that
features learn to carry them. Rows that stay are not scaled up: evaluation sees them as training does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder
from fmrl_dist.training.id_table.item_draws import LeftOut

STREAM = 0x69640064  # "id d": a separate random stream


class IdRows(Protocol):
    """The id table in the forward pass of one rank."""

    def begin_step(self, step: int) -> None:
        """Draw which rows this step leaves out; the same on all ranks, for all micro-batches."""

    def of_batch(self, ids: Tensor) -> Tensor:
        """Rows [n, w] of sorted distinct items, differentiable. All ranks must call it together."""

    def of_scored(self) -> Tensor:
        """Rows of the items that this rank scores under a full softmax, differentiable."""


class SeparateIdTable(IdRows, Protocol):
    """An id table outside the module that an engine wraps, with its own AdamW. All ranks must call each together."""

    @property
    def num_weights(self) -> int:
        """V·w."""

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the other parameters, of which the table's own is a multiple."""

    def gradient_norm(self) -> Tensor:
        """Bring together what all micro-batches and ranks added, average over the ranks; norm of all, []."""

    def step(self, factor: Tensor, finite: Tensor) -> None:
        """AdamW with ``factor`` times the gradient, []; if not ``finite``, [], change nothing. Clears gradients."""

    def evaluated(self) -> AbstractContextManager[None]:
        """Let the model's item encoder have the rows that this rank embeds for an evaluation."""

    def weights(self) -> Tensor | None:
        """The whole table on rank 0, in its CPU's memory; None on others."""

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by name, whole, likewise; empty on others."""

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Restore what :meth:`moments` returned."""


class IdDropout:
    """Leaves the rows of a random share of the items out of a step.

    Args:
        rate: share of the items.
        seed: of the run.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate = rate
        self.left_out = LeftOut(rate, STREAM, seed)
        self.begin_step = self.left_out.begin_step

    def __call__(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows [n, w] of items, zero where they are left out."""
        return rows.masked_fill(self.left_out(ids)[:, None], 0.0) if self.rate else rows


class ModelIdTable:
    """The table that is a parameter of the model: engines average its gradient, and the optimiser updates it.

    Args:
        encoder: with the table.
        dropout: of its rows.
        cold: int64, items whose rows stay as they are.
    """

    def __init__(self, encoder: ItemEncoder, dropout: IdDropout, cold: Tensor | None = None) -> None:
        self._encoder, self._dropout = encoder, dropout
        if cold is not None and len(cold):
            self._table.register_hook(lambda gradient: gradient.index_fill(0, cold, 0.0))

    @property
    def _table(self) -> Tensor:
        assert self._encoder.id_table is not None
        return self._encoder.id_table

    def begin_step(self, step: int) -> None:
        self._dropout.begin_step(step)

    def of_batch(self, ids: Tensor) -> Tensor:
        return self._dropout(self._table[ids], ids)

    def of_scored(self) -> Tensor:
        table = self._table
        return self._dropout(table, torch.arange(len(table), device=table.device)) if self._dropout.rate else table


def detach_table(model: FMRLRec) -> Tensor:
    """Take the table out of the model: engines shall not find it among the parameters. On the model's device."""
    encoder = model.encoder
    assert isinstance(encoder.id_table, nn.Parameter)
    table = encoder.id_table.detach()
    del encoder.id_table
    return table


@contextmanager
def attached(encoder: ItemEncoder, rows: Tensor, first_item: int = 0) -> Iterator[None]:
    """Let the encoder have rows of the table for a while, those of the items from ``first_item`` on."""
    encoder.id_table, encoder.first_id_row = rows, first_item
    try:
        yield
    finally:
        del encoder.id_table
        encoder.first_id_row = 0
