"""Attention as a nested mixer: the heads of a chunk read what the chunk may read, so slices stay exact.

P packed rows, D channels, n heads of d channels in a chunk; b sequences of L rows in a padded group.

Queries, keys and values are nested layers, and each head lies within one chunk: chunk j's heads know the input prefix
of m_j channels, as a nested layer's outputs do. Cutting every weight to m channels therefore leaves the heads of the
chunks up to m, which is the small model's attention. Rotary positions turn pairs of channels within a head.

``packed_attention`` has two implementations: ``plain``, one head of one sequence at a time, is the specification;
``grouped`` hands padded groups of like lengths to PyTorch's fused attention, whose memory grows with L, not with L².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrl_dist.model.nested import MatmulModule, chunks, init_nested, nested_linear
from fmrl_dist.model.packing import padded_groups, places_in_sequences

ROTARY_BASE = 10_000.0
ATTENTION_IMPLS = ("grouped", "plain")
Heads = tuple[tuple[int, int, int], ...]  # runs of channels: first, last + 1, width of each head in it


@lru_cache(maxsize=32)
def chunk_heads(sizes: tuple[int, ...], head_width: int) -> Heads:
    """Heads of every chunk, of at most ``head_width`` channels each: the fewest that divide the chunk."""
    runs = []
    for low, high in chunks(sizes):
        width = high - low
        count = next(n for n in range(-(-width // head_width), width + 1) if width % n == 0)
        runs.append((low, high, width // count))
    return tuple(runs)


def packed_attention(
    queries_keys_values: Tensor, starts: Tensor, heads: Heads, causal: bool, impl: str = "grouped"
) -> Tensor:
    """Softmax attention within each sequence and head: softmax(q·k/√d) v over the rows that a row may see.

    Args:
        queries_keys_values: [P, 3, D].
        starts: int64 [·+1], first row of each sequence and, last, P; empty sequences are allowed.
        heads: from :func:`chunk_heads`.
        causal: whether a row sees those up to itself, rather than all of its sequence.
        impl: one of ``ATTENTION_IMPLS``.

    Returns:
        [P, D].
    """
    assert impl in ATTENTION_IMPLS, impl
    return (_plain if impl == "plain" else _grouped)(queries_keys_values, starts, heads, causal)


def _plain(qkv: Tensor, starts: Tensor, heads: Heads, causal: bool) -> Tensor:
    rows = []
    for first, last in pairwise(starts.tolist()):
        columns = []
        for low, high, width in heads:
            for begin in range(low, high, width):
                q, k, v = qkv[first:last, :, begin : begin + width].unbind(1)
                scores = q @ k.T / math.sqrt(width)
                if causal:
                    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(hidden, -torch.inf)
                columns.append(scores.softmax(1) @ v)
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows) if rows else qkv[:, 0]


def _grouped(qkv: Tensor, starts: Tensor, heads: Heads, causal: bool) -> Tensor:
    found, places = [qkv[:0, 0]], [starts[:0]]
    for group in padded_groups(starts):
        padded = qkv[group.rows]  # [b, L, 3, D]
        # A causal row never sees the padding after it; otherwise the padding is hidden.
        mask = None if causal else group.is_row[:, None, None, :]
        of_chunks = []
        for low, high, width in heads:
            q, k, v = padded[..., low:high].unflatten(3, (-1, width)).permute(2, 0, 3, 1, 4)  # each [b, n, L, d]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            of_chunks.append(mixed.transpose(1, 2).flatten(2))
        found.append(torch.cat(of_chunks, 2)[group.is_row])
        places.append(group.rows[group.is_row])
    order = torch.cat(places).argsort()
    return torch.cat(found)[order]


def rotate(x: Tensor, places: Tensor, heads: Heads) -> Tensor:
    """Rotary positions: channels i and i + d//2 of each head turn by place · base^(-2i/d), so that q·k knows distances.

    Args:
        x: [P, K, D], queries and keys.
        places: [P], of each row in its sequence.
        heads: from :func:`chunk_heads`; the last channel of a head of odd width does not turn.
    """
    partner, sign, frequency = (torch.from_numpy(values).to(x.device) for values in _rotary_layout(heads))
    angle = (places[:, None].double() * frequency).to(x.dtype)[:, None]  # [P, 1, D]
    return x * angle.cos() + x[..., partner] * (angle.sin() * sign.to(x.dtype))


@lru_cache(maxsize=32)
def _rotary_layout(heads: Heads) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each channel: with which it turns int64 [D], the sign of what that adds, and the frequency, float64 [D]."""
    partner: list[int] = []
    sign: list[float] = []
    frequency: list[float] = []
    for low, high, width in heads:
        half = width // 2
        for begin in range(low, high, width):
            turned = [ROTARY_BASE ** (-2 * i / width) for i in range(half)]
            rest = list(range(begin + 2 * half, begin + width))
            partner += [begin + half + i for i in range(half)] + [begin + i for i in range(half)] + rest
            sign += [-1.0] * half + [1.0] * half + [0.0] * len(rest)
            frequency += turned + turned + [0.0] * len(rest)
    return np.array(partner, np.int64), np.array(sign), np.array(frequency)


