"""Equal rows stay equal, to the last bit, whatever the shape and the place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.evaluation.target_ranks import nested_tile_scores
from fmrl_dist.model.embed_catalogue import embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.rotation import rotate_tiles
from fmrl_dist.model.row_products import linear_of_rows

LENGTHS = st.integers(1, 40) | st.sampled_from([62, 97, 128, 255, 385])


@settings(deadline=None, max_examples=100)
@given(rows=LENGTHS, depth=LENGTHS, width=LENGTHS, seed=st.integers(0, 99), threads=st.sampled_from([1, 2]))
def test_a_row_depends_on_nothing_else(rows: int, depth: int, width: int, seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(rows, depth), torch.randn(width, depth)
        whole = linear_of_rows(x, weight)
        torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
        assert torch.equal(linear_of_rows(x[:1], weight), whole[:1])
        assert torch.equal(linear_of_rows(x.flip(0), weight), whole.flip(0))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("size", [4, 8, 12, 20])
@pytest.mark.parametrize("dim", [5, 6, 97])
@pytest.mark.parametrize("encoder", [{}, {"item_encoder": "unisrec", "experts": 3}], ids=["projection", "unisrec"])
def test_items_with_equal_features_tie(size: int, dim: int, encoder: dict[str, object]) -> None:
    """Their embeddings, their scores at every size, and their rotated vectors are equal bits."""
    torch.manual_seed(0)
    model = FMRLRec((4, size) if size > 4 else (4,), depth=1, feature_dims={"text": dim}, **encoder)  # type: ignore[arg-type]
    model.eval()
    for num_items in (33, 60, 255):
        values = torch.randn(1, dim).repeat(num_items, 1)
        values[::3] = torch.randn(len(values[::3]), dim)
        items = embed_catalogue(model.encoder, values, torch.ones(num_items, 1, dtype=torch.bool))
        rotation = torch.linalg.qr(torch.randn(size, size))[0]
        for vectors in (items, rotate_tiles(items, rotation)):
            same = vectors[[row for row in range(num_items) if row % 3]]
            assert torch.equal(same, same[:1].expand_as(same))
            for num_users in (1, 3, 7, 64):
                for scores in nested_tile_scores(torch.randn(num_users, size), same, model.sizes, normalize=True):
                    assert torch.equal(scores, scores[:, :1].expand_as(scores))
