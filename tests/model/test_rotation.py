"""Cut vectors: the rotation is orthogonal, leaves whole scores alone, and keeps more in fewer channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.model.rotation import ROTATED_ITEMS, learn_cuts, learn_rotation, principal_rotation, rotate_tiles


def vectors(count: int, width: int, seed: int) -> Tensor:
    """Vectors that vary much more in some hidden directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return torch.randn(count, width, generator=generator) * 0.8 ** torch.arange(width) @ mixing


@given(count=st.integers(1, 40), width=st.integers(1, 13), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_principal_rotation(count: int, width: int, seed: int) -> None:
    """Orthogonal, and its first m columns keep what the m largest singular values say, even with fewer vectors."""
    z = vectors(count, width, seed)
    rotation = principal_rotation(z)
    assert torch.allclose(rotation.T @ rotation, torch.eye(width).double(), atol=1e-9)
    kept = (z.double() @ rotation).square().sum(0)
    expected = torch.zeros(width).double()
    singular = torch.linalg.svdvals(z.double())
    expected[: len(singular)] = singular.square()
    assert torch.allclose(kept, expected, atol=1e-9 * float(kept.sum() + 1))


@pytest.mark.parametrize(("width", "sizes"), [(5, (1, 3)), (24, (3, 7, 16))])
def test_learned_rotation(width: int, sizes: tuple[int, ...]) -> None:
    z, e = vectors(300, width, 1), vectors(200, width, 2)
    rotation = learn_rotation(z, e, sizes)
    assert torch.equal(rotation, learn_rotation(z, e, sizes)), "the same for the same vectors"
    assert torch.allclose(rotation.T @ rotation, torch.eye(width), atol=1e-5)
    assert torch.allclose((z @ rotation) @ (e @ rotation).T, z @ e.T, atol=1e-4)
    start = principal_rotation(z).float()
    for size in sizes:
        assert divergence(z, e, rotation, size) < divergence(z, e, torch.eye(width), size)
    before, after = (sum(divergence(z, e, matrix, size) for size in sizes) for matrix in (start, rotation))
    assert after < 0.97 * before


def test_cuts_keep_the_largest_size_and_improve_the_others() -> None:
    """The largest keeps its channels; each smaller size comes nearer to the whole, by its own temperature."""
    sizes, width, temperatures = (4, 9, 20), 24, (0.4, 0.6, 0.9, 1.5)
    z, e = vectors(300, width, 1), vectors(200, width, 2)
    rotation = learn_cuts(z, e, sizes, temperatures)
    assert torch.equal(rotation, learn_cuts(z, e, sizes, temperatures)), "the same for the same vectors"
    assert torch.allclose(rotation.T @ rotation, torch.eye(width), atol=1e-5)
    assert torch.equal(rotation[20:], torch.eye(width)[20:]) and torch.equal(rotation[:, 20:], torch.eye(width)[:, 20:])
    kept = (z @ rotation)[:, :20] @ (e @ rotation)[:, :20].T
    assert torch.allclose(kept, z[:, :20] @ e[:, :20].T, atol=1e-4)

    def loss(matrix: Tensor, size: int, place: int) -> float:
        return divergence(z / temperatures[-1], e, matrix, size, temperatures[-1] / temperatures[place])

    for place, size in enumerate(sizes[:-1]):
        assert loss(rotation, size, place) < 0.9 * loss(torch.eye(width), size, place)
    of_others = learn_cuts(z, e, sizes, (1.0, 1.0, 1.0, 1.0))
    assert sum(loss(rotation, s, p) for p, s in enumerate(sizes[:-1])) < sum(
        loss(of_others, s, p) for p, s in enumerate(sizes[:-1])
    )
    assert torch.equal(learn_cuts(z, e, (9,), (0.6, 1.0)), torch.eye(width))  # nothing smaller to learn for


def divergence(z: Tensor, e: Tensor, rotation: Tensor, size: int, scale: float = 1.0) -> float:
    """KL of the softmax of cut scores from that of whole ones, over all items, by the textbook."""
    whole = torch.log_softmax(z @ e.T, 1)
    cut = torch.log_softmax(scale * (z @ rotation)[:, :size] @ (e @ rotation)[:, :size].T, 1)
    return float(F.kl_div(cut, whole, log_target=True, reduction="batchmean"))


def test_tiles_have_the_digits_of_the_whole() -> None:
    items, rotation = vectors(2 * ROTATED_ITEMS + 7, 24, 3), principal_rotation(vectors(50, 24, 4)).float()
    whole = rotate_tiles(items, rotation)
    assert torch.allclose(whole, items @ rotation, atol=1e-6)
    assert torch.equal(rotate_tiles(items[ROTATED_ITEMS:], rotation), whole[ROTATED_ITEMS:])
    assert rotate_tiles(items[:0], rotation).shape == (0, 24)
