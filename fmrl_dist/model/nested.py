"""Nested operators (paper section 3.2, eq. 2-5): the first m outputs depend on the first m inputs only.

N rows, D width, S sizes m_1 < … < m_S = D; chunk j holds the channels m_{j-1} … m_j.

A nested weight is block lower triangular in torch's [out, in] layout: chunk j of the output reads the input prefix of
m_j channels. So cutting every weight to its m prefix leaves a stand-alone model whose output is the prefix of the large
one's. An ordinary layer-norm over D would break that; here each chunk is normalised separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LAYER_NORM_EPS = 1e-5
GROUP_WIDTH = 256  # channels


def chunks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Channel ranges between consecutive sizes: ``chunks((8, 16, 32)) == [(0, 8), (8, 16), (16, 32)]``."""
    return list(zip((0, *sizes[:-1]), sizes, strict=True))


def add_prefix(rows: Tensor, prefixes: Tensor) -> Tensor:
    """``rows`` [N, D] with ``prefixes`` [N, w], w ≤ D, added to their first w channels."""
    missing = rows.shape[1] - prefixes.shape[1]
    return rows + (F.pad(prefixes, (0, missing)) if missing else prefixes)


def nested_mask(sizes: Sequence[int]) -> Tensor:
    """P(M) of eq. 5, [D, D] in [out, in] layout: 1 where output chunk j may read the input (channel < m_j)."""
    reach = torch.cat([torch.full((high - low,), high) for low, high in chunks(sizes)])
    return (torch.arange(sizes[-1]) < reach[:, None]).float()


@lru_cache(maxsize=32)
def shared_mask(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """:func:`nested_mask` on ``device``, made once for all layers; never write to it."""
    return nested_mask(sizes).to(device)


def nested_linear(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """P ⊙ W applied to x (eq. 5), without most of the products with zeros.

    Chunks are put together into groups of at least ``GROUP_WIDTH`` channels, and each group reads the input prefix of
    its last chunk. With sizes that double, the products cost about ⅔ of a dense weight's; narrower groups would save
    more of them and be slower (``benchmarks.nesting``).

    Args:
        x: [N, K, D]; K inputs side by side (2: real and imaginary parts; otherwise 1), whose products are added.
        weight: [G, K, D, D], each D×D block nested; what lies outside of the mask is not read and gets no gradient.
        bias: [G, D].
        sizes: trained sizes, the last one D.
        dtype: of the products' inputs, x's own if None; the result comes back in x's dtype.

    Returns:
        [N, G, D].
    """
    return _NestedLinear.apply(x, weight, bias, tuple(sizes), dtype or x.dtype)


class _NestedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        x_in = x.to(dtype)
        y = x.new_empty(len(x), *bias.shape)
        for block in _blocks(weight.shape[0], sizes):
            g, low, high = block
            y[:, g, low:high] = bias[g, low:high]
            for k in range(x.shape[1]):
                add_product(y[:, g, low:high], x_in[:, k, :high], _masked(weight, block, k, sizes).to(dtype).T)
        ctx.save_for_backward(x_in, weight)
        ctx.rest = sizes, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_in, weight = ctx.saved_tensors
        sizes, dtype = ctx.rest
        grad_in = grad_y.to(dtype)
        grad_x = grad_y.new_zeros(x_in.shape)
        grad_weight = torch.zeros_like(weight)
        for block in _blocks(weight.shape[0], sizes):
            g, low, high = block
            for k in range(x_in.shape[1]):
                masked = _masked(weight, block, k, sizes).to(dtype)
                add_product(grad_x[:, k, :high], grad_in[:, g, low:high], masked)
                add_product(grad_weight[g, k, low:high, :high], grad_in[:, g, low:high].T, x_in[:, k, :high])
                _mask(grad_weight[g, k, low:high, :high], low, high, sizes)
        return grad_x, grad_weight, grad_y.sum(0), None, None


def _blocks(num_outputs: int, sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Output, first and last channel (and so the input prefix) of every product."""
    return [(g, low, high) for g in range(num_outputs) for low, high in chunk_groups(sizes)]


@lru_cache(maxsize=32)
def chunk_groups(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of chunks of at least ``GROUP_WIDTH`` channels (the last one may have fewer)."""
    groups, begin = [], 0
    for size in sizes:
        if size - begin >= GROUP_WIDTH or size == sizes[-1]:
            groups.append((begin, size))
            begin = size
    return groups


def _masked(weight: Tensor, block: tuple[int, int, int], k: int, sizes: tuple[int, ...]) -> Tensor:
    """A block of the weight [high - low, high] with zeros outside of the mask."""
    g, low, high = block
    return _mask(weight[g, k, low:high, :high], low, high, sizes, in_place=False)


def _mask(block: Tensor, low: int, high: int, sizes: tuple[int, ...], in_place: bool = True) -> Tensor:
    if (low, high) in chunks(sizes):
        return block  # a single chunk: all of the prefix is its own
    mask = shared_mask(sizes, block.device)[low:high, :high]
    return block.mul_(mask) if in_place else block * mask


def nested_linear_plain(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    """Eq. 2-4 word by word, for one D×D weight: each output chunk from its own input prefix. The specification."""
    return torch.cat([F.linear(x[:, :high], weight[low:high, :high], bias[low:high]) for low, high in chunks(sizes)], 1)


def matmul_linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x · weightᵀ with the product's inputs in ``dtype`` (None: as they are), the result in x's own dtype."""
    return F.linear(x.to(dtype or x.dtype), weight.to(dtype or weight.dtype)).to(x.dtype)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a · b, in place, also where a and b are of a narrower dtype."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator += a @ b


def nested_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> Tensor:
    """Layer-norm of each chunk separately; x [N, D], weight and bias [D]."""
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


class MatmulModule(nn.Module):
    """A module whose products take their inputs in ``matmul_dtype`` while it trains, and in float32 in evaluation.

    So ranking is float32 at any precision of the training, and validation within a run gives the figures that an
    evaluation of its checkpoint gives.
    """

    def __init__(self, matmul_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.matmul_dtype = matmul_dtype

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Dtype of the products' inputs now; None leaves them as they are."""
        return self.matmul_dtype if self.training else None


class NestedLinear(MatmulModule):
    """D → D nested linear layer; ``weight`` [D, D], ``bias`` [D]."""

    def __init__(self, sizes: Sequence[int], matmul_dtype: torch.dtype | None = None) -> None:
        super().__init__(matmul_dtype)
        width = sizes[-1]
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(init_nested(width, width, sizes=sizes))
        self.bias = nn.Parameter(init_nested(width, sizes=sizes))

    def forward(self, x: Tensor) -> Tensor:
        y = nested_linear(x[:, None], self.weight[None, None], self.bias[None], self.sizes, self.product_dtype)
        return y[:, 0]


class NestedLayerNorm(nn.Module):
    """Layer-norm per chunk; ``weight`` and ``bias`` [D]."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.weight = nn.Parameter(torch.ones(sizes[-1]))
        self.bias = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return nested_layer_norm(x, self.weight, self.bias, self.sizes)
