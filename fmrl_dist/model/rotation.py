"""Cut vectors: a rotation of outputs and item vectors, after which their first channels carry the most.

A *cut network* has all its weights cut to a size. *Cut vectors* keep the whole network, and cut only what is compared:
its outputs z and the item vectors e, both times one orthogonal matrix Q [D, D]. Scores of full width stay what they
were, (z Q)·(e Q) = z·e. Q starts from the directions in which outputs vary most, and then learns to rank as the whole
vectors do: at each size m it minimises the Kullback-Leibler divergence of softmax((z Q)_m·(e Q)_m) from softmax(z·e)
over some items. It stays orthogonal as Q₀ (I + A/2)⁻¹ (I - A/2), the Cayley transform of a skew-symmetric A.

n outputs, v items, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.model.nested import chunks

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


def learn_rotation(outputs: Tensor, items: Tensor, sizes: Sequence[int], temperature: float = 1.0) -> Tensor:
    """A rotation for vectors that are cut to each of ``sizes``; the same for the same arguments.

    Args:
        outputs: float32 [n, D], of the whole network; of unit length if scores are cosines.
        items: vectors of some items, float32 [v, D], likewise.
        sizes: to which vectors will be cut, each less than D.
        temperature: what scores are divided by before the softmax.

    Returns:
        Q, orthogonal, float32 [D, D].
    """
    start = principal_rotation(outputs)
    generator = torch.Generator().manual_seed(0)
    free = torch.zeros_like(start, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([free], LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        z = _draw(outputs, OUTPUTS_PER_STEP, generator) / temperature
        e = _draw(items, ITEMS_PER_STEP, generator)
        loss = _divergence(z, e, start.float() @ _cayley(free), sizes)
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


def _divergence(z: Tensor, e: Tensor, rotation: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean divergence of the cut vectors' softmax from that of the whole ones, summed over sizes, plus a constant."""
    whole = torch.softmax(z @ e.T, 1)
    z, e = z @ rotation, e @ rotation
    loss, scores = z.new_zeros(()), z.new_zeros(len(z), len(e))
    for first, last in chunks(tuple(sizes)):
        scores = scores + z[:, first:last] @ e[:, first:last].T
        loss = loss + F.cross_entropy(scores, whole)
    return loss


def rotate_tiles(items: Tensor, rotation: Tensor) -> Tensor:
    """Item vectors [v, D] times a rotation [D, D]: the same digits whatever run of tiles it is."""
    rotated = torch.empty_like(items)
    for first in range(0, len(items), ROTATED_ITEMS):
        torch.mm(items[first : first + ROTATED_ITEMS], rotation, out=rotated[first : first + ROTATED_ITEMS])
    return rotated
