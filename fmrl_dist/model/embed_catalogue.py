"""Item embeddings of a whole catalogue, or of a run of its items, some rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmrl_dist.base.errors import require
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder

EMBEDDED_AT_ONCE = 4096  # items


@torch.no_grad()
def embed_catalogue(
    encoder: ItemEncoder, values: Tensor, present: Tensor, first: int = 0, last: int | None = None
) -> Tensor:
    """Embeddings of the items ``first`` … ``last - 1``, float32 [last - first, D] on the encoder's device.

    Args:
        encoder: of the model; in evaluation mode, so that products are float32.
        values: raw features [V, F] of the whole catalogue; may be a memory-mapped file.
        present: bool [V, M], which features each item has.
        first, last: run of items; to the end if ``last`` is None.

    Raises:
        UserError: they are not finite, or too large.
    """
    assert not encoder.training, "scoring embeddings are float32, as evaluation mode has them"
    device = encoder.bias.device
    last = len(values) if last is None else last
    items = torch.empty(last - first, len(encoder.bias), device=device)
    for begin in range(first, last, EMBEDDED_AT_ONCE):
        end = min(begin + EMBEDDED_AT_ONCE, last)
        there = present[begin:end].to(device)
        features = encoder.normalize(values[begin:end].to(device), there)
        items[begin - first : end - first] = encoder(features, there, torch.arange(begin, end, device=device))
    check_rankable(items, "item embeddings")
    return items


def check_rankable(rows: Tensor, what: str) -> None:
    """Refuse vectors [n, D] whose products would not be finite: no score is higher than NaN, and all figures were 0.

    Raises:
        UserError: one of them is not finite, or so large that a product with one of its kind overflows.
    """
    limit = math.sqrt(torch.finfo(rows.dtype).max / max(rows.shape[1], 1))
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    require(
        largest < limit,  # false for NaN
        f"the model's {what} are not finite, or too large to compare ({largest:.3g}; expected less than {limit:.1e}): "
        "it cannot be ranked with; use another checkpoint, or train again with a lower train.lr",
    )
