"""Exact lists are those of a sort of all scores, whatever the tiles, ties and filters."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy import retrieval
from fmrl_dist.deploy.retrieval import top_k


def sorted_lists(
    vectors: np.ndarray, outputs: np.ndarray, k: int, exclude: Any = None, allow: Any = None, deny: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The specification: sort every score of every user."""
    rows, scores = np.full((len(outputs), k), -1), np.full((len(outputs), k), -np.inf, np.float32)
    for user, all_scores in enumerate(outputs @ vectors.T):

        def of_user(lists: Any, user: int = user) -> Any:
            is_per_user = lists is not None and any(rows is None or isinstance(rows, list) for rows in lists)
            return lists[user] if is_per_user else lists

        allowed = of_user(allow)
        taken = set(range(len(vectors))) if allowed is None else set(allowed)
        taken -= {*(of_user(exclude) or ()), *(of_user(deny) or ())}
        best = sorted(taken, key=lambda row: (-all_scores[row], row))[:k]
        rows[user, : len(best)], scores[user, : len(best)] = best, all_scores[best]
    return rows, scores


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Vectors of small integers: products are exact, and many are equal."""
    num_users, num_items, width = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    one = st.lists(st.integers(0, num_items - 1), max_size=num_items)
    each = st.lists(st.none() | one, min_size=num_users, max_size=num_users)
    case = {
        "vectors": generator.integers(-2, 3, (num_items, width)).astype(np.float32),
        "outputs": generator.integers(-2, 3, (num_users, width)).astype(np.float32),
        "k": draw(st.integers(1, 50)),
        "exclude": draw(st.none() | each),
        "allow": draw(st.none() | one | each),
        "deny": draw(st.none() | one | each),
    }
    return case


@given(case=cases(), tile_items=st.integers(1, 50), users=st.integers(1, 6), groups=st.integers(1, 40))
def test_lists_are_those_of_a_sort(case: dict[str, Any], tile_items: int, users: int, groups: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "MIN_TILE_ITEMS", tile_items)
        patch.setattr(retrieval, "TILE_SCORES", 1)
        patch.setattr(retrieval, "USERS_AT_ONCE", users)
        patch.setattr(retrieval, "MIN_GROUPS", groups)
        rows, scores = top_k(**case)
    expected_rows, expected_scores = sorted_lists(**case)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert rows.dtype == np.int64 and scores.dtype == np.float32


def test_scores_of_zero_where_denormals_are_flushed() -> None:
    """As in every process of a training or a nightly job; no number lies between 0 and what is below it."""
    torch.set_flush_denormal(True)
    try:
        rows, scores = top_k(np.zeros((5000, 2), np.float32), np.ones((2, 2), np.float32), 3, exclude=[[0], []])
    finally:
        torch.set_flush_denormal(False)
    assert rows.tolist() == [[1, 2, 3], [0, 1, 2]] and scores.tolist() == [[0, 0, 0]] * 2


def test_large_lists_of_real_tiles() -> None:
    """Tiles, groups and blocks of users as they are."""
    generator = np.random.default_rng(0)
    vectors = generator.integers(-3, 4, (9000, 4)).astype(np.float32)  # thousands of ties
    outputs = generator.integers(-3, 4, (300, 4)).astype(np.float32)
    exclude = [generator.choice(9000, 50).tolist() for _ in range(300)]
    for k in (1, 10, 500):
        found, expected = top_k(vectors, outputs, k, exclude), sorted_lists(vectors, outputs, k, exclude)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_memory_does_not_grow_with_users_times_items() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((20_000, 4), dtype=np.float32)
    outputs = generator.standard_normal((1000, 4), dtype=np.float32)
    tracemalloc.start()
    try:
        top_k(vectors, outputs, 10, allow=np.arange(5000))
        top_k(vectors, outputs, 10)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # all scores take 76 MiB
    finally:
        tracemalloc.stop()


def test_nothing_left() -> None:
    rows, scores = top_k(np.ones((3, 2), np.float32), np.ones((1, 2), np.float32), 2, exclude=[[0, 1, 2]])
    assert rows.tolist() == [[-1, -1]] and scores.tolist() == [[-np.inf, -np.inf]]
    rows, scores = top_k(np.ones((3, 2), np.float32), np.empty((0, 2), np.float32), 2)
    assert rows.shape == scores.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"k": 0}, "k is 0; expected 1 or more items"),
        ({"k": True}, "k is True; expected 1 or more items"),
        ({"exclude": [[0]]}, "exclude has 1 lists; expected one for each of 2 users"),
        ({"exclude": [[3], []]}, "exclude holds [3]; expected rows of items, from 0 to 2"),
        ({"deny": [-1]}, "deny holds [-1]; expected rows of items, from 0 to 2"),
        ({"allow": [0.5]}, "allow holds [0.5]; expected rows of items, from 0 to 2"),
        ({"outputs": np.full((2, 2), np.nan)}, "outputs are not finite: they cannot be ranked with"),
        ({"outputs": np.ones((2, 3))}, "outputs have the shape [2, 3]; expected [users, 2]"),
    ],
)
def test_refusals(arguments: dict[str, Any], complaint: str) -> None:
    sound: dict[str, Any] = {"vectors": np.ones((3, 2), np.float32), "outputs": np.ones((2, 2), np.float32), "k": 1}
    with pytest.raises(UserError) as refused:
        top_k(**sound | arguments)
    assert str(refused.value) == complaint
