"""Training with the catalogue split over two ranks equals one process, under DDP and ZeRO; refused configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmrl_dist import train
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.training.item_columns import catalogue_columns, catalogue_slice
from tests.fixtures.engines import refused_on_each_rank, train_under, zero
from tests.fixtures.processes import run_processes
from tests.fixtures.training import STEPS_PER_EPOCH, evaluation, figures, make_shop, records, refusal, train_here

SPLIT = ["--loss.catalogue", "split"]
WORDS = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.epochs", "2"]
WITH_IDS = [
    *("--model.id_table", "true", "--loss.temperatures", "[0.5, 2]", "--loss.size_weights", "[1, 3]"),
    *("--loss.distillation", "0.5", "--loss.teacher_temperature", "2"),
]
FIGURES = ("loss", "loss@4", "loss@8", "grad_norm", "lr")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its users leave one of two ranks empty in an epoch's last step; 41 items do not divide evenly by two ranks."""
    return make_shop(tmp_path_factory.mktemp("split"), num_items=41)


def train_on_each_rank(config: str, folder: str) -> None:
    root = Path(folder)
    train_here(Path(config), root / "split", *WORDS, *SPLIT)
    train_here(Path(config), root / "split-ids", *WORDS, *SPLIT, *WITH_IDS)
    train_here(Path(config), root / "passed-on", *WORDS, *SPLIT, "--resume", "auto")


@pytest.fixture(scope="module")
def two(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    train_here(shop, folder / "passed-on", *WORDS, "--train.max_steps", STEPS_PER_EPOCH)
    run_processes(2, train_on_each_rank, str(shop), str(folder), timeout_s=200)
    return folder


@pytest.fixture(scope="module")
def one(shop: Path) -> Path:
    return train_here(shop, shop.parent / "one", *WORDS)


def assert_equal_runs(found: Path, expected: Path) -> None:
    for record, other in zip(records(found), records(expected), strict=True):
        for key in ("step", *FIGURES):
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)
    assert len(records(found)) == 2 * STEPS_PER_EPOCH
    assert evaluation(found) == evaluation(expected)
    assert records(found, "valid") == records(expected, "valid")


@pytest.mark.multiproc
def test_two_ranks_train_as_one_process(two: Path, one: Path) -> None:
    assert_equal_runs(two / "split", one)


@pytest.mark.multiproc
def test_with_ids_temperatures_and_weights(two: Path, shop: Path) -> None:
    assert_equal_runs(two / "split-ids", train_here(shop, shop.parent / "one-ids", *WORDS, *WITH_IDS))


@pytest.mark.multiproc
def test_a_run_with_the_whole_catalogue_resumes_split(two: Path, one: Path) -> None:
    assert_equal_runs(two / "passed-on", one)


@pytest.mark.multiproc
@pytest.mark.parametrize(("stage", "extra"), [(1, []), (2, WITH_IDS)], ids=["ZeRO 1", "ZeRO 2 with ids"])
def test_zero_trains_as_one_process(stage: int, extra: list[str], shop: Path, tmp_path: Path) -> None:
    words = [*WORDS, *extra]
    said, _ = train_under(zero(stage), shop, tmp_path / "zero", *words, *SPLIT)
    assert f"engine deepspeed ZeRO {stage}" in said
    assert_equal_runs(tmp_path / "zero", train_here(shop, tmp_path / "one", *words))


@pytest.mark.multiproc
def test_zero_3_is_refused(shop: Path, tmp_path: Path) -> None:
    call = (str(shop), str(tmp_path / "run"), [*WORDS, *SPLIT])
    for line in run_processes(2, refused_on_each_rank, *call, environment=zero(3)):
        assert line == (
            "error: loss.catalogue is split, which ZeRO 3 does not support; choose ZeRO 1 or 2, DDP, or "
            "loss.catalogue: whole"
        )
    assert not (tmp_path / "run").exists()


def test_one_process_splits_nothing(shop: Path, one: Path, tmp_path: Path) -> None:
    """Its figures equal those of the whole catalogue, bit for bit."""
    assert figures(train_here(shop, tmp_path / "run", *WORDS, *SPLIT)) == figures(one)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_slices_hold_each_item_once(num_ranks: int) -> None:
    encoder = ProjectionEncoder(8, {"text": 5})
    table = ItemTable({"text": 5}, torch.randn(5, 5).half(), torch.rand(5, 1) < 0.5)
    parts = [catalogue_slice(encoder, table, torch.float32, rank, num_ranks) for rank in range(num_ranks)]
    assert torch.equal(
        torch.cat([part.columns[:] for part in parts]), catalogue_columns(encoder, table, torch.float32)[:]
    )
    lengths = [int(part.columns.shape[0]) for part in parts]
    assert [part.begin for part in parts] == [sum(lengths[:rank]) for rank in range(num_ranks)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--loss.softmax", "sampled"], "loss.softmax is sampled, which scores no catalogue; choose whole, or full"),
        (
            ["--loss.normalize", "true", "--loss.temperatures", "[0.1, 0.1]"],
            "which loss.normalize does not support; choose whole, or turn loss.normalize off",
        ),
    ],
)
def test_what_cannot_be_split(words: list[str], line: str, shop: Path, tmp_path: Path) -> None:
    said = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", *SPLIT, *words)
    assert said.startswith("error: loss.catalogue is split")
    assert said.endswith(line)
    assert not (tmp_path / "run").exists()
