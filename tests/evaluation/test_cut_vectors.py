"""Both deployments are ranked, reported and exported; cut vectors are what they say, by a naive computation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from fmrl_dist import evaluate, export
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.checkpoint.export.files import ITEMS_FILE, ROTATION_FILE, VECTORS_FILE
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation import cut_vectors
from fmrl_dist.evaluation.cut_vectors import VectorSample, fit_rotations, mean_ndcg
from fmrl_dist.model.export_config import CONFIG_FILE
from shards.store.builder import build_store
from tests.fixtures.processes import run_processes
from tests.fixtures.stores import write_histories
from tests.fixtures.training import (
    evaluate_here,
    evaluation,
    make_shop,
    refusal,
    run_here,
    shop_values,
    train_here,
    write_shop,
)

SIZES = (4, 8, 16)
WORDS = (
    "--eval.cut_vectors",
    "true",
    "--model.sizes",
    "[4, 8, 16]",
    "--model.width",
    16,
    "--model.depth",
    2,
    "--eval.size",
    16,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop = make_shop(tmp_path_factory.mktemp("vectors"))
    return train_here(shop, shop.parent / "run", *WORDS, "--eval.metrics", "[recall, ndcg, mrr, coverage]")


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """An export of the whole network, with vectors cut to 4 channels."""
    run_here(export.main, ["--checkpoint", run, "--size", 16, "--vectors", 4])
    return run / "export-16"


def naive_ndcg(folder: Path, size: int, masked: bool) -> float:
    """NDCG@10 on the test users of an export's vectors, user by user."""
    recommender = read_export(folder)
    rotation, items = load_file(folder / ROTATION_FILE)["rotation"], recommender.items
    vectors = items.numpy() @ rotation
    store = Store.open(recommender.origin.store)
    gains = []
    numbers = range(len(store.manifest.splits["test"]))
    for block in evaluation_blocks(store, "test", recommender.max_length, numbers):
        for user, target in enumerate(block.targets.tolist()):
            history = block.items[block.starts[user] : block.starts[user + 1]]
            with torch.no_grad():
                z = recommender.model(items[history], torch.tensor([0, len(history)]), torch.tensor([False]))[-1]
            scores = (z.numpy() @ rotation)[:size] @ vectors[:, :size].T
            others = set(range(len(items))) - {target}
            if masked:
                others -= set(block.seen[block.seen_starts[user] : block.seen_starts[user + 1]].tolist())
            rank = 1 + sum(scores[other] > scores[target] for other in others)
            gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0)
    return float(np.mean(gains))


def test_figures_are_those_of_a_naive_computation(run: Path, whole: Path) -> None:
    result = evaluation(run)
    assert list(result["vectors"]) == list(result["masked"]["vectors"]) == ["4", "8"]
    evaluate_here(whole, "--metrics", "recall,ndcg,mrr,coverage")
    exported = evaluation(whole)
    assert exported["vectors"] == result["vectors"] and exported["sizes"] == result["sizes"]
    assert list(result["vector_lists"]) == ["4", "8"]
    for size in ("4", "8"):
        assert abs(result["vectors"][size]["ndcg@10"] - naive_ndcg(whole, int(size), masked=False)) < 1e-9
        assert abs(result["masked"]["vectors"][size]["ndcg@10"] - naive_ndcg(whole, int(size), masked=True)) < 1e-9


def random_sample(num_users: int = 40, num_items: int = 30, width: int = 16) -> VectorSample:
    """With ten items left out for each user."""
    generator = torch.Generator().manual_seed(0)
    left_out = torch.stack([torch.randperm(num_items, generator=generator)[:10] for _ in range(num_users)])
    users = torch.arange(num_users).repeat_interleave(10)
    outputs, targets = (torch.randn(num_users, width, generator=generator) for _ in range(2))
    items = torch.randn(num_items, width, generator=generator)
    return VectorSample(outputs, targets, items, torch.stack((users, left_out.flatten())))


@pytest.mark.parametrize("normalize", [False, True])
def test_what_chooses_a_rotation_is_a_naive_ndcg(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_vectors, "USERS_AT_ONCE", 7)
    sample, rotation = random_sample(), torch.linalg.qr(torch.randn(16, 16)).Q
    hidden = {pair for pair in zip(*sample.left_out.tolist(), strict=True)}
    gains = []
    for size in (4, 8):
        z, own, items = (
            (rows @ rotation)[:, :size].double() for rows in (sample.outputs, sample.targets, sample.items)
        )
        if normalize:
            own, items = own / own.norm(dim=1, keepdim=True), items / items.norm(dim=1, keepdim=True)
        for user in range(40):
            others = [item for item in range(30) if (user, item) not in hidden]
            rank = 1 + sum(float(z[user] @ items[other]) > float(z[user] @ own[user]) for other in others)
            gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    assert mean_ndcg(sample, rotation, (4, 8), normalize) == pytest.approx(np.mean(gains), abs=1e-6)
    assert 0 < np.mean(gains) < 1


