"""The recurrence h_k = Λ h_{k-1} + x_k over packed sequences (paper eq. 8), with a reset at every start.

N packed rows, D channels; complex values as real pairs [N, 2, D] (real, imaginary), because complex parameters break
NCCL, ZeRO, bfloat16 and ONNX. ``starts`` [B+1] holds each sequence's first row and, last, N.

The parallel version doubles its reach each round: after round r a row has summed its last 2^r predecessors, and a row
without a predecessor that far back is left alone, so a short history costs few rounds and a neighbour's NaN is never
touched. Powers of Λ come by squaring: no division, which |Λ| near 0.1 would not survive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed_scan(decay: Tensor, x: Tensor, starts: Tensor, impl: str = "doubling") -> Tensor:
    """All states h of the recurrence, state zero before each start.

    Args:
        decay: Λ [2, D], float32 or float64.
        x: [N, 2, D], of the same dtype.
        starts: int64 [B+1], non-decreasing; empty sequences are allowed.
        impl: "doubling" or "plain" (one event at a time; the specification).

    Returns:
        h [N, 2, D].
    """
    if impl == "plain":
        return _plain(decay, x, starts)
    return _Doubling.apply(decay, x, starts)


def scan_step(decay: Tensor, state: Tensor, x: Tensor) -> Tensor:
    """One event: Λ·state + x, with state and x [B, 2, D]."""
    return complex_mul(decay, state) + x


def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers kept as pairs in the last but one dimension; a [2, D], b [..., 2, D]."""
    b_re, b_im = b.unbind(-2)
    return torch.stack((a[0] * b_re - a[1] * b_im, a[0] * b_im + a[1] * b_re), -2)


def _plain(decay: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    firsts = set(starts.tolist())
    states: list[Tensor] = []
    for row in range(len(x)):
        states.append(x[row] if row in firsts else complex_mul(decay, states[-1]) + x[row])
    return torch.stack(states) if states else x


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, starts: Tensor) -> Tensor:
        lengths = starts.diff()
        before = torch.arange(len(x), device=x.device) - starts[:-1].repeat_interleave(lengths)
        after = lengths.repeat_interleave(lengths) - 1 - before
        states = _scan_rows(decay, x, before, -1)
        ctx.save_for_backward(decay, states, before, after)
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, states, before, after = ctx.saved_tensors
        conjugate = torch.stack((decay[0], -decay[1]))
        grad_x = _scan_rows(conjugate, grad_states, after, 1)
        rows = before.ge(1).nonzero().squeeze(1)
        g_re, g_im = grad_x[rows].unbind(1)
        h_re, h_im = states[rows - 1].unbind(1)
        grad_decay = torch.stack(((g_re * h_re + g_im * h_im).sum(0), (g_im * h_re - g_re * h_im).sum(0)))
        return grad_decay, grad_x, None


def _scan_rows(decay: Tensor, x: Tensor, reach: Tensor, direction: int) -> Tensor:
    """Doubling scan; row i may use its ``reach[i]`` neighbours in ``direction`` (-1: from earlier rows, 1: later)."""
    states = x.clone()
    power, distance = decay, 1
    rows = reach.ge(1).nonzero().squeeze(1)
    while len(rows) > 0 and bool(power.any()):  # a ring of 0.1 has forgotten everything after 38 events
        states.index_add_(0, rows, complex_mul(power, states[rows + direction * distance]))
        power, distance = _flush(complex_mul(power, power)), 2 * distance
        rows = rows[reach[rows] >= distance]
    return states


def _flush(power: Tensor) -> Tensor:
    """Zero a power of Λ too small to move any sum: as a denormal it would only be slow."""
    return torch.where(power.square().sum(0) > torch.finfo(power.dtype).tiny, power, 0.0)
