"""A tile of the nested softmax as Triton kernels; the loop over tiles is :mod:`fmrl_dist.losses.tiled_log_sum_exp`.

n positions, v items, D width, S sizes. PyTorch's operators write the scores of every size to memory and read them again
for each step of the softmax. Here a program keeps a block of positions × items in registers from the products to the
result, so that only that is written: the log-sum-exp [S, n], or the gradients of the scores [S, n, v].

Forward, scores grow chunk by chunk, from the smallest size to the largest. Backward, a program computes the scores of
the largest size and subtracts one chunk after the other, because the gradient of a chunk's products sums over all sizes
that contain the chunk. The sizes within the first ``WIDTH`` channels share one load: each masks the other channels out.

Products' inputs are of the tensors' dtype, float32 as three TF32 products (as good as float32 to a few units in the
last place); sums and exponentials are float32. No atomics: two runs give the same bits. Loops over sizes are not
unrolled, and sizes are read from memory, so one compilation serves all sizes of a dtype.

Measured on an H100 (docs/performance.md): 0.2 … 0.9 of the time of PyTorch's operators.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmrl_dist.losses.settings import Correction

LEFT_OUT = tl.constexpr(-3.0e38)  # score of an item that a position does not see
POSITIONS, ITEMS = 128, 128  # of a block
SHARE_ITEMS = 1024  # over which one program sums
NUM_WARPS = 8
MIN_PADDED_SIZES = 8  # fewer sizes are padded to this number, which saves compilations
SCALARS = ("num_sizes", "num_narrow", "num_positions", "num_items")  # one compilation serves any value


@triton.jit
def _load_block(z, items, rows, columns, channels, high, num_positions, num_items, z_stride, item_stride):
    """Some channels below ``high`` of positions [n, c] and of items [c, v]."""
    inside = channels < high
    a = tl.load(
        z + rows[:, None] * z_stride + channels[None, :], (rows < num_positions)[:, None] & inside[None, :], 0.0
    )
    b = tl.load(
        items + columns[None, :] * item_stride + channels[:, None],
        (columns < num_items)[None, :] & inside[:, None],
        0.0,
    )
    return a, b


@triton.jit
def _add_products(
    score, z, items, rows, columns, low, high, num_positions, num_items, z_stride, item_stride,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """score [n, v] plus the product of channels low … high - 1."""
    for first in range(low, high, WIDTH):
        a, b = _load_block(
            z, items, rows, columns, first + tl.arange(0, WIDTH), high, num_positions, num_items, z_stride, item_stride
        )
        score = tl.dot(a, b, score, input_precision=PRECISION)
    return score


@triton.jit
def _chunk(bounds, j, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(tl.load(bounds + j), ALIGNMENT), tl.multiple_of(tl.load(bounds + j + 1), ALIGNMENT)


@triton.jit
def _fold(score, j, highest, total, inverse, offset, seen, SIZES: tl.constexpr):
    """The running maximum and sum [S, n] of size j, with the scores of a block added."""
    scaled = tl.where(seen, score * tl.load(inverse + j) + offset, LEFT_OUT)
    this = (tl.arange(0, SIZES) == j)[:, None]
    old = tl.max(tl.where(this, highest, LEFT_OUT), 0)
    new = tl.maximum(old, tl.max(scaled, 1))
    shares = tl.where(scaled > LEFT_OUT, tl.exp(scaled - new[:, None]), 0.0)
    new_total = tl.sum(tl.where(this, total, 0.0), 0) * tl.exp(old - new) + tl.sum(shares, 1)
    return tl.where(this, new[None, :], highest), tl.where(this, new_total[None, :], total)


@triton.jit
def _seen(
    rows, columns, offsets, item_ids, target_ids, num_positions, num_items, CORRECTED: tl.constexpr
):  # fmt: skip
    """What is added to the scores of a block, and which of its items each position sees."""
    is_column = columns < num_items
    seen = (rows < num_positions)[:, None] & is_column[None, :]
    offset = tl.zeros((1, columns.shape[0]), tl.float32)
    if CORRECTED:
        offset = tl.load(offsets + columns, is_column, 0.0)[None, :]
        targets = tl.load(target_ids + rows, rows < num_positions, -1)
        seen = seen & (targets[:, None] != tl.load(item_ids + columns, is_column, -2)[None, :])
    return offset, seen


@triton.jit(do_not_specialize=SCALARS)
def _log_sum_exp(
    z, items, bounds, inverse, offsets, item_ids, target_ids, result,
    num_sizes, num_narrow, num_positions, num_items, z_stride, item_stride,
    SIZES: tl.constexpr, CORRECTED: tl.constexpr, DISTILLED: tl.constexpr, ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr, SHARE: tl.constexpr, POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each size, and of the teacher, over ``SHARE`` items, result [shares, S, n] or [shares, S+1, n]."""
    rows = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    share = tl.program_id(1)
    narrow_channels = tl.arange(0, WIDTH)
    narrow_high = tl.multiple_of(tl.load(bounds + num_narrow), ALIGNMENT)
    highest = tl.full((SIZES, POSITIONS), LEFT_OUT, tl.float32)
    total = tl.zeros((SIZES, POSITIONS), tl.float32)
    for first in range(share * SHARE, tl.minimum((share + 1) * SHARE, num_items), ITEMS):
        columns = first + tl.arange(0, ITEMS)
        offset, seen = _seen(
            rows, columns, offsets, item_ids, target_ids, num_positions, num_items, CORRECTED
        )  # fmt: skip
        score = tl.zeros((POSITIONS, ITEMS), tl.float32)
        a, b = _load_block(
            z, items, rows, columns, narrow_channels, narrow_high, num_positions, num_items, z_stride, item_stride
        )
        for j in range(num_narrow):
            low, high = _chunk(bounds, j, ALIGNMENT)
            inside = (narrow_channels >= low) & (narrow_channels < high)
            score = tl.dot(tl.where(inside[None, :], a, 0.0), b, score, input_precision=PRECISION)
            highest, total = _fold(score, j, highest, total, inverse, offset, seen, SIZES)
        for j in range(num_narrow, num_sizes):
            low, high = _chunk(bounds, j, ALIGNMENT)
            score = _add_products(
                score, z, items, rows, columns, low, high, num_positions, num_items, z_stride, item_stride,
                WIDTH, PRECISION,
            )  # fmt: skip
            highest, total = _fold(score, j, highest, total, inverse, offset, seen, SIZES)
        if DISTILLED:
            highest, total = _fold(score, num_sizes, highest, total, inverse, offset, seen, SIZES)
    num_rows = num_sizes
    if DISTILLED:
        num_rows += 1
    sizes = tl.arange(0, SIZES)[:, None]
    at = (share * num_rows + sizes) * num_positions + rows[None, :]
    tl.store(result + at, highest + tl.log(total), (sizes < num_rows) & (rows < num_positions)[None, :])


