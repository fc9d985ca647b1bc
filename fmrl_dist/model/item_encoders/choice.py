"""The item encoder that a model's arguments name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.item_encoders.unisrec import UniSRecEncoder
from fmrl_dist.model.item_encoders.vqrec import VQRecEncoder


def make_item_encoder(
    kind: str,
    width: int,
    feature_dims: Mapping[str, int],
    num_items: int,
    matmul_dtype: torch.dtype | None,
    id_width: int,
    id_init: float | None,
    experts: int,
    codes: int,
) -> ItemEncoder:
    """A freshly initialised encoder.

    Args:
        kind: projection, unisrec or vqrec.
        width, feature_dims, num_items, matmul_dtype, id_width, id_init: see :class:`ItemEncoder`.
        experts: of unisrec.
        codes: of vqrec.

    Raises:
        ValueError: another kind.
    """
    match kind:
        case "projection":
            return ProjectionEncoder(width, feature_dims, num_items, matmul_dtype, id_width, id_init)
        case "unisrec":
            return UniSRecEncoder(width, feature_dims, experts, num_items, matmul_dtype, id_width, id_init)
        case "vqrec":
            return VQRecEncoder(width, feature_dims, codes, num_items, matmul_dtype, id_width, id_init)
    raise ValueError(f"item_encoder is {kind!r}; expected projection, unisrec or vqrec")
