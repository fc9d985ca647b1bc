"""The funnel's lists against exact ones: filters always exact, recall as promised, and no promise that is not kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.approximate import calibration, funnel
from fmrl_dist.deploy.approximate.calibration import calibrated_funnel
from fmrl_dist.deploy.approximate.funnel import FunnelSearch, Margins
from fmrl_dist.deploy.approximate.int8_prefix import Int8Prefix, RotatedInt8
from fmrl_dist.deploy.approximate.recall import ExactLists, least_recall, measured_recalls
from fmrl_dist.deploy.retrieval import top_k
from fmrl_dist.model.rotation import principal_rotation
from tests.fixtures.retrieval import filtered_cases, vectors_and_outputs

NUM_ITEMS = 6000


def small_search(vectors: np.ndarray, width: int, margin: float) -> FunnelSearch:
    rotation = np.eye(vectors.shape[1], dtype=np.float32)
    prefix = Int8Prefix.of_rotated(RotatedInt8.of_vectors(vectors, rotation), width)
    return FunnelSearch(vectors, rotation, prefix, Margins((1,), (margin,)))


def turned(outputs: np.ndarray) -> np.ndarray:
    """A rotation that need not be learned."""
    return principal_rotation(torch.from_numpy(outputs)).float().numpy()


@pytest.fixture(autouse=True)
def no_catalogue_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a quick test's is searched by the funnel."""
    monkeypatch.setattr(funnel, "SMALL_CATALOGUE", 0)


@pytest.fixture
def however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search is exact because the shortlist is long."""
    monkeypatch.setattr(funnel, "LONGEST_SHARE", 3)
    monkeypatch.setattr(funnel, "USERS_AT_ONCE", 2)


@pytest.mark.usefixtures("however_long")
@settings(deadline=None)
@given(case=filtered_cases(), width=st.integers(1, 4))
def test_a_margin_that_lets_all_in_gives_exact_lists(case: dict[str, Any], width: int) -> None:
    vectors = case.pop("vectors")
    search = small_search(vectors, min(width, vectors.shape[1]), 1e9)
    rows, scores = search.top_k(**case)
    expected_rows, expected_scores = top_k(vectors, **case)
    is_unseen = search.prefix.queries(case["outputs"]).unseen > 0  # of the others, a margin covers nothing
    np.testing.assert_array_equal(rows[is_unseen], expected_rows[is_unseen])
    np.testing.assert_array_equal(scores[is_unseen], expected_scores[is_unseen])
    assert rows.dtype == np.int64 and scores.dtype == np.float32


@pytest.mark.usefixtures("however_long")
@settings(deadline=None)
@given(case=filtered_cases(), margin=st.sampled_from([-1e9, -1.0, 0.0, 1.0]))
def test_filters_are_exact_whatever_the_margin(case: dict[str, Any], margin: float) -> None:
    vectors = case.pop("vectors")
    rows, scores = small_search(vectors, 1, margin).top_k(**case)
    allowed = top_k(vectors, case["outputs"], len(vectors), *(case[key] for key in ("exclude", "allow", "deny")))[0]
    for user, (found, possible) in enumerate(zip(rows, allowed, strict=True)):
        listed = found[found >= 0]
        assert len(set(listed)) == len(listed) == min(case["k"], (possible >= 0).sum())  # as many as there are
        assert set(listed) <= set(possible)
        np.testing.assert_array_equal(scores[user, : len(listed)], vectors[listed] @ case["outputs"][user])
        assert (scores[user, len(listed) :] == -np.inf).all()
        order = np.lexsort((listed, -scores[user, : len(listed)]))
        assert order.tolist() == list(range(len(listed)))  # by score, of equal ones by row


def test_recall_is_as_promised() -> None:
    vectors, outputs = vectors_and_outputs(NUM_ITEMS, 900)
    search, record = calibrated_funnel(vectors, outputs[:600], 0.95)  # with a rotation of its own
    assert record.width < vectors.shape[1]
    assert record.shortlist_mean < NUM_ITEMS / 20
    others = outputs[600:]
    recalls = []
    for filters in ({}, {"deny": top_k(vectors, others[:1], 2000)[0][0]}, {"exclude": top_k(vectors, others, 40)[0]}):
        found, exact = (search.top_k(others, 10, **filters), top_k(vectors, others, 10, **filters))
        recalls.append(np.mean([len(np.intersect1d(*rows)) / 10 for rows in zip(found[0], exact[0], strict=True)]))
    assert min(recalls) >= 0.95 - 0.01, recalls  # 300 other outputs: about three standard errors


def test_a_shortlist_that_is_too_short_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins that are too small for any outputs: the held-out ones say so, and widen them, or refuse."""
    vectors, outputs = vectors_and_outputs(NUM_ITEMS, 200)
    worst = turned(outputs)[:, ::-1].copy()  # the channels that carry least come first
    monkeypatch.setattr(calibration, "widths", lambda channels: [24])
    monkeypatch.setattr(
        calibration, "_margins", lambda funnel, exact, cutoffs, recall: Margins(cutoffs, (0.0,) * len(cutoffs))
    )
    search, record = calibrated_funnel(vectors, outputs, 0.95, worst)
    assert record.widenings > 0
    assert least_recall(record.held_out_recall) >= 0.95
    assert max(search.margins.values) > 0
    monkeypatch.setattr(calibration, "MAX_WIDENINGS", 0)
    with pytest.raises(UserError, match=r"recall is 0\.\d+ on held-out outputs; expected 0.95"):
        calibrated_funnel(vectors, outputs, 0.95, worst)


