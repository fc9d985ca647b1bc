"""The recurrence h_k = Λ h_{k-1} + x_k over packed sequences (paper eq. 8), with a reset at every start.

N packed rows, D channels; complex values as real pairs [N, 2, D] (real, imaginary), because complex parameters break
NCCL, ZeRO, bfloat16 and ONNX. ``starts`` [B+1] holds each sequence's first row and, last, N.

The parallel version doubles its reach each round: after round r a row has summed its last 2^r predecessors, and a row
without a predecessor that far back is left alone, so a short history costs few rounds and a neighbour's NaN is never
touched. Powers of Λ come by squaring: no division, which |Λ| near 0.1 would not survive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ScanRows = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # decay, x, starts, whether newest first → states


def packed_scan(decay: Tensor, x: Tensor, starts: Tensor, impl: str = "doubling") -> Tensor:
    """All states h of the recurrence, state zero before each start.

    Args:
        decay: Λ [2, D], float32 or float64.
        x: [N, 2, D], of the same dtype.
        starts: int64 [B+1], non-decreasing; empty sequences are allowed.
        impl: "doubling"; "triton", a kernel that walks each sequence; or "plain" (one event at a time; the
            specification).

    Returns:
        h [N, 2, D].
    """
    if impl == "plain":
        return _plain(decay, x, starts)
    return _Scan.apply(decay, x, starts, _walk_rows if impl == "triton" else _double_rows)


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


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, starts: Tensor, scan_rows: ScanRows) -> Tensor:
        states = scan_rows(decay, x, starts, False)
        ctx.save_for_backward(decay, states, starts)
        ctx.scan_rows = scan_rows
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, None, None]:
        decay, states, starts = ctx.saved_tensors
        conjugate = torch.stack((decay[0], -decay[1]))
        grad_x = ctx.scan_rows(conjugate, grad_states, starts, True)
        rows = _rows_before(starts, len(states)).ge(1).nonzero().squeeze(1)
        g_re, g_im = grad_x[rows].unbind(1)
        h_re, h_im = states[rows - 1].unbind(1)
        grad_decay = torch.stack(((g_re * h_re + g_im * h_im).sum(0), (g_im * h_re - g_re * h_im).sum(0)))
        return grad_decay.to(decay.dtype), grad_x, None, None


def _rows_before(starts: Tensor, num_rows: int) -> Tensor:
    """Of each row, how many of its sequence stand before it, int64 [N]."""
    return torch.arange(num_rows, device=starts.device) - starts[:-1].repeat_interleave(starts.diff())


def _walk_rows(decay: Tensor, x: Tensor, starts: Tensor, newest_first: bool) -> Tensor:
    from fmrl_dist.model.triton_scan import walk

    return walk(decay, x, starts, newest_first)


def _double_rows(decay: Tensor, x: Tensor, starts: Tensor, newest_first: bool) -> Tensor:
    """Doubling scan; a row may use as many neighbours, earlier or later ones, as its sequence has there."""
    before = _rows_before(starts, len(x))
    lengths = starts.diff()
    reach, direction = (lengths.repeat_interleave(lengths) - 1 - before, 1) if newest_first else (before, -1)
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
