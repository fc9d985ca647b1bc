"""Items to embeddings (paper eq. 7): frozen features through one trained projection, and a row of a trained table each.

V items, D width, F features' total dim, M features, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.nested import MatmulModule, add_prefix, matmul_linear

COLUMN_MULTIPLE = 16  # widths of which matrix products are fastest


class ItemEncoder(MatmulModule):
    """Item embeddings from frozen features (eq. 7), a stand-in for each missing one, and an optional id table.

    Args:
        width: D.
        feature_dims: name → dim of each feature, in the order of the feature matrix's columns.
        num_items: rows of the trained id table; 0 for no table.
        matmul_dtype: of the projection's inputs in training; None keeps float32.
        id_width: w, the first channels of an embedding that the table's rows are added to; 0 for all.
        id_init: standard deviation of the table's initial rows; None for 1/√D.
    """

    feature_shift: Tensor
    feature_scale: Tensor

    id_table: Tensor | None  # [V, w]
    first_id_row: int = 0  # the item of the table's first row, where it holds a run of items

    def __init__(
        self,
        width: int,
        feature_dims: Mapping[str, int],
        num_items: int = 0,
        matmul_dtype: torch.dtype | None = None,
        id_width: int = 0,
        id_init: float | None = None,
    ) -> None:
        super().__init__(matmul_dtype)
        self.feature_dims = dict(feature_dims)
        total = sum(self.feature_dims.values())
        bound = 1 / math.sqrt(max(total, 1))
        self.weight = nn.Parameter(torch.empty(width, total).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.stand_ins = nn.Parameter(torch.zeros(len(self.feature_dims), width))
        self.id_table = None
        if num_items:
            deviation = 1 / math.sqrt(width) if id_init is None else id_init
            self.id_table = nn.Parameter(torch.randn(num_items, id_width or width) * deviation)
        self.register_buffer("feature_shift", torch.zeros(total))
        self.register_buffer("feature_scale", torch.ones(total))

    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        """Scale raw features; absent ones stay zero. values [n, F] of any float dtype, present bool [n, M] → [n, F]."""
        dims = torch.tensor(list(self.feature_dims.values()), dtype=torch.int64, device=values.device)
        scaled = (values.to(self.feature_shift.dtype) - self.feature_shift) * self.feature_scale
        return torch.where(present.repeat_interleave(dims, dim=1), scaled, 0.0)

    @property
    def num_columns(self) -> int:
        """C, the columns of :meth:`columns`."""
        needed = self.weight.shape[1] + len(self.feature_dims) + 1
        return -(-needed // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def columns(self, features: Tensor, present: Tensor) -> Tensor:
        """What :meth:`projection` maps to embeddings, [n, C]: features, which of them are absent, a one, zeros."""
        result = F.pad(features, (0, self.num_columns - features.shape[1]))
        width = self.weight.shape[1]
        result[:, width : width + len(self.feature_dims)] = ~present
        result[:, width + len(self.feature_dims)] = 1
        return result

    def projection(self) -> Tensor:
        """Weight, stand-ins and bias as one matrix [D, C]: eq. 7 is ``columns · projectionᵀ``, plus the id table."""
        whole = torch.cat((self.weight, self.stand_ins.T, self.bias[:, None]), 1)
        return F.pad(whole, (0, self.num_columns - whole.shape[1]))

    def forward(self, features: Tensor, present: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embeddings [n, D] of n items.

        Args:
            features: [n, F], from :meth:`normalize`.
            present: bool [n, M], which features each item has.
            ids: int64 [n], rows of the id table; None for the whole catalogue in order. Unused without an id table.
        """
        embeddings = self.without_ids(features, present)
        if self.id_table is not None:
            rows = self.id_table if ids is None else self.id_table[ids - self.first_id_row]
            embeddings = add_prefix(embeddings, rows)
        return embeddings

    def without_ids(self, features: Tensor, present: Tensor) -> Tensor:
        """:meth:`forward` of items that have no row in the id table."""
        embeddings = matmul_linear(features, self.weight, self.product_dtype) + self.bias
        return embeddings + (~present).to(embeddings.dtype) @ self.stand_ins