def test_equal_vectors_have_equal_scores_and_stand_in_the_order_of_rows() -> None:
    """Whatever block they are in; a list may miss one of them."""
    vectors, outputs = vectors_and_outputs(NUM_ITEMS, 300)
    search, _ = calibrated_funnel(np.concatenate((vectors, vectors)), outputs, 0.99, turned(outputs))
    rows, scores = search.top_k(outputs, 10)
    are_twins = rows[:, :-1] % NUM_ITEMS == rows[:, 1:] % NUM_ITEMS
    assert are_twins.sum() > 0.95 * 5 * len(outputs)
    assert (rows[:, :-1] < rows[:, 1:])[are_twins].all()
    np.testing.assert_array_equal(scores[:, :-1][are_twins], scores[:, 1:][are_twins])


@pytest.mark.parametrize(("recall", "count"), [(0.0, 400), (1.0, 400), (1.5, 400), (0.99, 100)])
def test_what_cannot_be_calibrated_is_refused(recall: float, count: int) -> None:
    vectors, outputs = vectors_and_outputs(300, count)
    with pytest.raises(UserError, match="expected"):
        calibrated_funnel(vectors, outputs, recall)


@pytest.mark.parametrize("num_users", [1, 3, 44, 63, 64])
def test_each_block_has_its_largest_product(num_users: int) -> None:
    """Whatever the tiles, which depend on the number of users; the last block repeats the last item."""
    vectors, outputs = vectors_and_outputs(70_001, num_users, 8)
    prefix = Int8Prefix.of_rotated(RotatedInt8.of_vectors(vectors, np.eye(8, dtype=np.float32)), 5)
    queries = prefix.queries(outputs)
    maxima = prefix.block_maxima(queries)
    assert maxima.shape == (num_users, prefix.num_blocks)
    for place in (0, 511, 512, prefix.num_blocks - 1):
        _, products = prefix.in_blocks(np.array([place]), queries.values[-1])
        assert products.max() == maxima[-1, place]


@pytest.mark.parametrize("width", [1, 7, 20])
def test_few_channels_and_few_items(width: int) -> None:
    vectors, outputs = vectors_and_outputs(50, 200, width)
    search, record = calibrated_funnel(vectors, outputs, 0.99, turned(outputs))
    assert least_recall(record.held_out_recall) == 1
    np.testing.assert_array_equal(search.top_k(outputs, 60)[0], top_k(vectors, outputs, 60)[0])


def test_small_catalogues_are_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(funnel, "SMALL_CATALOGUE", 1000)
    vectors, outputs = vectors_and_outputs(1000, 200)
    search, record = calibrated_funnel(vectors, outputs, 0.5)
    assert least_recall(record.held_out_recall) == 1
    np.testing.assert_array_equal(search.top_k(outputs, 10)[0], top_k(vectors, outputs, 10)[0])


def test_recall_is_counted_by_hand() -> None:
    """A search that misses the last item of each list; of equal ones, either counts."""

    def forgetful(outputs: np.ndarray, k: int, **filters: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, scores = top_k(vectors, outputs, k + 1, **filters)
        return np.delete(rows, k - 1, 1), np.delete(scores, k - 1, 1)

    vectors, outputs = vectors_and_outputs(1000, 300)
    recalls = measured_recalls(forgetful, ExactLists.of(vectors, outputs))
    assert set(recalls) == {"none", "best 100 excluded", "50.0% allowed", "12.5% allowed"}
    for by_length in recalls.values():
        for length, recall in by_length.items():
            assert recall == pytest.approx(1 - 1 / int(length), abs=0.02)  # but for what is equal after rounding
    vectors = np.repeat(vectors, 2, axis=0)
    assert measured_recalls(forgetful, ExactLists.of(vectors, outputs))["none"]["1"] == 1  # the second of two equals
