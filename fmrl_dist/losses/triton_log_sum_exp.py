"""The nested log-sum-exp as Triton kernels; :mod:`fmrl_dist.losses.log_sum_exp` is the specification.

A program scores a block of positions against one block of items after the other, chunk by chunk of the width, and
keeps a running maximum and sum of every size. Items are split among programs whose results are merged afterwards.

Backward, one kernel serves both gradients: a program owns a block of positions (or of items) and goes through the
items (or positions). What pulls chunk j is the sum over the sizes i ≥ j of their weighted softmaxes. A first pass over
the width adds up the pulls of all sizes; a second one scores again and takes off the pull of each size that it has
passed. So one tile of scores, one of pulls, and nothing for each size, is held at a time. No atomics: two runs give the
same bits. Products' inputs are of the tensors' dtype, sums are float32. Not measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_POSITIONS = 32
BLOCK_ITEMS = 64
BLOCK_WIDTH = 32
ITEMS_OF_A_PROGRAM = 4096
LEFT_OUT = tl.constexpr(-3.0e38)  # score of an item that a position may not see


@triton.jit
def _add_chunk(score, mine, theirs, my_rows, their_rows, num_mine, num_theirs, low, high, width, BLOCK: tl.constexpr):
    """score [m, t] plus the products of channels low … high - 1 of rows of ``mine`` and ``theirs``."""
    for first in range(low, high, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < high
        a = tl.load(
            mine + my_rows[:, None] * width + channels[None, :], (my_rows < num_mine)[:, None] & inside[None, :], 0.0
        )
        b = tl.load(
            theirs + their_rows[None, :] * width + channels[:, None],
            (their_rows < num_theirs)[None, :] & inside[:, None],
            0.0,
        )
        score += tl.dot(a, b, input_precision="ieee")
    return score


@triton.jit
def _forward(
    z, items, bounds, inverse, offsets, item_ids, target_ids, highest_out, total_out,
    num_positions, num_items, width,
    SIZES: tl.constexpr, PADDED_SIZES: tl.constexpr, CORRECTED: tl.constexpr,
    PROGRAM_ITEMS: tl.constexpr, POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    split = tl.program_id(1)
    which = tl.arange(0, PADDED_SIZES)
    highest = tl.full((PADDED_SIZES, POSITIONS), LEFT_OUT, tl.float32)
    total = tl.zeros((PADDED_SIZES, POSITIONS), tl.float32)
    if CORRECTED:
        targets = tl.load(target_ids + rows, rows < num_positions, -1)
    for first in range(split * PROGRAM_ITEMS, tl.minimum((split + 1) * PROGRAM_ITEMS, num_items), ITEMS):
        columns = first + tl.arange(0, ITEMS)
        score = tl.zeros((POSITIONS, ITEMS), tl.float32)
        for j in tl.static_range(SIZES):
            low, high = tl.load(bounds + j), tl.load(bounds + j + 1)
            score = _add_chunk(score, z, items, rows, columns, num_positions, num_items, low, high, width, WIDTH)
            scaled = score * tl.load(inverse + j)
            if CORRECTED:
                scaled += tl.load(offsets + columns, columns < num_items, 0.0)[None, :]
                ids = tl.load(item_ids + columns, columns < num_items, -2)
                scaled = tl.where(targets[:, None] == ids[None, :], LEFT_OUT, scaled)
            scaled = tl.where((columns < num_items)[None, :], scaled, LEFT_OUT)
            this = (which == j)[:, None]
            old = tl.max(tl.where(this, highest, LEFT_OUT), 0)
            new = tl.maximum(old, tl.max(scaled, 1))
            shares = tl.where(scaled > LEFT_OUT, tl.exp(scaled - new[:, None]), 0.0)
            old_total = tl.sum(tl.where(this, total, 0.0), 0)
            new_total = old_total * tl.exp(old - new) + tl.sum(shares, 1)
            highest = tl.where(this, new[None, :], highest)
            total = tl.where(this, new_total[None, :], total)
    at = (split * SIZES + which[:, None]) * num_positions + rows[None, :]
    inside = (which < SIZES)[:, None] & (rows < num_positions)[None, :]
    tl.store(highest_out + at, highest, inside)
    tl.store(total_out + at, total, inside)


@triton.jit
def _size_pull(
    score, j, inverse, lse, weights, position_rows, num_positions, offset, hit, outside,
    CORRECTED: tl.constexpr, MINE_ARE_POSITIONS: tl.constexpr,
):  # fmt: skip
    """weight · softmax of size j of a tile of scores [m, t], either of which are the positions."""
    inside = position_rows < num_positions
    own_lse = tl.load(lse + j * num_positions + position_rows, inside, 0.0)
    weight = tl.load(weights + j * num_positions + position_rows, inside, 0.0)
    scaled = score * tl.load(inverse + j)
    if CORRECTED:
        scaled += offset
        scaled = tl.where(hit, LEFT_OUT, scaled)
    if MINE_ARE_POSITIONS:
        pull = weight[:, None] * tl.exp(scaled - own_lse[:, None])
    else:
        pull = weight[None, :] * tl.exp(scaled - own_lse[None, :])
    return tl.where(outside, 0.0, pull)


@triton.jit
def _backward(
    mine, theirs, grad, bounds, inverse, lse, weights, offsets, item_ids, target_ids,
    num_mine, num_theirs, width,
    SIZES: tl.constexpr, CORRECTED: tl.constexpr, MINE_ARE_POSITIONS: tl.constexpr,
    MINE: tl.constexpr, THEIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    my_rows = tl.program_id(0) * MINE + tl.arange(0, MINE)
    for first in range(0, num_theirs, THEIRS):
        their_rows = first + tl.arange(0, THEIRS)
        outside = (my_rows >= num_mine)[:, None] | (their_rows >= num_theirs)[None, :]
        offset, hit = 0.0, outside
        if MINE_ARE_POSITIONS:
            position_rows, num_positions = my_rows, num_mine
            if CORRECTED:
                offset = tl.load(offsets + their_rows, their_rows < num_theirs, 0.0)[None, :]
                ids = tl.load(item_ids + their_rows, their_rows < num_theirs, -2)[None, :]
                hit = tl.load(target_ids + my_rows, my_rows < num_mine, -1)[:, None] == ids
        else:
            position_rows, num_positions = their_rows, num_theirs
            if CORRECTED:
                offset = tl.load(offsets + my_rows, my_rows < num_mine, 0.0)[:, None]
                ids = tl.load(item_ids + my_rows, my_rows < num_mine, -2)[:, None]
                hit = tl.load(target_ids + their_rows, their_rows < num_theirs, -1)[None, :] == ids
        score = tl.zeros((MINE, THEIRS), tl.float32)
        remainder = tl.zeros((MINE, THEIRS), tl.float32)
        for j in tl.static_range(SIZES):
            low, high = tl.load(bounds + j), tl.load(bounds + j + 1)
            score = _add_chunk(score, mine, theirs, my_rows, their_rows, num_mine, num_theirs, low, high, width, WIDTH)
            remainder += _size_pull(
                score, j, inverse, lse, weights, position_rows, num_positions, offset, hit, outside,
                CORRECTED, MINE_ARE_POSITIONS,
            )  # fmt: skip
        score = tl.zeros((MINE, THEIRS), tl.float32)
        for j in tl.static_range(SIZES):
            low, high = tl.load(bounds + j), tl.load(bounds + j + 1)
            for begin in range(low, high, WIDTH):
                channels = begin + tl.arange(0, WIDTH)
                b = tl.load(
                    theirs + their_rows[:, None] * width + channels[None, :],
                    (their_rows < num_theirs)[:, None] & (channels < high)[None, :],
                    0.0,
                )
                at = grad + my_rows[:, None] * width + channels[None, :]
                inside = (my_rows < num_mine)[:, None] & (channels < high)[None, :]
                product = tl.dot(remainder.to(b.dtype), b, input_precision="ieee")
                tl.store(at, tl.load(at, inside, 0.0) + product, inside)
            score = _add_chunk(score, mine, theirs, my_rows, their_rows, num_mine, num_theirs, low, high, width, WIDTH)
            remainder -= _size_pull(
                score, j, inverse, lse, weights, position_rows, num_positions, offset, hit, outside,
                CORRECTED, MINE_ARE_POSITIONS,
            )  # fmt: skip


class TritonLogSumExp(torch.autograd.Function):
    """:func:`fmrl_dist.losses.log_sum_exp.nested_log_sum_exp` with its arguments in order, and a correction's three."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        items: Tensor,
        sizes: Sequence[int],
        inverse: Sequence[float],
        offsets: Tensor | None,
        item_ids: Tensor | None,
        target_ids: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        z_in, items_in = z.to(dtype).contiguous(), items.to(dtype).contiguous()
        bounds = torch.tensor([0, *sizes], dtype=torch.int32, device=z.device)
        factors = torch.tensor(inverse, dtype=torch.float32, device=z.device)
        corrected = offsets is not None
        extra = [z_in if t is None else t.contiguous() for t in (offsets, item_ids, target_ids)]  # unread where None
        splits = max(triton.cdiv(len(items), ITEMS_OF_A_PROGRAM), 1)
        highest = torch.empty(splits, len(sizes), len(z), device=z.device)
        total = torch.empty_like(highest)
        if len(z) > 0:
            _forward[(triton.cdiv(len(z), BLOCK_POSITIONS), splits)](
                *(z_in, items_in, bounds, factors, *extra, highest, total, len(z), len(items), z.shape[1]),
                *(len(sizes), triton.next_power_of_2(len(sizes)), corrected),
                *(ITEMS_OF_A_PROGRAM, BLOCK_POSITIONS, BLOCK_ITEMS, BLOCK_WIDTH),
            )
        lse = (highest + total.log()).logsumexp(0)
        ctx.save_for_backward(z_in, items_in, bounds, factors, lse, *extra)
        ctx.rest = corrected, z.dtype
        return lse.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        z, items, bounds, factors, lse, *extra = ctx.saved_tensors
        corrected, dtype = ctx.rest
        weights = (grad_lse.float() * factors[:, None]).contiguous()
        finite_lse = lse.clamp_min(torch.finfo(torch.float32).min).contiguous()
        grads = []
        for mine, theirs, positions in ((z, items, True), (items, z, False)):
            grad = torch.zeros(mine.shape, dtype=torch.float32, device=mine.device)
            block, other = (BLOCK_POSITIONS, BLOCK_ITEMS) if positions else (BLOCK_ITEMS, BLOCK_POSITIONS)
            if len(mine) > 0 and len(theirs) > 0:
                _backward[(triton.cdiv(len(mine), block),)](
                    *(mine, theirs, grad, bounds, factors, finite_lse, weights, *extra),
                    *(len(mine), len(theirs), mine.shape[1]),
                    *(len(bounds) - 1, corrected, positions, block, other, BLOCK_WIDTH),
                )
            grads.append(grad.to(dtype))
        return (*grads, None, None, None, None, None, None)
