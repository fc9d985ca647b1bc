"""Distillation among the sizes of one model: every smaller size learns from the largest one's softmax, too.

N positions, V items, S sizes. Size i alone learns from the right item y, with the loss lse_i - s_iy. Here a share
α_i of its target is the softmax t of the largest size, which the loss over all sizes computes anyway:

    target       q_i = (1 - α_i)·onehot(y) + α_i·t,    t = softmax(s_S / κ), without a gradient
    gradient     of -Σ_v q_iv log softmax(s_i)_v = lse_i - (1 - α_i)·s_iy - α_i·Σ_v t_v s_iv

The largest size knows which other items would have been good answers; a small size that is told so need not find it in
single events. (Not in the paper.)

**The value of the loss stays lse_i - s_iy**, the cross-entropy with the right item, so that figures of runs with and
without distillation compare; just the gradient changes. So Σ_v t_v s_iv, "what the size is taught", is carried as a
zero with a gradient, and costs no pass over the items forward.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Normalizers(NamedTuple):
    """Of the softmaxes over some items."""

    sizes: Tensor  # [S, N], log Σ_v exp(s_iv) of each size
    teacher: Tensor | None = None  # [N], log Σ_v exp(s_Sv / κ), without a gradient; None without distillation
    taught: Tensor | None = None  # [S, N], zero, with the gradient of Σ_v t_v s_iv over these items


def without_value(x: Tensor) -> Tensor:
    """Zero, with the gradient of x."""
    return x - x.detach()


def merge(parts: Normalizers) -> Normalizers:
    """Normalizers over all items from those over W parts of them: sizes and taught [W, S, N], teacher [W, N]."""
    sizes = parts.sizes.logsumexp(0)
    if parts.teacher is None or parts.taught is None:
        return Normalizers(sizes)
    teacher = parts.teacher.logsumexp(0)
    shares = (parts.teacher - teacher).exp()  # of each part in t
    return Normalizers(sizes, teacher, (shares[:, None] * parts.taught).sum(0))


def cross_entropy(normalizers: Normalizers, own_SN: Tensor, distillation: tuple[float, ...] | None) -> Tensor:
    """Loss of each size summed over positions, [S], from the scores ``own_SN`` of the right items."""
    if distillation is None or normalizers.taught is None:
        return (normalizers.sizes - own_SN).sum(1)
    alpha = own_SN.new_tensor(distillation)[:, None]
    learned = own_SN + alpha * (normalizers.taught - without_value(own_SN))
    return (normalizers.sizes - learned).sum(1)
