"""Rotations of outputs and item vectors, after which a few of their first channels nearly say what all do.

Outputs z and item vectors e are both multiplied by one orthogonal matrix Q [D, D], so whole scores stay what they were,
(z Q)·(e Q) = z·e. Q learns to rank as the whole vectors do: at each size m it minimises the Kullback-Leibler divergence
of softmax((z Q)_m·(e Q)_m / τ) from softmax(z·e / τ_D) over some items. It stays orthogonal as
Q₀ (I + A/2)⁻¹ (I - A/2), the Cayley transform of a skew-symmetric A. There are two of them:

    learn_cuts      for *cut vectors*, the whole network's vectors cut to trained sizes. Starts from channels as they
                    were trained, with τ of each size, and leaves the largest of these sizes as it is.
    learn_rotation  for a search's prefix, whose scores bound whole ones; and for cut vectors where it ranks better.
                    Starts from the directions in which outputs vary most, with the τ of whole scores at every width.

n outputs, v items, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.model.nested import chunks
from fmrl_dist.model.row_products import linear_of_rows

ROTATED_ITEMS = 4096  # at once: a product rounds by its shape
STEPS, LEARNING_RATE = 200, 6e-3  # of Adam; the rate falls to 0 in a straight line
OUTPUTS_PER_STEP, ITEMS_PER_STEP = 256, 1500


def principal_rotation(outputs: Tensor) -> Tensor:
    """Eigenvectors of Σ z zᵀ as columns, the largest eigenvalue first: orthogonal, float64 [D, D].

    No other m directions keep more of the outputs' squared length than the first m. Each column's sign is chosen so
    that its largest entry is positive.
    """
    z = outputs.double()
    vectors = torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def learn_cuts(outputs: Tensor, items: Tensor, sizes: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """A rotation for vectors that are cut to each of some trained sizes; the same for the same arguments.

    Vectors cut to the last of ``sizes`` are scored as the network of that size was trained to score; its channels are
    rotated among themselves, for the smaller sizes.

    Args:
        outputs: float32 [n, D], of the whole network; of unit length if scores are cosines.
        items: vectors of some items, float32 [v, D], likewise.
        sizes: trained ones, each less than D.
        temperatures: what scores of each of ``sizes`` and, last, whole ones are divided by in training.

    Returns:
        Q, orthogonal, float32 [D, D].
    """
    rotation = torch.eye(outputs.shape[1], device=outputs.device)
    *smaller, kept = sizes
    if smaller:
        start = torch.eye(kept, dtype=torch.float64, device=outputs.device)
        scales = [temperatures[-1] / temperature for temperature in temperatures[: len(smaller)]]
        rotation[:kept, :kept] = _learn(outputs / temperatures[-1], items, start, smaller, scales)
    return rotation


def learn_rotation(outputs: Tensor, items: Tensor, sizes: Sequence[int], temperature: float = 1.0) -> Tensor:
    """A rotation whose first channels carry the most, at each of ``sizes``; the same for the same arguments.

    Args:
        outputs: float32 [n, D], of the whole network; of unit length if scores are cosines.
        items: vectors of some items, float32 [v, D], likewise.
        sizes: of prefixes, each less than D.
        temperature: what scores are divided by before the softmax.

    Returns:
        Q, orthogonal, float32 [D, D].
    """
    return _learn(outputs / temperature, items, principal_rotation(outputs), sizes, [1.0] * len(sizes))


def _learn(outputs: Tensor, items: Tensor, start: Tensor, sizes: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Rotate the first w channels from ``start``, float64 [w, w]; scores of each size are multiplied by its scale."""
    generator = torch.Generator().manual_seed(0)
    free = torch.zeros_like(start, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([free], LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        z, e = _draw(outputs, OUTPUTS_PER_STEP, generator), _draw(items, ITEMS_PER_STEP, generator)
        loss = _divergence(z, e, start.float() @ _cayley(free), sizes, scales)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (start @ _cayley(free.detach().double())).float()


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Some of the rows, or all if there are not so many."""
    if len(rows) <= count:
        return rows
    return rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]


def _cayley(free: Tensor) -> Tensor:
    """The orthogonal matrix of the skew-symmetric part of any matrix [D, D]."""
    half = (free - free.T) / 2
    identity = torch.eye(len(free), dtype=free.dtype, device=free.device)
    orthogonal: Tensor = torch.linalg.solve(identity + half, identity - half)
    return orthogonal


def _divergence(z: Tensor, e: Tensor, rotation: Tensor, sizes: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Mean divergence of the cut vectors' softmax from that of the whole ones, summed over sizes, plus a constant."""
    whole = torch.softmax(z @ e.T, 1)
    z, e = (rows[:, : len(rotation)] @ rotation for rows in (z, e))
    loss, scores = z.new_zeros(()), z.new_zeros(len(z), len(e))
    for (first, last), scale in zip(chunks(tuple(sizes)), scales, strict=True):
        scores = scores + z[:, first:last] @ e[:, first:last].T
        loss = loss + F.cross_entropy(scores * scale, whole)
    return loss


def rotate_tiles(items: Tensor, rotation: Tensor) -> Tensor:
    """Item vectors [v, D] times a rotation [D, D]: the same digits whatever run of tiles it is."""
    rotated = torch.empty_like(items)
    for first in range(0, len(items), ROTATED_ITEMS):
        rotated[first : first + ROTATED_ITEMS] = linear_of_rows(items[first : first + ROTATED_ITEMS], rotation.T)
    return rotated
