"""The recurrence h_k = Λ h_{k-1} + x_k over packed sequences (paper eq. 8), with a reset at every start.

N packed rows, D channels; complex values as real pairs [N, 2, D] (real, imaginary), because complex parameters break
NCCL, ZeRO, bfloat16 and ONNX. ``starts`` [B+1] holds each sequence's first row and, last, N.

Four implementations, chosen by ``impl``:

    plain     one event at a time; the specification
    stepwise  one event of all sequences at a time, the longest sequences first, so that each step is a few operators on
              a run of rows; for the CPU, where it beats the doubling scan once a step has enough numbers
    doubling  after round r a row has summed its last 2^r predecessors; powers of Λ by squaring, without a division,
              which |Λ| near 0.1 would not survive
    triton    a kernel that walks each sequence (:mod:`fmrl_dist.model.triton_scan`)

A row without a predecessor that far back is left alone, so a neighbour's NaN never reaches it. The doubling scan needs
as many rounds as the longest sequence or the memory of Λ asks for, whichever is less. On the CPU, each round gathers
just the rows that take part. On a GPU, the number of rounds is read once, and each round masks all rows: gathering
would make the host wait for the device in every round.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmrl_dist.model.packing import places_in_sequences

SCAN_IMPLS = ("auto", "stepwise", "doubling", "triton", "plain")
STEP_NUMBERS = 800  # complex numbers of a step, on average, from which on stepwise is faster: a step costs some 20 µs
ScanRows = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # decay, x, starts, whether newest first → states


def packed_scan(decay: Tensor, x: Tensor, starts: Tensor, impl: str = "auto") -> Tensor:
    """All states h of the recurrence, state zero before each start.

    Args:
        decay: Λ [2, D], float32 or float64.
        x: [N, 2, D], of the same dtype.
        starts: int64 [B+1], non-decreasing; empty sequences are allowed.
        impl: one of ``SCAN_IMPLS``; "auto" chooses by x's device, dtype and shape.

    Returns:
        h [N, 2, D], differentiable in decay and x; "triton" gives no second gradients.
    """
    impl = _resolve(impl, x, starts)
    if impl == "plain":
        return _plain(decay, x, starts)
    scan_rows = {"triton": _walk_rows, "doubling": _double_rows, "stepwise": _step_rows}[impl]
    return _Scan.apply(decay, x, starts, scan_rows)


def scan_step(decay: Tensor, state: Tensor, x: Tensor) -> Tensor:
    """One event: Λ·state + x, with state and x [B, 2, D]."""
    return complex_mul(decay, state) + x


def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers kept as pairs in the last but one dimension; a [2, D], b [..., 2, D]."""
    b_re, b_im = b.unbind(-2)
    return torch.stack((a[0] * b_re - a[1] * b_im, a[0] * b_im + a[1] * b_re), -2)


def _resolve(impl: str, x: Tensor, starts: Tensor) -> str:
    """The Triton kernel sums in float32, so float64 does without it everywhere."""
    assert impl in SCAN_IMPLS, impl
    if impl != "auto":
        return impl
    if x.is_cuda:
        has_kernel = x.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
        return "triton" if has_kernel else "doubling"
    num_steps = int(starts.diff().max()) if len(starts) > 1 else 0
    return "stepwise" if len(x) * x.shape[2] >= STEP_NUMBERS * num_steps else "doubling"


