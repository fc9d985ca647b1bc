"""What Accelerate prepares: the model, the item table and the loss behind one ``forward(batch) → losses``.

The model stays ignorant of ranks, and an engine wraps exactly one module. Items are projected where they are needed:
those of the batch here, those of the catalogue tile by tile in the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrl_dist.data.histories import Packed
from fmrl_dist.losses.log_sum_exp import Rows
from fmrl_dist.losses.nested_cross_entropy import catalogue_cross_entropy
from fmrl_dist.model import FMRLRec
from fmrl_dist.ops.nested import matmul_linear

EMBEDDED_AT_ONCE = 4096  # items


class TrainingModule(nn.Module):
    """fMRLRec with its nested cross-entropy over the full catalogue.

    Args:
        model: the model.
        columns: [V, C], the catalogue as the model's item encoder takes it, of the products' dtype.
        loss_impl: of :func:`~fmrl_dist.losses.nested_cross_entropy.catalogue_cross_entropy`.
        matmul_dtype: of the products' inputs; None keeps float32.
    """

    def __init__(self, model: FMRLRec, columns: Rows, loss_impl: str, matmul_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        # A plain attribute, not a buffer: DDP would broadcast it, a checkpoint would hold it, and it may lie on disk.
        self.columns = columns
        self.loss_impl, self.matmul_dtype = loss_impl, matmul_dtype

    def forward(self, batch: Packed) -> Tensor:
        """Loss of each size, summed over the batch's targets, [S]; zero for an empty batch."""
        projection, table = self.model.encoder.projection(), self.model.encoder.id_table
        ids, places = torch.cat((batch.items, batch.targets)).unique(return_inverse=True)
        items = self._embed(self.columns[ids], projection, None if table is None else table[ids])
        z = self.model(items[places[: len(batch.items)]], batch.starts, batch.from_start)
        return catalogue_cross_entropy(
            z,
            items[places[len(batch.items) :]],
            self.columns,
            projection,
            table,
            self.model.sizes,
            None,
            self.loss_impl,
            self.matmul_dtype,
        )

    @torch.no_grad()
    def item_embeddings(self) -> Tensor:
        """Embeddings of the whole catalogue, [V, D]."""
        projection, table = self.model.encoder.projection(), self.model.encoder.id_table
        items = projection.new_empty(self.columns.shape[0], len(projection))
        for begin in range(0, len(items), EMBEDDED_AT_ONCE):
            rows = slice(begin, begin + EMBEDDED_AT_ONCE)
            items[rows] = self._embed(self.columns[rows], projection, None if table is None else table[rows])
        return items

    def _embed(self, columns: Tensor, projection: Tensor, table_rows: Tensor | None) -> Tensor:
        embeddings = matmul_linear(columns.to(projection.dtype), projection, self.matmul_dtype)
        return embeddings if table_rows is None else embeddings + table_rows
