"""UniSRec's item encoder (arXiv 2206.05941, section 2.2.1): parametric whitening and a mixture of experts.

    E = Σ_g gate_g · ((x - b_g)·W_g)      each expert whitens the features by its own offset and matrix, eq. 3 and 4
    gate = softmax(x·W_gate + δ),  δ = ε·softplus(x·W_noise),  ε ~ N(0, 1)      eq. 5 and 6; δ = 0 in evaluation

ε is given: a training step draws it by item (:mod:`fmrl_dist.training.id_table.item_draws`). The gate reads all
features at every size, so cutting the experts' channels is exact. The authors' code drops features before the
experts, of which the paper says nothing: here the model's own dropout of embeddings is the only one.

Cost: the experts' results, n·G·D numbers, which training keeps for the backward pass.

n items, G experts, D width, F features' total dim, M features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.item_encoders.item_encoder import DenseItemEncoder
from fmrl_dist.model.row_products import linear_of_rows


class UniSRecEncoder(DenseItemEncoder):
    """Experts over the features, plus stand-ins and ids. The start position's row is not added to items.

    Args:
        experts: G.
        Others: as those of :class:`ItemEncoder` and :meth:`ItemEncoder._add_rows`.
    """

    def __init__(
        self,
        width: int,
        feature_dims: Mapping[str, int],
        experts: int,
        num_items: int = 0,
        matmul_dtype: torch.dtype | None = None,
        id_width: int = 0,
        id_init: float | None = None,
    ) -> None:
        super().__init__(width, feature_dims, matmul_dtype)
        bound = math.sqrt(experts / max(self.total, 1))  # their mean begins as large as one projection
        self.weight = nn.Parameter(torch.empty(experts, width, self.total).uniform_(-bound, bound))
        self.offsets = nn.Parameter(torch.zeros(experts, self.total))
        self.gate = nn.Parameter(torch.zeros(experts, self.total))  # all experts alike, at first
        self.gate_noise = nn.Parameter(torch.zeros(experts, self.total))
        self.num_noises = experts
        self._add_rows(num_items, id_width, id_init)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"item_encoder": "unisrec", "experts": len(self.weight)}

    def without_ids(self, features: Tensor, present: Tensor, noise: Tensor | None = None) -> Tensor:
        features = features.to(self.weight.dtype)
        gates_NG = F.softmax(self._gate_scores(features, noise), 1)
        projected = self.product(features, self.weight.flatten(0, 1))
        offsets_GD = torch.einsum("gf,gdf->gd", self.offsets, self.weight)
        whitened_NGD = projected.unflatten(1, offsets_GD.shape) - offsets_GD
        return torch.einsum("ng,ngd->nd", gates_NG, whitened_NGD) + self._of_missing(present)

    def _gate_scores(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """[n, G], with noise ε [n, G] in training, by which experts share the items."""
        scores = features @ self.gate.T if self.training else linear_of_rows(features, self.gate)
        if noise is None:
            return scores
        return scores + noise.to(scores.dtype) * F.softplus(features @ self.gate_noise.T)
