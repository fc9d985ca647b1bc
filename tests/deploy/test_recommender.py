"""The recommender ranks as the evaluation does, at every size, for ids as users have them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import fmrl_dist
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.data.batches import EvaluationBlock, evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.evaluation.results.user_ranks import read_user_ranks
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN
from tests.fixtures.exports import export_here, random_export, random_recommender, vocabulary_bytes, write_random_export
from tests.fixtures.training import evaluate_here, make_shop, train_here

SIZES = (4, 8, 16)
WORDS = (
    *("--model.sizes", "[4, 8, 16]", "--model.width", 16, "--model.depth", 2, "--eval.size", 16),
    *(
        "--data.max_length",
        5,
        "--eval.cut_vectors",
        "true",
        "--model.input_norm",
        "true",
        "--model.output_norm",
        "true",
    ),
)


@pytest.fixture(
    scope="module",
    params=[(), ("--loss.normalize", "true", "--loss.temperatures", "[0.05, 0.05, 0.05]")],
    ids=["products", "cosines"],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop = make_shop(tmp_path_factory.mktemp("recommender"))
    return train_here(shop, shop.parent / "run", *WORDS, *request.param)


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The export of the largest size, evaluated user by user."""
    folder = export_here(run, 16)
    evaluate_here(folder, "--per-user")
    return folder


def blocks_of(run: Path) -> list[EvaluationBlock]:
    config = config_from_dict(load_checkpoint(run).config)
    store = Store.open(config.store.path)
    return list(evaluation_blocks(store, "test", config.data.max_length, range(len(store.manifest.splits["test"]))))


def histories_of(block: EvaluationBlock) -> list[np.ndarray]:
    return np.split(block.seen.numpy(), block.seen_starts[1:-1].tolist())


DEPLOYMENTS = [*((size, False) for size in SIZES), *((size, True) for size in SIZES[:-1])]


