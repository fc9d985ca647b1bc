"""Runs of every mixer by the real commands: learning, resuming, two ranks and engines, exports and lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fmrl_dist import export, train
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.mixers.mixing import MIXERS
from tests.fixtures.engines import train_under, zero
from tests.fixtures.exports import export_here
from tests.fixtures.processes import run_processes
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    evaluation,
    figures,
    make_shop,
    records,
    refusal,
    run_here,
    train_here,
)

OTHERS = tuple(mixer for mixer in MIXERS if mixer != "lru")
SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "stratified", "--loss.num_negatives", "2"]
SOFTMAX = {"full": ["--loss.softmax", "full"], "sampled": SAMPLED, "lanes": [*SAMPLED, "--loss.scope", "lane"]}
NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.epochs", "2"]
FIGURES = ("loss", "loss@4", "loss@8", "grad_norm", "lr")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("mixers"))


@pytest.fixture(scope="module")
def runs(shop: Path) -> dict[str, Path]:
    """A whole run of each mixer."""
    words = ["--model.positions", "learned", "--train.epochs", 30, "--eval.size", 8, "--model.id_table", "true"]
    words += ["--loss.mask_rate", 0.5, "--train.lr", 0.01]
    return {mixer: train_here(shop, shop.parent / mixer, "--model.mixer", mixer, *words) for mixer in OTHERS}


@pytest.mark.parametrize("mixer", OTHERS)
def test_it_learns_and_every_size_is_evaluated(mixer: str, runs: dict[str, Path]) -> None:
    losses = [record["loss"] for record in records(runs[mixer])]
    assert np.mean(losses[-STEPS_PER_EPOCH:]) < 0.95 * np.mean(losses[:STEPS_PER_EPOCH])
    assert evaluation(runs[mixer])["sizes"].keys() == {"4", "8"}
    assert evaluation(runs[mixer])["sizes"]["8"]["recall@10"] > 0.28  # 0.25 by chance; the loss says the rest


RESUMED = [(mixer, "full") for mixer in OTHERS] + [
    ("bsarec", "sampled"),
    ("bidirectional", "sampled"),
    ("bidirectional", "lanes"),
]


@pytest.mark.parametrize(("mixer", "softmax"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(mixer: str, softmax: str, shop: Path, tmp_path: Path) -> None:
    stop = STEPS_PER_EPOCH + 3
    words = ["--model.mixer", mixer, *SOFTMAX[softmax], "--train.epochs", 2, "--eval.every_steps", stop]
    whole = train_here(shop, tmp_path / "whole", *words)
    halved = train_here(shop, tmp_path / "halved", *words, "--train.max_steps", stop)
    train_here(shop, halved, *words, "--resume", "auto")
    left, right = (load_file(run / "checkpoints" / "latest" / "model.safetensors") for run in (whole, halved))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert figures(whole)[-1] == figures(halved)[-1] and evaluation(whole) == evaluation(halved)


@pytest.mark.parametrize("mixer", OTHERS)
def test_the_loss_is_a_mean_over_targets_however_many_are_predicted(mixer: str, shop: Path, tmp_path: Path) -> None:
    """At a model without signal, each of 40 items has the same chance, so the loss is log 40."""
    words = ["--model.mixer", mixer, "--train.max_steps", 1, "--model.feature_scale", "1e-6", "--train.lr", "1e-9"]
    (record,) = records(train_here(shop, tmp_path / "run", *words))
    assert record["loss"] == pytest.approx(np.log(40), rel=0.02)


@pytest.mark.parametrize("mixer", OTHERS)
def test_exports_of_every_size_recommend_what_the_large_model_does(mixer: str, runs: dict[str, Path]) -> None:
    whole = export_here(runs[mixer], 8)
    arguments = json.loads((whole / "config.json").read_text())["model"]
    assert arguments["mixer"] == mixer and "r_min" not in arguments
    assert json.loads((whole / "config.json").read_text())["format_version"] == 5
    small = export_here(runs[mixer], 4)
    histories = [["i3"], [], ["i1", "i7", "i1", "i12"], [f"i{k}" for k in range(12)]]
    sliced = Recommender.from_pretrained(whole, size=4)
    alone = Recommender.from_pretrained(small)
    for one, other in zip(sliced.recommend(histories), alone.recommend(histories), strict=True):
        assert [i.item_id for i in one] == [i.item_id for i in other]
        assert [i.score for i in one] == pytest.approx([i.score for i in other], rel=1e-5)
    model = FMRLRec.from_pretrained(small)
    rows = torch.randn(3, 4)
    z = FMRLRec.from_pretrained(whole).truncate(4)(rows, torch.tensor([0, 3]), torch.tensor([True]))
    torch.testing.assert_close(model(rows, torch.tensor([0, 3]), torch.tensor([True])), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixer", OTHERS)
def test_what_needs_a_state_of_fixed_size_is_refused(mixer: str, runs: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("onnx", "web"):
        line = refusal(export.main, "--checkpoint", runs[mixer], "--format", kind, "--output", tmp_path / kind)
        assert f"the model's mixer is {mixer}, and --format {kind} needs a state of fixed size" in line
        assert not (tmp_path / kind).exists()


def test_a_run_of_one_mixer_is_not_resumed_with_another(runs: dict[str, Path], shop: Path) -> None:
    words = ["--config", shop, "--run.dir", runs["attention"], "--model.mixer", "bidirectional", "--resume", "auto"]
    assert "model.mixer" in refusal(train.main, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bsarec", "--data.max_length", "5"], "model.low_pass is 5, which leaves no high frequencies of a window's 5"),
        (["bidirectional", "--loss.predict_first", "false"], "loss.predict_first is off: training would never see"),
    ],
)
def test_combinations_that_would_teach_nothing_are_refused(words: list[str], message: str, shop: Path) -> None:
    assert message in refusal(train.main, "--config", shop, "--model.mixer", *words)


def test_an_exports_matrices_have_its_dtype(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ["--checkpoint", runs["attention"], "--dtype", "int8", "--output", tmp_path / "export"]
    run_here(export.main, words)
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert all(tensors[f"blocks.0.attention.{name}"].dtype == torch.int8 for name in ("qkv", "out"))
    assert tensors["positions"].dtype == torch.float32
    whole, small = (Recommender.from_pretrained(tmp_path / "export", size) for size in (8, 4))
    assert len(whole.recommend([["i3"]])[0]) == len(small.recommend([["i3"]])[0]) == 10


def test_a_window_that_is_too_short_is_refused(shop: Path) -> None:
    line = refusal(train.main, "--config", shop, "--model.mixer", "filter", "--model.window", "10")
    assert "model.window is 10, less than the 50 events of data.max_length that mixer filter is to read" in line


# Two ranks


def train_on_each_rank(config: str, folder: str) -> None:
    for mixer in OTHERS:
        train_here(Path(config), Path(folder) / mixer, *NO_DROPOUT, "--model.mixer", mixer)
    train_here(
        Path(config), Path(folder) / "split", *NO_DROPOUT, "--model.mixer", "attention", "--loss.catalogue", "split"
    )
    cloze = ["--model.mixer", "bidirectional", "--loss.catalogue", "split"]
    experts = ["--model.mixer", "bidirectional", "--model.item_encoder", "unisrec", "--train.max_steps", 3]
    train_here(Path(config), Path(folder) / "experts", *NO_DROPOUT, *experts)
    train_here(Path(config), Path(folder) / "split-cloze", *NO_DROPOUT, *cloze)


def assert_same_losses(found: Path, expected: Path) -> None:
    for record, other in zip(records(found), records(expected), strict=True):
        for key in ("step", *FIGURES):
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)
    assert records(found, "valid") == records(expected, "valid")


@pytest.mark.multiproc
def test_two_ranks_learn_as_one(shop: Path, tmp_path: Path) -> None:
    """But for masks, which each rank draws for itself, as dropout: there, both learn."""
    run_processes(2, train_on_each_rank, str(shop), str(tmp_path), timeout_s=200)
    for mixer in ("attention", "filter", "circular", "bsarec"):
        one = train_here(shop, tmp_path / f"{mixer}-one", *NO_DROPOUT, "--model.mixer", mixer)
        assert_same_losses(tmp_path / mixer, one)
    assert_same_losses(tmp_path / "split", tmp_path / "attention-one")
    for run in ("bidirectional", "split-cloze"):
        losses = [record["loss"] for record in records(tmp_path / run)]
        assert np.mean(losses[STEPS_PER_EPOCH:]) < np.mean(losses[:STEPS_PER_EPOCH])
    first = [records(tmp_path / run)[0]["loss"] for run in ("bidirectional", "split-cloze")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.multiproc
@pytest.mark.parametrize("mixer", ["attention", "circular"])
def test_zero_learns_as_one_process(mixer: str, shop: Path, tmp_path: Path) -> None:
    words = [*NO_DROPOUT, "--model.mixer", mixer]
    one = train_here(shop, tmp_path / "one", *words)
    train_under(zero(2), shop, tmp_path / "zero", *words)
    assert_same_losses(tmp_path / "zero", one)