class Attention(MatmulModule):
    """Multi-head attention over the events of a history.

    ``qkv`` [3, D, D] and ``qkv_bias`` [3, D] hold queries, keys and values; ``out``, ``out_bias`` what reads the heads.

    Args:
        sizes: Matryoshka sizes.
        head_width: channels of a head, at most.
        window: events that a step remembers.
        rotary: whether queries and keys turn with their places; without, the model's input has positions, or none.
        causal: whether an event sees those up to itself only.
        matmul_dtype: of the products' inputs in training mode.
        impl: of :func:`packed_attention`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        head_width: int,
        window: int,
        rotary: bool,
        causal: bool,
        matmul_dtype: torch.dtype | None = None,
        impl: str = "grouped",
    ) -> None:
        super().__init__(matmul_dtype)
        width = sizes[-1]
        self.sizes, self.window, self.rotary, self.causal, self.impl = tuple(sizes), window, rotary, causal, impl
        self.heads = chunk_heads(self.sizes, head_width)
        self.qkv = nn.Parameter(init_nested(3, width, width, sizes=sizes))
        self.qkv_bias = nn.Parameter(init_nested(3, width, sizes=sizes))
        self.out = nn.Parameter(init_nested(width, width, sizes=sizes))
        self.out_bias = nn.Parameter(init_nested(width, sizes=sizes))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x [P, D] packed rows, starts int64 [·+1] → y [P, D]."""
        qkv = self._project(x)
        if self.rotary:
            places = places_in_sequences(starts, len(x))
            qkv = torch.cat((rotate(qkv[:, :2], places, self.heads), qkv[:, 2:]), 1)
        mixed = packed_attention(qkv.to(self.product_dtype or x.dtype), starts, self.heads, self.causal, self.impl)
        return self._read(mixed.to(x.dtype))

    def initial_state(self, num_histories: int) -> Tensor:
        """Keys (before they turn) and values of no event, [B, 0, 2, D]."""
        return self.out.new_zeros(num_histories, 0, 2, self.sizes[-1])

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One event: state [B, n, 2, D] of the last n ≤ ``window`` events, and x [B, D] → new state, y [B, D]."""
        assert self.causal, "an event that sees later ones has no step"
        qkv = self._project(x)
        state = torch.cat((state, qkv[:, None, 1:]), 1)[:, -self.window :]
        num_events = state.shape[1]
        query, keys = qkv[:, :1], state[:, :, 0]
        if self.rotary:
            places = torch.arange(num_events, device=x.device)
            query = rotate(query, places[-1:].expand(len(x)), self.heads)
            keys = rotate(keys.transpose(0, 1), places, self.heads).transpose(0, 1)
        of_chunks = []
        for low, high, width in self.heads:
            q, k, v = (rows[..., low:high].unflatten(2, (-1, width)) for rows in (query, keys, state[:, :, 1]))
            share = (torch.einsum("bqhd,bnhd->bhn", q, k) / math.sqrt(width)).softmax(2)
            of_chunks.append(torch.einsum("bhn,bnhd->bhd", share, v).flatten(1))
        return state, self._read(torch.cat(of_chunks, 1))

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values, [P, 3, D]."""
        return nested_linear(x[:, None], self.qkv[:, None], self.qkv_bias, self.sizes, self.product_dtype)

    def _read(self, mixed: Tensor) -> Tensor:
        """[P, D] of all heads → [P, D]."""
        weight, bias = self.out[None, None], self.out_bias[None]
        return nested_linear(mixed[:, None], weight, bias, self.sizes, self.product_dtype)[:, 0]