@pytest.mark.parametrize(("size", "vectors"), DEPLOYMENTS)
def test_target_ranks_are_the_evaluations(run: Path, whole: Path, size: int, vectors: bool) -> None:
    """Of every test user, among all items and among unseen ones; histories are longer than max_length, too."""
    recommender = Recommender.from_pretrained(whole, None if vectors else size, vectors=size if vectors else None)
    expected = read_user_ranks(whole / "evaluation-users.parquet")
    name = f"vectors-{size}" if vectors else str(size)
    found: dict[int, list[float]] = {ALL: [], UNSEEN: []}
    for block in blocks_of(run):
        histories, targets = histories_of(block), block.targets.tolist()
        outputs = recommender.encode(histories)
        for which in (ALL, UNSEEN):
            exclude = [h[h != t] for h, t in zip(histories, targets, strict=True)] if which == UNSEEN else None
            rows, scores = recommender.top_k(outputs, recommender.num_items, exclude)
            for user, target in enumerate(targets):
                place = rows[user].tolist().index(target)
                equal = np.flatnonzero(scores[user] == scores[user, place])
                found[which].append(1 + equal[0] + (len(equal) - 1) / 2)
    assert len(found[ALL]) > 80 and max(found[ALL]) > 10
    for which in (ALL, UNSEEN):
        assert found[which] == expected.ranks[which, name].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_the_checkpoint_at_every_size(run: Path, whole: Path, size: int) -> None:
    checkpoint = load_checkpoint(run)
    config = config_from_dict(checkpoint.config)
    large = build_recommender(checkpoint, config, Store.open(config.store.path), torch.device("cpu"))
    sliced, exported = (
        Recommender.from_pretrained(whole, size=size),
        Recommender.from_pretrained(whole if size == 16 else export_here(run, size, "--overwrite")),
    )
    for block in blocks_of(run):
        found = sliced.encode(histories_of(block))
        np.testing.assert_allclose(found, exported.encode(histories_of(block)), rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            z = large.model(large.items[block.items], block.starts, block.from_start)[block.starts[1:] - 1, :size]
        expected = torch.nn.functional.normalize(z) if large.normalize else z
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    np.testing.assert_allclose(sliced.item_vectors, exported.item_vectors, rtol=1e-6, atol=1e-6)
    histories = [["i3", "i14"], [], ["i5"] * 9]
    for lists in zip(sliced.recommend(histories), exported.recommend(histories), strict=True):
        first, second = ([item.item_id for item in found] for found in lists)
        assert first == second
    assert sliced.sizes == SIZES and exported.sizes == tuple(m for m in SIZES if m <= size)


def test_sessions_of_a_trained_model(run: Path, whole: Path) -> None:
    """Incremental is the full pass, to 1e-6 of the scores' magnitudes."""
    recommender = Recommender.from_pretrained(whole, size=8)
    for block in blocks_of(run)[:2]:
        for history in histories_of(block):
            last = history[-recommender.max_length :]
            session = recommender.session([recommender.item_ids[row] for row in last])
            found, expected = (
                z @ recommender.item_vectors.T for z in (session.output(), recommender.encode([history]))
            )
            magnitude = np.abs(recommender.encode([history])) @ np.abs(recommender.item_vectors.T)
            assert (np.abs(found - expected) <= 1e-6 * np.maximum(magnitude, 1)).all()


def test_from_pretrained(tmp_path: Path) -> None:
    folder = write_random_export(tmp_path / "export")
    recommender = fmrl_dist.Recommender.from_pretrained(folder)
    assert (recommender.size, recommender.sizes, recommender.max_length) == (16, (4, 8, 16), 6)
    assert recommender.num_items == 30 and recommender.item_ids[3] == "i3" and recommender.titles[3] == "title of i3"
    assert Recommender.from_pretrained(str(folder), size=8).width_of_vectors == 8
    cut = Recommender.from_pretrained(folder, vectors=4)
    assert (cut.size, cut.width_of_vectors, cut.encode([np.array([1])]).shape) == (16, 4, (1, 4))
    for options, complaint in [
        ({"size": 5}, "size 5 is not one of this export; expected one of [4, 8, 16]"),
        ({"size": "8"}, "size '8' is not one of this export; expected one of [4, 8, 16]"),
        ({"vectors": 5}, "vectors is 5; expected one of [4, 8, 16]"),
        ({"size": 8, "vectors": 4}, "vectors are cut of the whole network, of size 16; leave size or vectors out"),
        ({"revision": "v1"}, f"{folder} is a folder here, which has no revision 'v1'; leave revision out"),
    ]:
        with pytest.raises(UserError) as refused:
            Recommender.from_pretrained(folder, **options)  # type: ignore[arg-type]
        assert str(refused.value) == complaint
    shutil.copytree(folder, tmp_path / "damaged")
    table = pq.read_table(folder / "vocab.parquet")
    pq.write_table(table.slice(1), tmp_path / "damaged" / "vocab.parquet")
    with pytest.raises(UserError, match=r"vocab\.parquet is not what its sha256 says"):
        Recommender.from_pretrained(tmp_path / "damaged")


def test_an_export_without_a_rotation_has_no_cut_vectors() -> None:
    with pytest.raises(UserError, match="the export has no rotation, without which its vectors cannot be cut"):
        random_recommender(replace(random_export(), rotation=None), vectors=4)


def test_lists(tmp_path: Path) -> None:
    recommender = random_recommender()
    long = [f"i{item}" for item in range(12)]  # max_length is 6
    empty, seen, again = recommender.recommend([[], long, long], k=30)
    assert len(empty) == 30 and len(seen) == 18
    assert not {item.item_id for item in seen} & set(long), "also what the model no longer reads"
    assert empty[0].title == f"title of {empty[0].item_id}"
    assert [item.score for item in seen] == sorted((item.score for item in seen), reverse=True)
    assert [item.item_id for item in seen] == [item.item_id for item in again]
    whole = recommender.recommend([long], k=30, exclude_seen=False)[0]
    assert [item.item_id for item in whole if item.item_id not in long] == [item.item_id for item in seen]
    ids = [item.item_id for item in whole]
    assert [i.item_id for i in recommender.recommend([long], 30, False, deny=ids[:3])[0]] == ids[3:]
    assert [i.item_id for i in recommender.recommend([long], 2, False, allow=set(ids[4:]))[0]] == ids[4:6]
    per_user = recommender.recommend([long, long], 2, False, allow=[ids[7:8], None], deny=[None, ids[:1]])
    assert [[i.item_id for i in found] for found in per_user] == [ids[7:8], ids[1:3]]
    assert recommender.recommend([], 3) == []
    assert recommender.recommend([["gone", "i1"]], 3, unknown="skip") == recommender.recommend([["i1"]], 3)
    assert recommender.recommend([["i1"]], 3, deny=["gone"], unknown="skip") == recommender.recommend([["i1"]], 3)


def test_popularity_where_the_start_position_was_not_trained() -> None:
    recommender = random_recommender(random_export(predict_first=False))
    empty, other = recommender.recommend([[], ["i4"]], 2, deny=[["i0"], ["i1"]])
    assert [item.item_id for item in empty] == ["i1", "i2"]
    assert empty[0].score == pytest.approx(29 / 465)  # its share of training events
    assert [other] == recommender.recommend([["i4"]], 2, deny=["i1"])


def test_integer_ids() -> None:
    exported = random_export()
    vocabulary = ItemVocabulary(vocabulary_bytes(list(range(100, 130)), titles=False), "vocab.parquet")
    recommender = Recommender(exported, vocabulary)
    assert recommender.titles is None
    (found,) = recommender.recommend([np.array([103, 104])], 3)
    assert [found] == recommender.recommend([(103, 104)], 3)
    assert {type(item.item_id) for item in found} == {int} and found[0].title is None
    for wrong in ("103", 103.0, True, None, [103]):
        with pytest.raises(UserError, match="1 of 2 ids are of no item, such as .*; ids are like 100"):
            recommender.recommend([[103, wrong]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("histories", "complaint"),
    [
        (["i1", "i2"], "histories is ['i1', 'i2']; expected a list of histories, each a list of item ids: [[…], […]]"),
        ("i1", "histories is 'i1'; expected a list of histories"),
        ([["i1"], ["a", "b", "i2", "c", "d"]], "4 of 5 ids are of no item, such as 'a', 'b', 'c'; ids are like 'i0'"),
    ],
)
def test_refusals(histories: list[list[str]], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        random_recommender().recommend(histories)
    assert str(refused.value).startswith(complaint)


def test_histories_of_a_generator() -> None:
    """It can be read once; it is neither answered with nothing nor mistaken for a list of ids."""
    recommender = random_recommender()
    histories = [["i1", "i2"], [], ["i3"]]
    assert recommender.recommend(iter(histories), 3) == recommender.recommend(histories, 3)
    with pytest.raises(UserError, match="expected a list of histories"):
        recommender.recommend(iter(["i1", "i2"]))


def test_chunks_of_histories_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = random_recommender()
    generator = np.random.default_rng(0)
    histories = [generator.integers(0, 30, length) for length in generator.integers(0, 10, 40)]
    expected = np.concatenate([recommender.encode([history]) for history in histories])
    for num_histories in (1, 7, 256):
        monkeypatch.setattr("fmrl_dist.deploy.one_event.HISTORIES_IN_STEP", num_histories)
        np.testing.assert_allclose(recommender.encode(histories), expected, rtol=1e-5, atol=1e-5)
