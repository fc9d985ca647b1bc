"""Nested operators (paper section 3.2, eq. 2-5): the first m outputs depend on the first m inputs only.

N rows, D width, S sizes m_1 < … < m_S = D; chunk j holds the channels m_{j-1} … m_j.

A nested weight is block lower triangular in torch's [out, in] layout: chunk j of the output reads the input prefix of
m_j channels. So cutting every weight to its m prefix leaves a model of its own whose output is the prefix of the large
one's. An ordinary layer-norm over D would break that; here each chunk is normalised by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5


def chunks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Channel ranges between consecutive sizes: ``chunks((8, 16, 32)) == [(0, 8), (8, 16), (16, 32)]``."""
    return list(zip((0, *sizes[:-1]), sizes, strict=True))


def nested_mask(sizes: Sequence[int]) -> Tensor:
    """P(M) of eq. 5, [D, D] in [out, in] layout: 1 where output chunk j may read the input (channel < m_j)."""
    reach = torch.cat([torch.full((high - low,), high) for low, high in chunks(sizes)])
    return (torch.arange(sizes[-1]) < reach[:, None]).float()


@lru_cache(maxsize=32)
def shared_mask(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """:func:`nested_mask` on ``device``, made once for all layers; never write to it."""
    return nested_mask(sizes).to(device)


def nested_linear(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """P ⊙ W applied to x (eq. 5): one masked dense product.

    Args:
        x: [N, K·D] rows; K input groups side by side (2 for real and imaginary parts, else 1).
        weight: [G·D, K·D], every D×D block nested.
        bias: [G·D].
        mask: [D, D], from :func:`nested_mask`.
        dtype: of the product's inputs, x's own if None; the result comes back in x's dtype.

    Returns:
        [N, G·D].
    """
    masked = weight * mask.repeat(weight.shape[0] // mask.shape[0], weight.shape[1] // mask.shape[1])
    return matmul_linear(x, masked, dtype) + bias


def nested_linear_plain(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    """Eq. 2-4 word by word, for one D×D weight: each output chunk from its own input prefix. The specification."""
    return torch.cat([F.linear(x[:, :high], weight[low:high, :high], bias[low:high]) for low, high in chunks(sizes)], 1)


def matmul_linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x · weightᵀ with the product's inputs in ``dtype`` (None: as they are), the result in x's own dtype."""
    return F.linear(x.to(dtype or x.dtype), weight.to(dtype or weight.dtype)).to(x.dtype)


def nested_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    """Layer-norm of each chunk by itself; x [N, D], weight and bias [D]."""
    parts = [
        F.layer_norm(x[:, low:high], (high - low,), weight[low:high], bias[low:high], LAYER_NORM_EPS)
        for low, high in chunks(sizes)
    ]
    return torch.cat(parts, 1)


def init_nested(*shape: int, sizes: Sequence[int]) -> Tensor:
    """A nested weight [*, D, D] (or bias [*, D]), chunk j from U(±1/√m_j); masked entries zero."""
    values = torch.zeros(shape)
    width = sizes[-1]
    is_matrix = len(shape) >= 2 and shape[-2:] == (width, width)
    for low, high in chunks(sizes):
        rows = values[..., low:high, :high] if is_matrix else values[..., low:high]
        nn.init.uniform_(rows, -1 / math.sqrt(high), 1 / math.sqrt(high))
    return values


class NestedLinear(nn.Module):
    """D → D nested linear layer; ``weight`` [D, D], ``bias`` [D]."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        width = sizes[-1]
        self.sizes, self.matmul_dtype = tuple(sizes), dtype
        self.weight = nn.Parameter(init_nested(width, width, sizes=sizes))
        self.bias = nn.Parameter(init_nested(width, sizes=sizes))

    def forward(self, x: Tensor) -> Tensor:
        return nested_linear(x, self.weight, self.bias, shared_mask(self.sizes, x.device), self.matmul_dtype)


class NestedLayerNorm(nn.Module):
    """Layer-norm per chunk; ``weight`` and ``bias`` [D]."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(torch.ones(sizes[-1]))
        self.bias = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return nested_layer_norm(x, self.weight, self.bias, self.sizes)
