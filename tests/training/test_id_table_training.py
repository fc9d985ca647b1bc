"""Runs with an id table: the same losses by any processes, engines and lives; cold items are their features."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmrl_dist import train
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.item_statistics import trained_items
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.evaluation import split_catalogue
from tests.fixtures.checkpoints import reseal
from tests.fixtures.engines import DDP, train_under, zero
from tests.fixtures.processes import run_processes
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    evaluation,
    figures,
    make_shop,
    records,
    refusal,
    train_and_kill,
    train_here,
)

NUM_ITEMS = 301
NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.epochs", "2"]
IDS = [
    *("--model.id_table", "true", "--model.id_width", "4", "--model.id_init", "0.1", "--model.id_dropout", "0.3"),
    *("--train.id_lr_factor", "2", "--train.id_weight_decay", "0.1", "--train.clip_norm", "0.3"),
]
SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "mixed", "--loss.num_negatives", "7"]
WORDS = [*NO_DROPOUT, *IDS, *SAMPLED]
ID_TENSORS = [("model", "encoder.id_table")] + [
    ("optimizer", f"{moment}/encoder.id_table") for moment in ("exp_avg", "exp_avg_sq", "step")
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its items do not divide evenly by two ranks; some are in no history."""
    return make_shop(tmp_path_factory.mktemp("ids"), num_items=NUM_ITEMS)


@pytest.fixture(scope="module")
def one(shop: Path) -> Path:
    """A sampled run of one process."""
    return train_here(shop, shop.parent / "one", *WORDS)


def tensors_of(run: Path, file: str, checkpoint: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / f"{file}.safetensors")


def assert_equal_runs(found: Path, expected: Path) -> None:
    assert len(records(expected)) == 2 * STEPS_PER_EPOCH
    assert max(record["grad_norm"] for record in records(expected)) > 0.3, "gradients are clipped"
    for record, other in zip(records(found), records(expected), strict=True):
        for key in ("step", "loss", "loss@4", "loss@8", "grad_norm", "lr"):
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)
    validated = {record["step"]: record for record in records(found, "valid")}  # also where a part of a run ended
    assert all(validated[record["step"]] == record for record in records(expected, "valid"))
    assert evaluation(found) == evaluation(expected)
    for file in ("model", "optimizer"):
        ours, theirs = tensors_of(found, file), tensors_of(expected, file)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for file, name in ID_TENSORS:
        torch.testing.assert_close(
            tensors_of(found, file)[name], tensors_of(expected, file)[name], rtol=1e-3, atol=1e-6
        )


@pytest.mark.multiproc
@pytest.mark.parametrize("num_processes", [2, 4])
def test_sampled_processes_train_as_one(num_processes: int, shop: Path, one: Path, tmp_path: Path) -> None:
    train_under(DDP, shop, tmp_path / "run", *WORDS, num_processes=num_processes)
    assert_equal_runs(tmp_path / "run", one)


@pytest.mark.multiproc
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sampled_run_passes_through_the_engines(stage: int, shop: Path, one: Path, tmp_path: Path) -> None:
    """One process, ZeRO with micro-batches, DDP."""
    run = tmp_path / "run"
    train_here(shop, run, *WORDS, "--train.max_steps", 3)
    words = ["--resume", "auto", "--train.micro_batches", 3, "--train.max_steps", 9]
    train_under(zero(stage), shop, run, *WORDS, *words)
    train_under(DDP, shop, run, *WORDS, "--resume", "auto")
    assert_equal_runs(run, one)


@pytest.mark.multiproc
def test_the_full_softmax_is_the_same_whole_and_split(shop: Path, tmp_path: Path) -> None:
    """The split run begins and ends as a whole one, so that rows and moments go into shares and come back."""
    words, split = [*NO_DROPOUT, *IDS], ["--loss.catalogue", "split"]
    expected = train_here(shop, tmp_path / "one", *words)
    train_under(DDP, shop, tmp_path / "whole", *words)
    assert_equal_runs(tmp_path / "whole", expected)
    line = [str(shop), str(tmp_path / "split"), [*words, *split]]
    run_processes(3, train_in_small_tiles, *line, environment=DDP)
    assert_equal_runs(tmp_path / "split", expected)
    train_here(shop, tmp_path / "passed-on", *words, "--train.max_steps", 4)
    further = [*words, *split, "--resume", "auto", "--train.micro_batches", 2, "--train.max_steps", 11]
    train_under(zero(1), shop, tmp_path / "passed-on", *further)
    train_here(shop, tmp_path / "passed-on", *words, "--resume", "auto")
    assert_equal_runs(tmp_path / "passed-on", expected)


