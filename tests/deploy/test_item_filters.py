"""Removed items beside denied ones: they are left out for everybody, and held once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.item_filters import ItemFilters, RowsOfEach, lists_of_users, with_denied
from fmrl_dist.deploy.retrieval import top_k

REMOVED = np.array([2, 3, 7])


@pytest.mark.parametrize("deny", [None, [0, 3], np.array([0, 3]), [[0], None, [3, 9]], [None, [], None]])
def test_removed_rows_are_in_no_list(deny: RowsOfEach | None) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((10, 4)).astype(np.float32)
    outputs = draw.standard_normal((3, 4)).astype(np.float32)
    is_one_list = isinstance(deny, np.ndarray) or deny == [0, 3]
    of_each = [deny] * 3 if deny is None or is_one_list else deny
    expected = [[*REMOVED.tolist(), *([] if rows is None else rows)] for rows in of_each]
    denied = with_denied(deny, REMOVED)
    for users in ([0, 1, 2], [2], [1, 0]):
        found = top_k(vectors, outputs[users], 10, deny=lists_of_users(denied, users))
        wanted = top_k(vectors, outputs[users], 10, deny=[expected[user] for user in users])
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_removed_rows_are_not_repeated_for_each_user() -> None:
    """Of 300,000 for each of 64 users they would be 146 MiB, several times."""
    deny = with_denied([[1], *[None] * 63], np.arange(2, 300_000))
    tracemalloc.start()
    try:
        filters = ItemFilters.of_lists(64, 300_000, deny=deny)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert len(filters.without) == 299_998 and filters.excluded_of(0).tolist() == [1]


def test_denied_rows_are_checked() -> None:
    for deny, complaint in (([[10], [], []], "deny holds"), ([[1]], "deny has 1 lists; expected one for each of 3")):
        with pytest.raises(UserError, match=complaint):
            ItemFilters.of_lists(3, 10, deny=with_denied(deny, REMOVED))
