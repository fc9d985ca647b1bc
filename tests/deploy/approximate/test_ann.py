"""The index's lists against exact ones: filters always exact, recall as promised, and no promise that is not kept."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.approximate.ann import AnnSearch, built_index, calibrated_ann
from fmrl_dist.deploy.approximate.recall import least_recall
from fmrl_dist.deploy.retrieval import top_k
from tests.fixtures.retrieval import filtered_cases, vectors_and_outputs

pytest.importorskip("faiss", reason="needs the extra ann")
NUM_ITEMS = 6000


@settings(deadline=None)
@given(case=filtered_cases(), probes=st.integers(1, 8))
def test_filters_are_exact_whatever_the_cells(case: dict[str, Any], probes: int) -> None:
    vectors = case.pop("vectors")
    search = AnnSearch(vectors, built_index(vectors), {share: {1: probes, 1000: probes} for share in (1.0, 0.2)})
    rows, scores = search.top_k(**case)
    allowed = top_k(vectors, case["outputs"], len(vectors), *(case[key] for key in ("exclude", "allow", "deny")))[0]
    for user, (found, possible) in enumerate(zip(rows, allowed, strict=True)):
        listed = found[found >= 0]
        assert len(set(listed)) == len(listed) == min(case["k"], (possible >= 0).sum())  # as many as there are
        assert set(listed) <= set(possible)
        np.testing.assert_array_equal(scores[user, : len(listed)], vectors[listed] @ case["outputs"][user])
        assert np.lexsort((listed, -scores[user, : len(listed)])).tolist() == list(range(len(listed)))
    assert rows.dtype == np.int64 and scores.dtype == np.float32


def test_recall_is_as_promised() -> None:
    vectors, outputs = vectors_and_outputs(NUM_ITEMS, 900)
    search, record = calibrated_ann(vectors, outputs[:600], 0.95)
    assert record.probes["1"]["10"] < record.cells / 2
    assert least_recall(record.held_out_recall) >= 0.95
    others = outputs[600:]
    cases: list[dict[str, Any]] = [
        {},
        {"deny": top_k(vectors, others[:1], 2000)[0][0]},
        {"exclude": top_k(vectors, others, 40)[0]},
        {"exclude": top_k(vectors, others, 400)[0]},  # more than was measured
    ]
    recalls = []
    for filters in cases:
        found, exact = (search.top_k(others, 10, **filters), top_k(vectors, others, 10, **filters))
        recalls.append(np.mean([len(np.intersect1d(*rows)) / 10 for rows in zip(found[0], exact[0], strict=True)]))
    assert min(recalls) >= 0.95 - 0.01, recalls  # 300 other outputs: about three standard errors


def test_too_few_cells_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, outputs = vectors_and_outputs(NUM_ITEMS, 400)
    chosen = "fmrl_dist.deploy.approximate.ann._chosen_probes"
    monkeypatch.setattr(chosen, lambda *_: {share: dict.fromkeys((1, 10, 100), 1) for share in (1.0, 0.5, 0.125)})
    _, record = calibrated_ann(vectors, outputs, 0.95)
    assert record.probes["1"]["10"] > 1
    assert least_recall(record.held_out_recall) >= 0.95
    monkeypatch.setattr("fmrl_dist.deploy.approximate.ann._widen", lambda *_: False)
    with pytest.raises(UserError, match=r"recall is 0\.\d+ on held-out outputs; expected 0.95"):
        calibrated_ann(vectors, outputs, 0.95)


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors, outputs = vectors_and_outputs(300, 200)
    with pytest.raises(UserError, match=r"pip install 'fmrl-dist\[ann\]'"):
        calibrated_ann(vectors, outputs)
