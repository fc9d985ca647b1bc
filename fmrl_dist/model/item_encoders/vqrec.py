"""VQRec's item encoder (arXiv 2210.12316, section 3.1): an item is the mean of the rows that its codes look up.

The codes are the item's features: a number from 1 to K for each part of a vector that was quantised when the store was
built (source ``pq``), and 0 where there was none. Each part has a table of its own, of which only the channels are cut:

    E = (Σ_p table[p, code_p - 1]) / P      eq. 3 and 4, over the parts of the features that the item has

n items, P parts of all features together, K codes, D width, M features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder


class VQRecEncoder(ItemEncoder):
    """Rows looked up by codes, plus stand-ins and ids. The start position's row is not added to items.

    Args:
        codes: K.
        Others: as those of :class:`ItemEncoder` and :meth:`ItemEncoder._add_rows`.
    """

    has_whole_numbers = True

    def __init__(
        self,
        width: int,
        feature_dims: Mapping[str, int],
        codes: int,
        num_items: int = 0,
        matmul_dtype: torch.dtype | None = None,
        id_width: int = 0,
        id_init: float | None = None,
    ) -> None:
        super().__init__(width, feature_dims, matmul_dtype)
        self.code_table = nn.Parameter(torch.randn(self.total, codes, width) / math.sqrt(width))
        self._add_rows(num_items, id_width, id_init)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"item_encoder": "vqrec", "codes": self.code_table.shape[1]}

    def normalize(self, values: Tensor, present: Tensor) -> Tensor:
        """The codes as they are: a number that was scaled would be another code."""
        return torch.where(self._spread(present), values.to(self.code_table.dtype), 0.0)

    def without_ids(self, features: Tensor, present: Tensor, noise: Tensor | None = None) -> Tensor:
        num_parts, num_codes, _ = self.code_table.shape
        first_rows = torch.arange(num_parts, device=features.device) * num_codes
        weights_NP = self._spread(present).to(self.code_table.dtype) / num_parts
        rows_NP = (features.long() - 1).clamp_min(0) + first_rows  # those of missing features have no weight
        table = self.code_table.flatten(0, 1)
        looked_up = F.embedding_bag(rows_NP, table, mode="sum", per_sample_weights=weights_NP)
        return looked_up + self._of_missing(present)