def train_in_small_tiles(config: str, run: str, words: list[str]) -> None:
    """An evaluation deals the items out in whole tiles: with small ones, each of three ranks gets some."""
    split_catalogue.COMPARED_ITEMS = 64
    assert split_catalogue.tile_bounds(NUM_ITEMS, 3) == [0, 64, 192, NUM_ITEMS]
    train_here(Path(config), Path(run), *words)


def test_a_killed_run_resumes_bit_for_bit(shop: Path, tmp_path: Path) -> None:
    words = [
        *IDS,
        *SAMPLED,
        "--train.epochs",
        "8",
        "--train.checkpoint_every_steps",
        "5",
        "--eval.every_steps",
        "10000",
    ]
    run = tmp_path / "killed"
    train_and_kill(shop, run, words, lines=22)
    train_here(shop, run, *words, "--resume", "auto")
    assert_same_bits(run, train_here(shop, tmp_path / "whole", *words))


def test_a_full_softmax_resumes_bit_for_bit(shop: Path, tmp_path: Path) -> None:
    words = [*IDS, "--eval.every_steps", 5]
    train_here(shop, tmp_path / "run", *words, "--train.max_steps", 5)
    train_here(shop, tmp_path / "run", *words, "--resume", "auto")
    assert_same_bits(tmp_path / "run", train_here(shop, tmp_path / "whole", *words))


