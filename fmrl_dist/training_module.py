"""What Accelerate prepares: the model, the item table and the loss behind one ``forward(batch) → losses``.

The model stays ignorant of ranks, and an engine wraps exactly one module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrl_dist.data.histories import Packed
from fmrl_dist.losses.nested_cross_entropy import nested_cross_entropy
from fmrl_dist.model import FMRLRec


class TrainingModule(nn.Module):
    """fMRLRec with its nested cross-entropy over the full catalogue.

    Args:
        model: the model.
        features: normalised features of the catalogue, float32 [V, F].
        present: bool [V, M].
        loss_impl: of :func:`~fmrl_dist.losses.nested_cross_entropy.nested_cross_entropy`.
        matmul_dtype: of the scores' product; None keeps float32.
    """

    def __init__(
        self, model: FMRLRec, features: Tensor, present: Tensor, loss_impl: str, matmul_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model = model
        # Plain attributes: as buffers they would be broadcast by DDP and saved with the model.
        self.catalogue = (features, present)
        self.loss_impl, self.matmul_dtype = loss_impl, matmul_dtype

    def forward(self, batch: Packed) -> Tensor:
        """Loss of each size, summed over the batch's targets, [S]; zero for an empty batch."""
        items = self.item_embeddings()
        z = self.model(items[batch.items], batch.starts, batch.from_start)
        return nested_cross_entropy(z, items, batch.targets, self.model.sizes, None, self.loss_impl, self.matmul_dtype)

    def item_embeddings(self) -> Tensor:
        """Embeddings of the whole catalogue, [V, D]."""
        embeddings: Tensor = self.model.encoder(*self.catalogue)
        return embeddings