@triton.jit
def _softmax(negated, j, inverse, offset, seen, lse, rows, num_positions):
    """Softmax of row j of a block, from the negated scores."""
    own_lse = tl.load(lse + j * num_positions + rows, rows < num_positions, 0.0)
    return tl.where(seen, tl.exp(offset - negated * tl.load(inverse + j) - own_lse[:, None]), 0.0)


@triton.jit
def _size_grad(
    negated, j, teacher, inverse, offset, seen, lse, weights, taught, rows, num_positions, DISTILLED: tl.constexpr
):
    """Gradient of the scores of size j of a block: weight · softmax, and what it is taught · teacher."""
    is_row = rows < num_positions
    weight = tl.load(weights + j * num_positions + rows, is_row, 0.0)
    grad = weight[:, None] * _softmax(negated, j, inverse, offset, seen, lse, rows, num_positions)
    if DISTILLED:
        grad += tl.load(taught + j * num_positions + rows, is_row, 0.0)[:, None] * teacher
    return grad


@triton.jit(do_not_specialize=SCALARS)
def _score_grads(
    z, items, bounds, inverse, offsets, item_ids, target_ids, lse, weights, taught, result,
    num_sizes, num_narrow, num_positions, num_items, z_stride, item_stride, result_stride,
    CORRECTED: tl.constexpr, DISTILLED: tl.constexpr, ALIGNMENT: tl.constexpr, PRECISION: tl.constexpr,
    POSITIONS: tl.constexpr, ITEMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """result[j] = Σ_{i ≥ j} weights_i · softmax_i + taught_i · teacher, [S, n, v].

    A chunk's products are subtracted after its size.
    """
    rows = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    columns = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    offset, seen = _seen(rows, columns, offsets, item_ids, target_ids, num_positions, num_items, CORRECTED)
    is_row = (rows < num_positions)[:, None]  # result's rows have room for all columns: written in wide pieces
    at = result + rows.to(tl.int64)[:, None] * result_stride + columns[None, :]
    size_stride = tl.cast(num_positions, tl.int64) * result_stride
    width = tl.multiple_of(tl.load(bounds + num_sizes), ALIGNMENT)
    negated = -_add_products(
        tl.zeros((POSITIONS, ITEMS), tl.float32), z, items, rows, columns, 0, width,
        num_positions, num_items, z_stride, item_stride, WIDTH, PRECISION,
    )  # fmt: skip
    teacher = tl.zeros((POSITIONS, ITEMS), tl.float32)
    if DISTILLED:
        teacher = _softmax(negated, num_sizes, inverse, offset, seen, lse, rows, num_positions)
    grad = tl.zeros((POSITIONS, ITEMS), tl.float32)
    for step in range(num_sizes - num_narrow):
        j = num_sizes - 1 - step
        grad += _size_grad(
            negated, j, teacher, inverse, offset, seen, lse, weights, taught, rows, num_positions, DISTILLED
        )  # fmt: skip
        tl.store(at + j * size_stride, grad, is_row)
        low, high = _chunk(bounds, j, ALIGNMENT)
        negated = _add_products(
            negated, z, items, rows, columns, low, high, num_positions, num_items, z_stride, item_stride,
            WIDTH, PRECISION,
        )  # fmt: skip
    narrow_channels = tl.arange(0, WIDTH)
    narrow_high = tl.multiple_of(tl.load(bounds + num_narrow), ALIGNMENT)
    a, b = _load_block(
        z, items, rows, columns, narrow_channels, narrow_high, num_positions, num_items, z_stride, item_stride
    )
    for step in range(num_narrow):
        j = num_narrow - 1 - step
        grad += _size_grad(
            negated, j, teacher, inverse, offset, seen, lse, weights, taught, rows, num_positions, DISTILLED
        )  # fmt: skip
        tl.store(at + j * size_stride, grad, is_row)
        low, high = _chunk(bounds, j, ALIGNMENT)
        inside = (narrow_channels >= low) & (narrow_channels < high)
        negated = tl.dot(tl.where(inside[None, :], a, 0.0), b, negated, input_precision=PRECISION)


class TritonTiles:
    """The kernels for the tiles of one loss.

    Args:
        sizes: trained sizes, the last one the width.
        inverse: 1 / τ of each size.
        teacher: 1 / κ of the teacher; None for no distillation.
        dtype: of the products' inputs: float32, bfloat16 or float16.
        device: of all tensors.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        inverse: Sequence[float],
        teacher: float | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._num_sizes = len(sizes)
        factors = list(inverse) if teacher is None else [*inverse, inverse[-1] * teacher]
        self._num_rows = len(factors)
        self._width = 32 if dtype == torch.float32 else 64  # channels of a block
        self._bounds = torch.tensor([0, *sizes], dtype=torch.int32, device=device)
        self._inverse = torch.tensor(factors, dtype=torch.float32, device=device)
        self._num_narrow = sum(size <= self._width for size in sizes)
        self._compiled_for: dict[str, Any] = {
            "DISTILLED": teacher is not None,
            "ALIGNMENT": 8 if all(size % 8 == 0 for size in sizes) else 1,
            "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
            "POSITIONS": POSITIONS,
            "ITEMS": ITEMS,
            "WIDTH": self._width,
            "num_warps": NUM_WARPS,
        }

    def log_sum_exp(self, z: Tensor, items: Tensor, correction: Correction | None) -> Tensor:
        """Log-sum-exp of each size, and of the teacher, over the items of a tile; -inf where a position sees no item.

        Args:
            z: [n, D], of the dtype of the products, rows contiguous.
            items: embeddings [v, D], likewise.
            correction: of these positions and items.

        Returns:
            float32 [S, n], or [S+1, n] with a teacher.
        """
        shares = max(triton.cdiv(len(items), SHARE_ITEMS), 1)
        result = z.new_empty(shares, self._num_rows, len(z), dtype=torch.float32)
        if len(z) > 0:
            _log_sum_exp[(triton.cdiv(len(z), POSITIONS), shares)](
                **self._arguments(z, items, correction),
                result=result,
                SIZES=max(triton.next_power_of_2(self._num_rows), MIN_PADDED_SIZES),
                SHARE=SHARE_ITEMS,
            )
        return result.logsumexp(0)

    def score_grads(
        self,
        z: Tensor,
        items: Tensor,
        correction: Correction | None,
        lse: Tensor,
        weights_Sn: Tensor,
        taught_Sn: Tensor | None,
    ) -> Tensor:
        """Gradients of each chunk's products: Σ_{i ≥ j} weights_i · softmax_i + taught_i · teacher over a tile's items.

        Args:
            z, items, correction: as in :meth:`log_sum_exp`.
            lse: over all items, float32 [S, n], or [S+1, n] with a teacher.
            weights_Sn: float32 [S, n].
            taught_Sn: float32 [S, n] with a teacher; otherwise None.

        Returns:
            [S, n, v], of z's dtype.
        """
        row = triton.cdiv(len(items), ITEMS) * ITEMS
        result = z.new_empty(self._num_sizes, len(z), row)
        if len(z) > 0 and len(items) > 0:
            _score_grads[(triton.cdiv(len(z), POSITIONS), triton.cdiv(len(items), ITEMS))](
                **self._arguments(z, items, correction),
                lse=lse.clamp_min(torch.finfo(torch.float32).min).contiguous(),
                weights=weights_Sn.contiguous(),
                taught=weights_Sn if taught_Sn is None else taught_Sn.contiguous(),
                result=result,
                result_stride=row,
            )
        return result[:, :, : len(items)]

    def _arguments(self, z: Tensor, items: Tensor, correction: Correction | None) -> dict[str, Any]:
        """What both kernels take."""
        assert z.stride(1) == items.stride(1) == 1, "rows are contiguous"
        three: dict[str, Tensor] = {"offsets": self._inverse, "item_ids": self._bounds, "target_ids": self._bounds}
        if correction is not None:  # else none of them is read
            three["offsets"] = correction.offsets.float().contiguous()
            three["item_ids"] = correction.item_ids.contiguous()
            three["target_ids"] = correction.target_ids.contiguous()
        return {
            "z": z,
            "items": items,
            "bounds": self._bounds,
            "inverse": self._inverse,
            **three,
            "num_sizes": self._num_sizes,
            "num_narrow": self._num_narrow,
            "num_positions": len(z),
            "num_items": len(items),
            "z_stride": z.stride(0),
            "item_stride": items.stride(0),
            "CORRECTED": correction is not None,
            **self._compiled_for,
        }