def assert_same_bits(run: Path, whole: Path) -> None:
    assert figures(run) == figures(whole)
    for file in ("model", "optimizer"):
        ours, theirs = tensors_of(run, file), tensors_of(whole, file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def test_a_sampled_step_changes_the_rows_of_its_batch_alone(shop: Path, tmp_path: Path) -> None:
    """Few users and few negatives: from one step to the next, rows of other items and their moments stay."""
    words = [*IDS, "--model.id_dropout", 0, *SAMPLED, "--loss.num_negatives", 1, "--train.batch_size", 2]
    words += ["--loss.scope", "batch", "--train.keep_checkpoints", 9, "--train.checkpoint_every_steps", 1]
    run = train_here(shop, tmp_path / "run", *words, "--train.max_steps", 6)
    num_changed = []
    for step in range(2, 7):
        before, after = (
            [tensors_of(run, file, f"step-{number:08d}")[name] for file, name in ID_TENSORS]
            for number in (step - 1, step)
        )
        changed = [(new != old).any(1) for old, new in zip(before[:3], after[:3], strict=True)]
        assert torch.equal(changed[1], changed[2]) and torch.equal(changed[0], changed[1])
        assert after[3] == step
        num_changed.append(int(changed[0].sum()))
    assert min(num_changed) > 1 and max(num_changed) < 30


RULES = [
    WindowRule(50, "last", True),
    WindowRule(2, "last", False),
    WindowRule(2, "all", False),
    WindowRule(3, "last", True),
]


@pytest.mark.parametrize("rule", RULES)
def test_trained_items_are_those_of_an_epochs_batches(rule: WindowRule, shop: Path) -> None:
    store = Store.open(shop.parent / "store")
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream, lanes = TrainStream(store, order, rule), range(order.lanes)
    batches = [stream.batch(0, step, lanes) for step in range(order.steps_per_epoch)]
    used = torch.cat([ids for batch in batches for ids in (batch.items, batch.targets)]).unique()
    assert np.array_equal(np.flatnonzero(trained_items(store, rule)), used.numpy())
    assert 50 < len(used) < NUM_ITEMS


@pytest.mark.parametrize(
    "loss",
    [[], SAMPLED, ["--loss.normalize", "true", "--loss.temperatures", "[0.1, 0.1]"]],
    ids=["full", "sampled", "cosine"],
)
def test_a_cold_item_is_its_features(loss: list[str], shop: Path, tmp_path: Path) -> None:
    """In every checkpoint, and in what is exported; all others have ids."""
    words = [*IDS, *loss, "--data.max_length", 2, "--loss.predict_first", "false"]
    run = train_here(shop, tmp_path / "run", *words)
    store = Store.open(shop.parent / "store")
    trained = torch.from_numpy(trained_items(store, WindowRule(2, "last", False)).copy())
    assert 20 < trained.sum() < NUM_ITEMS - 20
    for checkpoint in ("best", "latest"):
        table = tensors_of(run, "model", checkpoint)["encoder.id_table"]
        assert torch.equal((table != 0).any(1), trained)
    found = load_checkpoint(run)
    recommender = build_recommender(found, load_config(run / "config.yaml"), store, torch.device("cpu"))
    without = {**found.model, "encoder.id_table": torch.zeros(NUM_ITEMS, 4)}
    bare = build_recommender(
        replace(found, model=without), load_config(run / "config.yaml"), store, torch.device("cpu")
    )
    same = (recommender.items == bare.items).all(1)
    assert torch.equal(same, ~trained)


def test_an_older_runs_cold_rows_are_cleared(shop: Path, tmp_path: Path) -> None:
    """As trained before they were left out: where the run goes on, or another starts from it."""
    words = [*IDS, "--data.max_length", 2, "--loss.predict_first", "false"]
    run = train_here(shop, tmp_path / "run", *words, "--train.max_steps", 2)
    config = load_config(shop, list(map(str, words)))
    trained = trained_items(Store.open(config.store.path), WindowRule(2, "last", False))
    file = (run / "checkpoints" / "latest").resolve() / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.id_table"] += 1.0
    save_file(tensors, file)
    reseal(file.parent)
    train_here(shop, tmp_path / "next", *words, "--train.max_steps", 1, "--train.init", run)
    train_here(shop, run, *words, "--train.max_steps", 3, "--resume", "auto")
    for path in (run, tmp_path / "next"):
        table = tensors_of(path, "model")["encoder.id_table"]
        assert np.array_equal((table != 0).any(1).numpy(), trained)


@pytest.mark.parametrize("loss", [[], SAMPLED], ids=["full", "sampled"])
def test_trained_rows_outlive_their_blocks(loss: list[str], shop: Path, tmp_path: Path) -> None:
    """Blocks that are damaged after they were trained on are left out, and their items keep what they have learned."""
    store = Store.open(Path(shutil.copytree(shop.parent / "store", tmp_path / "store")))
    blocks = store.manifest.splits["train"]
    items = [set(store.read_block(block)["items"].tolist()) for block in blocks]
    of_damaged = sorted(set.union(*items[1:]) - items[0])
    assert len(of_damaged) > 3
    skipping = ["--store.on_bad_shard", "skip", "--store.max_lost_share", 0.95, "--eval.baselines", "[]"]
    words = [*IDS, *loss, "--store.path", store.path, *skipping]
    run = train_here(shop, tmp_path / "run", *words, "--train.max_steps", STEPS_PER_EPOCH)
    before = tensors_of(run, "model")["encoder.id_table"][of_damaged]
    for block in blocks[1:]:
        with (store.path / block.shard).open("r+b") as file:
            file.seek(block.offset + 600)
            file.write(b"\xff" * 8)
    train_here(shop, run, *words, "--train.max_steps", STEPS_PER_EPOCH + 1, "--resume", "auto")
    after = tensors_of(run, "model")["encoder.id_table"][of_damaged]
    assert (before.norm(dim=1) > 0).all()
    assert (after.norm(dim=1) > 0.5 * before.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.id_width", 5], "model.id_width is 5; expected 0 or one of model.sizes [4, 8]"),
        (["--model.id_init", -1], "model.id_init is -1"),
        (["--model.id_dropout", 1.5], "model.id_dropout is 1.5"),
        (["--train.id_lr_factor", 0], "train.id_lr_factor is 0"),
        (["--train.id_lr_power", -1], "train.id_lr_power is -1"),
        (["--train.id_lr_power", 0.5], "train.id_lr_power is 0.5 and the softmax is full"),
        (
            ["--train.id_lr_power", 0.5, "--loss.softmax", "full"],
            "train.id_lr_power is 0.5 and the softmax is full, whose optimiser has one rate for all channels of the "
            "ids; set it to 0, or loss.softmax to sampled",
        ),
        (
            ["--model.features", "[]", "--model.id_dropout", 0.5],
            "model.id_dropout is 0.5 and model.features is empty: nothing would distinguish items without their ids",
        ),
    ],
)
def test_refusals(words: list[object], line: str, shop: Path, tmp_path: Path) -> None:
    said = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--model.id_table", "true", *words)
    assert said.startswith(f"error: {line}")
    assert not (tmp_path / "run").exists()


def test_other_settings_do_not_resume(shop: Path, one: Path) -> None:
    before = json.dumps(figures(one))
    for key, value in (
        ("model.id_width", 8),
        ("model.id_dropout", 0.1),
        ("train.id_lr_factor", 1),
        ("train.id_lr_power", 0.3),
    ):
        words = [*WORDS, f"--{key}", value, "--train.epochs", 3, "--train.schedule_epochs", 2, "--resume", "auto"]
        said = refusal(train.main, "--config", shop, "--run.dir", one, *words)
        assert f" has {key} " in said and "restore the value, or start another run" in said
    assert json.dumps(figures(one)) == before
