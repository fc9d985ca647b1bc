"""Borrowed ids against their definition, item by item, whatever the tiles."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrl_dist.deploy.catalogue import borrowed_ids as module
from fmrl_dist.deploy.catalogue.borrowed_ids import borrowed_ids


def plain_borrowed_ids(of_features: Tensor, id_table: Tensor, items: Tensor) -> Tensor:
    width = id_table.shape[1]
    trained = [item for item in range(len(id_table)) if id_table[item].any()]
    result = torch.zeros(len(of_features), width)
    for number, new in enumerate(of_features):
        cosines = []
        for item in trained:
            features = items[item].clone()
            features[:width] -= id_table[item]
            cosines.append(float(F.cosine_similarity(new, features, 0)))
        if trained:
            result[number] = 0.8 * id_table[trained[max(range(len(cosines)), key=cosines.__getitem__)]]
    return result


@settings(max_examples=60)
@given(
    st.integers(0, 9), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**16)
)
def test_each_new_item_borrows_from_the_nearest(
    num_new: int, num_items: int, width: int, tile: int, share_trained: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    of_features = torch.randn(num_new, 6, generator=generator)
    id_table = torch.randn(num_items, width, generator=generator)
    id_table[torch.rand(num_items, generator=generator) >= share_trained] = 0
    items = torch.randn(num_items, 6, generator=generator)
    with mock.patch.multiple(module, NEW_AT_ONCE=tile, KNOWN_AT_ONCE=tile + 1):
        found = borrowed_ids(of_features, id_table, items)
    torch.testing.assert_close(found, plain_borrowed_ids(of_features, id_table, items), rtol=0, atol=0)


def test_of_equally_near_items_the_first_lends_and_untrained_ones_never() -> None:
    of_features = torch.tensor([[2.0, 0.0]])
    id_table = torch.tensor([[0.0], [3.0], [5.0]])
    items = torch.tensor([[1.0, 0.0], [4.0, 0.0], [6.0, 0.0]])  # without ids all are [1, 0]
    assert borrowed_ids(of_features, id_table, items).tolist() == [[pytest.approx(2.4)]]
    assert borrowed_ids(of_features, torch.zeros(3, 1), items).tolist() == [[0.0]]
