"""A recommender that retrieves by a funnel: the same lists but for what the recall allows, in sessions too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.approximate import funnel
from fmrl_dist.deploy.recommender import Recommender
from tests.fixtures.exports import random_export, write_random_export


@pytest.fixture(autouse=True)
def no_catalogue_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a quick test's is searched by the funnel."""
    monkeypatch.setattr(funnel, "SMALL_CATALOGUE", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice") / "export"
    torch.manual_seed(0)
    write_random_export(folder, random_export(num_items=5000))
    return folder


@pytest.mark.parametrize("size", [8, 16])
def test_lists_are_nearly_the_exact_ones(folder: Path, size: int) -> None:
    exact = Recommender.from_pretrained(folder, size)
    quick = Recommender.from_pretrained(folder, size, retrieval="funnel", recall=0.9)
    assert exact.retrieval_record is None
    record = json.loads(json.dumps(quick.retrieval_record))
    assert record["recall"] == 0.9
    assert record["histories"] == "made up"
    histories = [exact.item_ids[user : user + 1 + user % 7] for user in range(300)]
    found, expected = (recommender.recommend(histories, 10) for recommender in (quick, exact))
    pairs = list(zip(found, expected, strict=True))
    assert np.mean([len({item.item_id for item in a} & {item.item_id for item in b}) / 10 for a, b in pairs]) > 0.9
    for items, history in zip(found, histories, strict=True):
        assert len(items) == 10 and not {item.item_id for item in items} & set(history)
    session = quick.session(histories[5])
    assert [item.item_id for item in session.recommend(10)] == [item.item_id for item in found[5]]


def test_a_prefix_is_of_the_rotation_for_searches(tmp_path: Path) -> None:
    """Of an older export, of its only rotation; of cut vectors and cut networks, of one that is learned."""
    exported = random_export(num_items=40)
    both = replace(exported, search_rotation=torch.linalg.qr(torch.randn(16, 16)).Q)
    for number, (given, expected) in enumerate(((exported, exported.rotation), (both, both.search_rotation))):
        folder = write_random_export(tmp_path / str(number), given)
        found = Recommender.from_pretrained(folder).model.rotation_of_vectors
        assert found is not None and expected is not None
        np.testing.assert_array_equal(found, expected.numpy())
        assert Recommender.from_pretrained(folder, size=8).model.rotation_of_vectors is None
        assert Recommender.from_pretrained(folder, vectors=8).model.rotation_of_vectors is None


def test_histories_of_users_can_be_given(folder: Path) -> None:
    recommender = Recommender.from_pretrained(folder)
    recommender.retrieve_by("funnel", 0.9, [recommender.item_ids[user : user + 3] for user in range(400)])
    assert recommender.retrieval_record is not None
    assert recommender.retrieval_record["histories"] == "given"
    assert recommender.retrieval_record["held_out_outputs"] == 200
    recommender.retrieve_by("exact")
    assert recommender.retrieval_record is None


def test_unknown_methods_and_few_histories_are_refused(folder: Path) -> None:
    recommender = Recommender.from_pretrained(folder)
    with pytest.raises(UserError, match="retrieval is 'hnsw'; expected one of exact, funnel, ann"):
        recommender.retrieve_by("hnsw")
    with pytest.raises(UserError, match="3 outputs to measure recall with; expected 200 or more"):
        recommender.retrieve_by("funnel", 0.9, [recommender.item_ids[:2]] * 3)
    assert recommender.retrieval_record is None
