"""The paper's item encoder (eq. 7): frozen features through one trained projection.

n items, D width, F features' total dim, M features, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.item_encoders.item_encoder import DenseItemEncoder
from fmrl_dist.model.nested import matmul_linear

COLUMN_MULTIPLE = 16  # widths of which matrix products are fastest


class ProjectionEncoder(DenseItemEncoder):
    """E = X·W_proj + b_proj, plus stand-ins and ids.

    Args: as those of :class:`ItemEncoder` and :meth:`ItemEncoder._add_rows`.
    """

    def __init__(
        self,
        width: int,
        feature_dims: Mapping[str, int],
        num_items: int = 0,
        matmul_dtype: torch.dtype | None = None,
        id_width: int = 0,
        id_init: float | None = None,
    ) -> None:
        super().__init__(width, feature_dims, matmul_dtype)
        bound = 1 / math.sqrt(max(self.total, 1))
        self.weight = nn.Parameter(torch.empty(width, self.total).uniform_(-bound, bound))
        self._add_rows(num_items, id_width, id_init)

    @property
    def num_columns(self) -> int:
        needed = self.total + len(self.feature_dims) + 1
        return -(-needed // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def columns(self, features: Tensor, present: Tensor) -> Tensor:
        """What :meth:`projection` maps to embeddings, [n, C]: features, which of them are absent, a one, zeros."""
        result = F.pad(features, (0, self.num_columns - features.shape[1]))
        result[:, self.total : self.total + len(self.feature_dims)] = ~present
        result[:, self.total + len(self.feature_dims)] = 1
        return result

    def leave_out(self, columns: Tensor, left_out: Tensor) -> Tensor:
        features, absent, rest = columns.tensor_split((self.total, self.total + len(self.feature_dims)), 1)
        return torch.cat((features.masked_fill(self._spread(left_out), 0), absent.masked_fill(left_out, 1), rest), 1)

    def projection(self) -> Tensor:
        """Weight, stand-ins and bias as one matrix [D, C]: eq. 7 is ``columns · projectionᵀ``, plus the id table."""
        whole = torch.cat((self.weight, self.stand_ins.T, self.bias[:, None]), 1)
        return F.pad(whole, (0, self.num_columns - whole.shape[1]))

    def of_columns(self, columns: Tensor, noise: Tensor | None = None) -> Tensor:
        return matmul_linear(columns, self.projection(), self.product_dtype)

    def without_ids(self, features: Tensor, present: Tensor, noise: Tensor | None = None) -> Tensor:
        embeddings = self.product(features, self.weight) + self.bias
        return embeddings + self._of_missing(present)