@pytest.mark.parametrize("better", [0, 1])
def test_the_rotation_that_finds_more_targets_is_taken(better: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that say something come first or last; the search's rotation stays what it is."""
    sample, matrices = random_sample(), (torch.eye(16), torch.eye(16).flip(0))
    told = torch.zeros(16)
    told[:8] = 1.0
    z = sample.outputs * (told if better == 0 else told.flip(0)) * 5
    monkeypatch.setattr(cut_vectors, "learn_cuts", lambda *_: matrices[0])
    monkeypatch.setattr(cut_vectors, "learn_rotation", lambda *_: matrices[1])
    ranker = SimpleNamespace(model=SimpleNamespace(sizes=(4, 8, 16)), temperatures=(), normalize=False)
    of_cuts, of_search = fit_rotations(ranker, replace(sample, outputs=z, targets=z))  # type: ignore[arg-type]
    assert of_cuts is matrices[better] and of_search is matrices[1]


def test_pairs_of_users_and_items_in_a_sample() -> None:
    known, users = np.array([7, 2, 9]), np.array([0, 0, 1, 1, 2])
    assert cut_vectors._among(known, users, np.array([2, 3, 9, 7, 10])).tolist() == [[0, 1, 1], [1, 2, 0]]
    assert cut_vectors._among(known[:0], users, users).shape == (2, 0)


def test_users_ranks_are_kept(run: Path) -> None:
    table = pq.read_table(run / "evaluation-users.parquet")
    ranks = table.column("masked_rank@vectors-8").to_numpy()
    expected = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
    assert abs(expected - evaluation(run)["masked"]["vectors"]["8"]["ndcg@10"]) < 1e-9


def test_files_of_an_export(whole: Path) -> None:
    """The whole vectors score as the embeddings do, and the cut ones are their first channels."""
    rotation, items = load_file(whole / ROTATION_FILE)["rotation"], load_file(whole / ITEMS_FILE)["item_embeddings"]
    assert rotation.shape == (16, 16) and np.allclose(rotation.T @ rotation, np.eye(16), atol=1e-5)
    assert np.allclose(load_file(whole / VECTORS_FILE)["item_vectors"], (items @ rotation)[:, :4], atol=1e-6)
    assert json.loads((whole / CONFIG_FILE).read_text())["vectors"] == 4


def test_without_cut_vectors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    evaluate_here(copy, "--no-cut-vectors")
    assert "vectors" not in evaluation(copy) and "cut vectors" not in capsys.readouterr().out
    evaluate_here(copy, "--metrics", "recall,ndcg,mrr,coverage")
    assert evaluation(copy)["vectors"] == evaluation(run)["vectors"]
    assert "cut vectors: the whole network" in capsys.readouterr().out


def test_parts_have_both(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    for part in ("1/2", "2/2"):
        run_here(evaluate.main, ["--checkpoint", copy, "--part", part])
    evaluate_here(copy, "--join")
    assert evaluation(copy)["vectors"] == evaluation(run)["vectors"]


@pytest.mark.parametrize("vectors", [17, 5, -1])
def test_impossible_vectors_are_refused(run: Path, tmp_path: Path, vectors: int) -> None:
    words = ("--checkpoint", run, "--size", 16, "--output", tmp_path / "new", "--vectors", vectors)
    assert f"--vectors is {vectors}; expected one of the trained sizes up to 16" in refusal(export.main, *words)
    assert not (tmp_path / "new").exists()


def evaluated_together(copy: str) -> None:
    evaluate_here(copy)


@pytest.mark.multiproc
def test_two_processes_have_the_digits_of_one(run: Path, tmp_path: Path) -> None:
    """The rotation is learned by one of them, which may not be the other's to the last bit."""
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / name, symlinks=True)
    evaluate_here(tmp_path / "one")
    run_processes(2, evaluated_together, str(tmp_path / "two"))
    assert evaluation(tmp_path / "two") == evaluation(tmp_path / "one")


def test_a_catalogue_without_users_has_no_rotation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing says how to rotate, so no file claims to: vectors that are asked for are refused."""
    values = shop_values(tmp_path)
    write_shop(tmp_path / "raw")
    write_histories(tmp_path / "raw" / "sequences.parquet", {"u0": ["i0", "i1"], "u1": ["i2", "i3"]})
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(values))
    build_store(load_config(config))
    words = ["--checkpoint", run, "--size", 16, "--store", values["store"]["path"], "--output", tmp_path / "new"]
    assert "has no validation users, whose outputs say how to rotate" in refusal(export.main, *words, "--vectors", 4)
    assert not (tmp_path / "new").exists()
    run_here(export.main, words)
    assert "the export has no rotation" in capsys.readouterr().out
    assert not (tmp_path / "new" / ROTATION_FILE).exists() and read_export(tmp_path / "new").rotation is None


def rewritten(whole: Path, folder: Path, rotation: Any) -> Path:
    """A copy of an export with another rotation and the hashes to match; None removes it."""
    shutil.copytree(whole, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / ROTATION_FILE).unlink()
    del config["sha256"], config["sha256_of"][ROTATION_FILE]
    if rotation is not None:
        save_file({"rotation": rotation}, folder / ROTATION_FILE)
        config["sha256_of"][ROTATION_FILE] = file_sha256(folder / ROTATION_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"sha256": json_sha256(config)}))
    return folder


def test_an_export_from_before_rotations(run: Path, whole: Path, tmp_path: Path) -> None:
    older = rewritten(whole, tmp_path / "older", None)
    assert read_export(older).rotation is None
    evaluate_here(older)
    assert evaluation(older)["sizes"] == evaluation(run)["sizes"] and "vectors" not in evaluation(older)
    assert "is from before there were cut vectors" in refusal(evaluate.main, "--checkpoint", older, "--cut-vectors")


@pytest.mark.parametrize(
    ("rotation", "problem"),
    [
        (2 * np.eye(16, dtype=np.float32), "not orthogonal"),
        (np.full((16, 16), np.nan, np.float32), "not orthogonal"),
        (np.eye(8, dtype=np.float32), r"is torch.float32 [8, 8]; expected float32 [16, 16]"),
    ],
)
def test_a_wrong_rotation_is_refused(whole: Path, tmp_path: Path, rotation: np.ndarray, problem: str) -> None:
    folder = rewritten(whole, tmp_path / "wrong", rotation)
    assert problem in refusal(evaluate.main, "--checkpoint", folder)