def _plain(decay: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    firsts = set(starts.tolist())
    states: list[Tensor] = []
    for row in range(len(x)):
        states.append(x[row] if row in firsts else complex_mul(decay, states[-1]) + x[row])
    return (torch.stack(states) if states else x) + 0 * decay.sum()  # a gradient of both, also where no row has a past


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
        has_previous = places_in_sequences(starts, len(states)).ge(1)[1:, None]
        g_re, g_im = grad_x[1:].unbind(1)
        h_re, h_im = states[:-1].unbind(1)
        grads = (g_re * h_re + g_im * h_im, g_im * h_re - g_re * h_im)  # a masked row may hold a neighbour's NaN
        grad_decay = torch.stack([torch.where(has_previous, grad, 0.0).sum(0) for grad in grads])
        return grad_decay.to(decay.dtype), grad_x, None, None


def _walk_rows(decay: Tensor, x: Tensor, starts: Tensor, newest_first: bool) -> Tensor:
    from fmrl_dist.model.triton_scan import walk

    return walk(decay, x, starts, newest_first)


def _step_rows(decay: Tensor, x: Tensor, starts: Tensor, newest_first: bool) -> Tensor:
    """Row k of all sequences that have one, for k = 0, 1 and so on: those are the first of them, the longest first."""
    lengths, order = starts.diff().sort(descending=True, stable=True)
    num_steps = int(lengths[0]) if len(lengths) else 0
    counts = torch.searchsorted(-lengths, -torch.arange(num_steps, device=x.device)).tolist()  # longer than k
    firsts, direction = (starts[1:] - 1, -1) if newest_first else (starts[:-1], 1)
    places = torch.cat([firsts[order[:0]], *(firsts[order[:n]] + direction * k for k, n in enumerate(counts))])
    same, other = torch.stack((decay[0], decay[0])), torch.stack((-decay[1], decay[1]))
    states: list[Tensor] = []
    for own in x[places].split(counts):
        if states:  # Λ·h = (Re Λ, Re Λ)⊙(Re h, Im h) + (-Im Λ, Im Λ)⊙(Im h, Re h)
            before = states[-1][: len(own)]
            own = torch.addcmul(torch.addcmul(own, same, before), other, before.flip(1))
        states.append(own)
    return torch.empty_like(x).index_copy(0, places, torch.cat([x[:0], *states]))


def _double_rows(decay: Tensor, x: Tensor, starts: Tensor, newest_first: bool) -> Tensor:
    """Doubling scan; a row may use as many neighbours, earlier or later ones, as its sequence has there."""
    reach = places_in_sequences(starts, len(x))
    if newest_first:
        lengths = starts.diff()
        reach = lengths.repeat_interleave(lengths, output_size=len(x)) - 1 - reach
    double = _double_masked_rows if x.is_cuda else _double_gathered_rows
    return double(decay, x, reach, 1 if newest_first else -1)


def _double_gathered_rows(decay: Tensor, x: Tensor, reach: Tensor, direction: int) -> Tensor:
    """Each round gathers the rows that still reach that far; stops when there are none, or Λ's power has vanished."""
    states = x.clone()
    power, distance = decay, 1
    rows = reach.ge(1).nonzero().squeeze(1)
    while len(rows) > 0 and bool(power.any()):  # a ring of 0.1 has forgotten everything after 38 events
        states.index_add_(0, rows, complex_mul(power, states[rows + direction * distance]))
        power, distance = _flush(complex_mul(power, power)), 2 * distance
        rows = rows[reach[rows] >= distance]
    return states


def _double_masked_rows(decay: Tensor, x: Tensor, reach: Tensor, direction: int) -> Tensor:
    """The same with all rows in each round; the host waits for the device once, to learn the number of rounds."""
    states, power = x, decay
    for distance in [2**r for r in range(_num_rounds(decay, reach))]:
        own, other = slice(distance, None), slice(None, -distance)
        if direction == 1:
            own, other = other, own
        added = torch.where((reach[own] >= distance)[:, None, None], complex_mul(power, states[other]), 0.0)
        states = states.clone()  # what the other rows read
        states[own] += added
        power = _flush(complex_mul(power, power))
    return states if states is not x else x.clone()


def _num_rounds(decay: Tensor, reach: Tensor) -> int:
    """Rounds until no row reaches further, or until the largest |Λ|^distance is flushed to zero."""
    if len(reach) == 0:
        return 0
    longest, modulus = torch.stack((reach.max().double(), decay.double().square().sum(0).max().sqrt())).tolist()
    rounds = int(longest).bit_length()
    if not modulus < 1:
        return rounds
    smallest = math.sqrt(torch.finfo(decay.dtype).tiny)
    memory = math.log(smallest) / math.log(modulus) if modulus > smallest else 1.0  # events
    return min(rounds, math.floor(math.log2(memory)) + 1)


def _flush(power: Tensor) -> Tensor:
    """Zero a power of Λ too small to move any sum: as a denormal it would only be slow."""
    return torch.where(power.square().sum(0) > torch.finfo(power.dtype).tiny, power, 0.0)
