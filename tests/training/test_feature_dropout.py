"""Feature dropout: what is left out is as if it had never been there, the same for all ranks and losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmrl_dist import train
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.model.item_encoders.unisrec import UniSRecEncoder
from fmrl_dist.model.item_encoders.vqrec import VQRecEncoder
from fmrl_dist.training.item_columns import DroppedColumns, FeatureDropout
from tests.fixtures.processes import run_processes
from tests.fixtures.training import STEPS_PER_EPOCH, evaluation, make_shop, records, refusal, train_here

DIMS = {"text": 5, "image": 3}
DROPPED = ["--model.feature_dropout", "0.4"]
WORDS = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.epochs", "2", *DROPPED]
SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "stratified", "--loss.num_negatives", "2"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("feature-dropout"))


def encoders() -> list[ItemEncoder]:
    return [ProjectionEncoder(6, DIMS), UniSRecEncoder(6, DIMS, 3), VQRecEncoder(6, DIMS, 9)]


@pytest.mark.parametrize("number", range(3), ids=["projection", "unisrec", "vqrec"])
def test_what_is_left_out_was_never_there(number: int) -> None:
    torch.manual_seed(0)
    encoder = encoders()[number]
    values = torch.randint(1, 9, (20, 8)).float()
    present, left_out = torch.rand(20, 2) < 0.7, torch.rand(20, 2) < 0.5
    columns = encoder.columns(encoder.normalize(values, present), present)
    without = encoder.columns(encoder.normalize(values, present & ~left_out), present & ~left_out)
    assert torch.equal(encoder.leave_out(columns, left_out), without)


def test_shares_and_steps_and_features_are_apart() -> None:
    encoder = ProjectionEncoder(4, DIMS)
    dropout = FeatureDropout(encoder, 0.3, seed=5)
    ids, columns = torch.arange(20_000), encoder.columns(torch.ones(20_000, 8), torch.ones(20_000, 2, dtype=torch.bool))
    found = []
    for step in (0, 1):
        dropout.begin_step(step)
        dropped = dropout(columns, ids)
        found += [dropped[:, 0] == 0, dropped[:, 5] == 0]
    assert all(0.28 < left_out.float().mean() < 0.32 for left_out in found)
    for one in range(4):
        for other in range(one):
            assert 0.08 < (found[one] & found[other]).float().mean() < 0.10  # independent: 0.09
    some = torch.tensor([7, 19_000, 3])
    matrix = DroppedColumns(columns[5_000:], dropout, first_item=5_000)
    assert torch.equal(matrix[100:200], dropped[5_100:5_200])
    assert torch.equal(matrix[some.clamp_max(14_000)], dropped[some.clamp_max(14_000) + 5_000])


@pytest.mark.parametrize("softmax", [[], SAMPLED], ids=["full", "sampled"])
def test_a_resumed_run_is_the_uninterrupted_one(softmax: list[str], shop: Path, tmp_path: Path) -> None:
    stop = STEPS_PER_EPOCH + 3
    words = [*DROPPED, *softmax, "--train.epochs", 2, "--eval.every_steps", stop]
    whole = train_here(shop, tmp_path / "whole", *words)
    halved = train_here(shop, tmp_path / "halved", *words, "--train.max_steps", stop)
    train_here(shop, halved, *words, "--resume", "auto")
    left, right = (load_file(run / "checkpoints" / "latest" / "model.safetensors") for run in (whole, halved))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert evaluation(whole) == evaluation(halved)
    assert float(left["encoder.stand_ins"].abs().max()) > 0, "no item of the shop lacks a feature but for the dropout"


def train_on_each_rank(config: str, folder: str) -> None:
    train_here(Path(config), Path(folder) / "whole", *WORDS)
    train_here(Path(config), Path(folder) / "split", *WORDS, "--loss.catalogue", "split")


@pytest.mark.multiproc
def test_ranks_leave_out_the_same(shop: Path, tmp_path: Path) -> None:
    run_processes(2, train_on_each_rank, str(shop), str(tmp_path), timeout_s=200)
    one = train_here(shop, tmp_path / "one", *WORDS)
    for run in ("whole", "split"):
        for record, other in zip(records(tmp_path / run), records(one), strict=True):
            assert record["loss"] == pytest.approx(other["loss"], rel=1e-5), (run, record["step"])


def test_nothing_to_leave_out_is_refused(shop: Path) -> None:
    words = ["--config", shop, "--model.features", "[]", "--model.id_table", "true", *DROPPED]
    assert "model.feature_dropout is 0.4 and model.features is empty" in refusal(train.main, *words)
