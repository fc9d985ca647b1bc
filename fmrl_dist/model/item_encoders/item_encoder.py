"""What every item encoder is: frozen features, a stand-in for each missing one, and an optional row per item.

An encoder reads all features whatever the size; only the channels of its result are cut. So every parameter has the
width as its last dimension, or as the one before the features', or does not have it at all, and cutting each to its
first m channels gives the encoder of size m, exactly.

n items, V of the catalogue, D width, F features' total dim, M features, w width of the id table, C columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fmrl_dist.model.nested import MatmulModule, add_prefix, matmul_linear
from fmrl_dist.model.row_products import linear_of_rows


class ItemEncoder(MatmulModule, ABC):
    """Item embeddings from frozen features.

    A subclass makes its own weights first, then those of :meth:`_add_rows`, which every encoder has.

    Args:
        width: D.
        feature_dims: name → dim of each feature, in the order of the feature matrix's columns.
        matmul_dtype: of the products' inputs in training; None keeps float32.
    """

    bias: nn.Parameter  # [D], the start position's row
    stand_ins: nn.Parameter  # [M, D], what a missing feature gives instead
    id_table: Tensor | None  # [V, w]
    first_id_row: int = 0  # the item of the table's first row, where it holds a run of items
    num_noises: int = 0  # standard normal numbers that each item is embedded with in training
    has_whole_numbers: bool = False  # whether columns hold integers, which bfloat16 would round

    def __init__(self, width: int, feature_dims: Mapping[str, int], matmul_dtype: torch.dtype | None) -> None:
        super().__init__(matmul_dtype)
        self.width, self.feature_dims = width, dict(feature_dims)
        self.total = sum(self.feature_dims.values())  # F

    def _add_rows(self, num_items: int, id_width: int, id_init: float | None) -> None:
        """Make the start position's row, the stand-ins and the id table.

        Args:
            num_items: rows of the trained id table; 0 for no table.
            id_width: w, the first channels of an embedding that the table's rows are added to; 0 for all.
            id_init: standard deviation of the table's initial rows; None for 1/√D.
        """
        deviation = 1 / math.sqrt(self.width) if id_init is None else id_init
        if self.total:
            bound = 1 / math.sqrt(self.total)
            self.bias = nn.Parameter(torch.empty(self.width).uniform_(-bound, bound))
        else:  # every embedding holds it: were it larger than the ids, all items would look alike for long
            self.bias = nn.Parameter(torch.randn(self.width) * deviation)
        self.stand_ins = nn.Parameter(torch.zeros(len(self.feature_dims), self.width))
        self.id_table = None
        if num_items:
            self.id_table = nn.Parameter(torch.randn(num_items, id_width or self.width) * deviation)

    @property
    def arguments(self) -> dict[str, Any]:
        """What of the model's arguments says which encoder this is; nothing for the default one."""
        return {}

    @abstractmethod
    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        """Features as the encoder takes them [n, F], absent ones zero, from raw ones of any float dtype.

        Args:
            values: [n, F].
            present: bool [n, M], which features each item has.
        """

    @abstractmethod
    def without_ids(self, features: Tensor, present: Tensor, noise: Tensor | None = None) -> Tensor:
        """:meth:`forward` of items that have no row in the id table."""

    def forward(
        self, features: Tensor, present: Tensor, ids: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Embeddings [n, D] of n items.

        Args:
            features: [n, F], from :meth:`normalize`.
            present: bool [n, M], which features each item has.
            ids: int64 [n], rows of the id table; None for the whole catalogue in order. Unused without an id table.
            noise: [n, ``num_noises``], in training; None for none.
        """
        embeddings = self.without_ids(features, present, noise)
        if self.id_table is not None:
            rows = self.id_table if ids is None else self.id_table[ids - self.first_id_row]
            embeddings = add_prefix(embeddings, rows)
        return embeddings

    @property
    def num_columns(self) -> int:
        """C, the columns of :meth:`columns`."""
        return self.total + len(self.feature_dims)

    def columns(self, features: Tensor, present: Tensor) -> Tensor:
        """All that the encoder needs of n items in one matrix [n, C], as training keeps a catalogue."""
        return torch.cat((features, present.to(features.dtype)), 1)

    def leave_out(self, columns: Tensor, left_out: Tensor) -> Tensor:
        """:meth:`columns` [n, C] of the same items without some features, bool [n, M], as if they never had them."""
        features, present = columns.split((self.total, len(self.feature_dims)), 1)
        return torch.cat((features.masked_fill(self._spread(left_out), 0), present.masked_fill(left_out, 0)), 1)

    def of_columns(self, columns: Tensor, noise: Tensor | None = None) -> Tensor:
        """:meth:`without_ids` of the items with these :meth:`columns`."""
        features, present = columns.split((self.total, len(self.feature_dims)), 1)
        return self.without_ids(features, present > 0, noise)

    def _of_missing(self, present: Tensor) -> Tensor:
        """The stand-ins of the features that each item lacks, [n, D]."""
        return (~present).to(self.stand_ins.dtype) @ self.stand_ins

    def _spread(self, of_features: Tensor) -> Tensor:
        """[n, M], of features, to [n, F], of their columns."""
        dims = torch.tensor(list(self.feature_dims.values()), dtype=torch.int64, device=of_features.device)
        return of_features.repeat_interleave(dims, dim=1)


class DenseItemEncoder(ItemEncoder):
    """An encoder of vectors, which enter as (x - shift)·scale."""

    feature_shift: Tensor  # [F]
    feature_scale: Tensor  # [F]

    def __init__(self, width: int, feature_dims: Mapping[str, int], matmul_dtype: torch.dtype | None) -> None:
        super().__init__(width, feature_dims, matmul_dtype)
        self.register_buffer("feature_shift", torch.zeros(self.total))
        self.register_buffer("feature_scale", torch.ones(self.total))

    def product(self, features: Tensor, weight: Tensor) -> Tensor:
        """features · weightᵀ. In evaluation items with equal features have equal embeddings, and tie in every rank."""
        if self.training:
            return matmul_linear(features, weight, self.matmul_dtype)
        return linear_of_rows(features.to(weight.dtype), weight)

    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        scaled = (values.to(self.feature_shift.dtype) - self.feature_shift) * self.feature_scale
        return torch.where(self._spread(present), scaled, 0.0)
