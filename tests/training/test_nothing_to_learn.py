"""What cannot come to anything is refused, where it once ended with figures and exit code 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmrl_dist import evaluate, export, train
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from tests.fixtures.checkpoints import reseal, reseal_export
from tests.fixtures.stores import write_histories
from tests.fixtures.training import (
    FEATURE_DIMS,
    NUM_ITEMS,
    STEPS_PER_EPOCH,
    figures,
    make_shop,
    records,
    refusal,
    run_here,
    train_here,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("nothing"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    return train_here(shop, shop.parent / "trained")


def damaged_store(shop: Path, folder: Path, split: str, keep: int) -> Path:
    """A copy of the store, all blocks of a split but the first ``keep`` of them damaged."""
    store = Store.open(load_config(shop).store.path)
    shutil.copytree(store.path, folder)
    for block in store.manifest.splits[split][keep:]:
        with (folder / block.shard).open("r+b") as file:
            file.seek(block.offset + 600)
            file.write(b"\xff" * 8)
    return folder


def test_no_feature_and_no_id_table(shop: Path, tmp_path: Path) -> None:
    config = load_config(shop, ["--data.features", "{}", "--store.path", str(tmp_path / "bare")])
    build_store(config)
    words = ["--config", shop, "--store.path", tmp_path / "bare", "--run.dir", tmp_path / "run"]
    line = refusal(train.main, *words)
    assert "has no features and model.id_table is off: nothing would tell items apart" in line
    assert not (tmp_path / "run").exists()
    train_here(shop, tmp_path / "ids", "--store.path", tmp_path / "bare", "--model.id_table", "true")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("id_dropout", "nothing would tell items apart"), ("feature_dropout", "there is nothing to leave out")],
)
def test_leaving_out_what_a_store_without_features_has(word: str, expected: str, shop: Path, tmp_path: Path) -> None:
    config = load_config(shop, ["--data.features", "{}", "--store.path", str(tmp_path / "bare")])
    build_store(config)
    words = ["--config", shop, "--store.path", tmp_path / "bare", "--run.dir", tmp_path / "run"]
    line = refusal(train.main, *words, "--model.id_table", "true", f"--model.{word}", 0.1)
    assert f"model.{word} is 0.1 and store" in line and f"has no features: {expected}; set it to 0" in line
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_learns_nothing(shop: Path, tmp_path: Path) -> None:
    words = ["--config", shop, "--run.dir", tmp_path / "run", "--loss.size_weights", "[1, 0]"]
    line = refusal(train.main, *words, "--loss.distillation", 0.5)
    assert "loss.size_weights is [1.0, 0.0]: the largest size, which teaches the others" in line
    assert "would learn nothing" in refusal(train.main, *words, "--loss.distillation", "[0.5, 0]")
    run_here(train.main, [*words, "--loss.distillation", 0, "--train.max_steps", 1])


def test_a_mask_in_the_place_of_the_only_event(shop: Path, tmp_path: Path) -> None:
    words = ["--config", shop, "--run.dir", tmp_path / "run", "--model.mixer", "bidirectional"]
    line = refusal(train.main, *words, "--data.max_length", 1)
    assert "bidirectional with a window of one event, whose place its mask takes" in line


def test_heads_that_know_no_order(shop: Path, tmp_path: Path) -> None:
    words = ["--config", shop, "--run.dir", tmp_path / "run", "--model.mixer", "attention"]
    odd = ["--model.width", 13, "--model.sizes", "[8, 13]", "--eval.size", 8]
    line = refusal(train.main, *words, *odd, "--model.head_width", 4)
    assert "have a chunk of 5 channels, which heads of at most 4 (model.head_width) divide by single channels" in line
    run_here(train.main, [*words, *odd, "--model.head_width", 5, "--train.max_steps", 1])


@pytest.mark.parametrize("keep", [0, 3])
def test_too_many_training_users_lost(keep: int, shop: Path, tmp_path: Path) -> None:
    store = damaged_store(shop, tmp_path / "store", "train", keep)
    words = ["--config", shop, "--store.path", store, "--store.on_bad_shard", "skip", "--run.dir", tmp_path / "run"]
    line = refusal(train.main, *words)
    assert "of 113 train users; expected at most 25% (store.max_lost_share)" in line
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_all_users_to_evaluate_lost(shop: Path, trained: Path, tmp_path: Path) -> None:
    store = damaged_store(shop, tmp_path / "store", "test", 0)
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    words = ["--config", shop, "--run.dir", tmp_path / "new", "--store.path", store, "--store.on_bad_shard", "skip"]
    line = refusal(train.main, *words, "--store.max_lost_share", "0.99")
    assert "cost 100 of 100 test users" in line
    assert not (tmp_path / "new" / "evaluation.json").exists()
    before = (run / "evaluation.json").read_bytes()
    assert "test" in refusal(evaluate.main, "--checkpoint", run, "--store", store, "--threads", 1)
    assert (run / "evaluation.json").read_bytes() == before


def test_all_users_to_validate_lost(shop: Path, tmp_path: Path) -> None:
    """Of a subset too: without figures, the first checkpoint would be the best."""
    store = damaged_store(shop, tmp_path / "store", "valid", 0)
    words = ["--config", shop, "--store.path", store, "--store.on_bad_shard", "skip", "--run.dir", tmp_path / "run"]
    assert "cost 100 of 100 valid users" in refusal(train.main, *words)
    assert "cost 50 of 50 valid users" in refusal(train.main, *words, "--eval.users", 50, "--resume", "auto")
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, trained: Path, tmp_path: Path) -> None:
    """In a checkpoint, an exported model and exported items; each once ranked everything equal."""
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    run_here(export.main, ["--checkpoint", run, "--size", 8, "--output", tmp_path / "export"])
    for name in ("model.safetensors", "item_embeddings.safetensors"):
        broken = Path(shutil.copytree(tmp_path / "export", tmp_path / name))
        spoil(broken / name, value)
        reseal_export(broken)
        line = refusal(evaluate.main, "--checkpoint", broken, "--threads", 1)
        assert "is damaged (ValueError: " in line and "holds numbers that are not finite)" in line
    best = load_checkpoint(run).path
    spoil(best / "model.safetensors", value)
    reseal(best)
    assert "holds weights that are not finite (" in refusal(evaluate.main, "--checkpoint", run, "--threads", 1)
    words = ["--checkpoint", run, "--size", 4, "--output", tmp_path / "other"]
    assert "holds weights that are not finite (" in refusal(export.main, *words)
    assert not (tmp_path / "other").exists()


def spoil(file: Path, value: float) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_more_epochs_for_a_finished_run(
    shop: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way is a new run from its weights; steps at rate 0 are refused, or announced where others precede them."""
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    words = ["--config", shop, "--resume", "auto", "--train.epochs", 6]
    line = refusal(train.main, *words, "--run.dir", run)
    assert "has train.schedule_epochs 3, this run 6" in line and "--train.init" in line
    line = refusal(train.main, *words, "--run.dir", run, "--train.schedule_epochs", 3)
    assert "has ended at learning rate 0: more steps would change nothing; start a new run" in line
    assert f"--train.init {run}" in line and figures(run) == figures(trained)
    further = train_here(shop, tmp_path / "further", "--train.init", run, "--train.epochs", 2)
    assert records(further)[0]["loss"] < records(trained)[2]["loss"], "it starts where the other one had come to"
    assert records(further)[0]["step"] == 1 and records(further)[-1]["step"] == 2 * STEPS_PER_EPOCH
    capsys.readouterr()
    train_here(shop, tmp_path / "flat", "--train.schedule_epochs", 1, "--train.epochs", 2)
    assert f"from step {STEPS_PER_EPOCH} on the learning rate is 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model.features", "[colour]"], "reads features {'vector': 6, 'colour': 4}, this run {'colour': 4}"),
        (["--model.features", "[colour, vector]"], "this run {'colour': 4, 'vector': 6}; choose another, or give"),
        (
            ["--model.sizes", "[8]", "--eval.size", "8"],
            "has model.sizes (4, 8), this run (8,): its weights mean something else",
        ),
        (["--model.depth", "2"], "has model.depth 1, this run 2"),
        (["--model.feature_scale", "none"], "has model.feature_scale 'standardize', this run 'none'"),
        (["--model.output_norm", "true"], "has model.output_norm False, this run True"),
        (["--model.id_table", "true"], "has model.id_table False, this run True"),
        (["--train.init", "nowhere"], "nowhere holds no checkpoint"),
    ],
)
def test_initial_weights_of_another_model(
    words: list[str], complaint: str, shop: Path, trained: Path, tmp_path: Path
) -> None:
    """Their names and shapes may be the same: [4, 8] into [8] once cost a third of the figures."""
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--train.init", trained, *words)
    assert complaint in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "other", "complaint"),
    [
        (["--model.item_encoder", "unisrec"], ["--model.experts", 3], "has model.experts 8, this run 3"),
        (["--model.id_table", "true"], ["--model.id_width", 4], "has model.id_width 8, this run 4"),
    ],
)
def test_initial_weights_of_other_shapes(
    words: list[object], other: list[object], complaint: str, shop: Path, tmp_path: Path
) -> None:
    """The key that differs is named, as above; what is the same by another name is no difference."""
    words = [*words, "--train.max_steps", 1]
    source = train_here(shop, tmp_path / "source", *words)
    init = ["--train.init", source, *words]
    assert complaint in refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", *init, *other)
    train_here(shop, tmp_path / "run", *init, "--model.id_width", 8)


def test_what_may_change_with_initial_weights(shop: Path, trained: Path, tmp_path: Path) -> None:
    """What changes no weight's meaning; nor do an LRU's weights know of heads, windows and frequencies."""
    words = ["--model.dropout", "0.1", "--model.r_max", "0.5", "--loss.predict_first", "false", "--train.max_steps", 1]
    words += ["--model.head_width", 4, "--model.window", 20, "--model.low_pass", 3, "--model.positions", "none"]
    train_here(shop, tmp_path / "run", "--train.init", trained, *words)


def test_initial_weights_of_another_encoder(shop: Path, trained: Path, tmp_path: Path) -> None:
    """As a checkpoint says that was trained on other features of the same names and dims."""
    run = Path(shutil.copytree(trained, tmp_path / "source", symlinks=True))
    best = load_checkpoint(run).path
    record = json.loads((best / "state.json").read_text())
    record["feature_encoders"] = {name: "transformers:other 1" for name in FEATURE_DIMS}
    (best / "state.json").write_text(json.dumps(record))
    reseal(best)
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--train.init", run)
    assert "was trained on another feature 'vector' than that of store" in line and "transformers:other 1" in line


def test_a_finished_checkpoint_in_a_new_folder(shop: Path, trained: Path, tmp_path: Path) -> None:
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--resume", trained)
    assert "has nothing left to train, and" in line and "has none of its own" in line
    assert not (tmp_path / "run").exists()


def built(shop: Path, folder: Path, lengths: Sequence[int] | None = None, same: bool = False, *words: str) -> Path:
    """A store of the shop's items: histories of these lengths, or features that are the same for all items."""
    raw = Path(shutil.copytree(shop.parent / "raw", folder / "raw"))
    if lengths is not None:
        write_histories(
            raw / "sequences.parquet", {f"u{u}": [f"i{u + k}" for k in range(n)] for u, n in enumerate(lengths)}
        )
    if same:
        for name, dim in FEATURE_DIMS.items():
            rows = np.full((NUM_ITEMS, dim), 0.5, np.float32)
            rows[1::2] += 1e-5  # nothing in float16
            np.save(raw / f"{name}.npy", rows)
    build_store(load_config(shop, ["--data.root", str(raw), "--store.path", str(folder / "store"), *words]))
    return folder / "store"


def test_histories_without_a_target(shop: Path, tmp_path: Path) -> None:
    """Of 3 events, validation and test take two; the first is a target only from the start position."""
    words = ["--config", shop, "--store.path", built(shop, tmp_path, [3] * 20), "--run.dir", tmp_path / "run"]
    line = refusal(train.main, *words, "--loss.predict_first", "false")
    assert "all 20 training histories of store" in line and "there is no target to learn from; turn it on" in line
    alone = ["--loss.softmax", "sampled", "--loss.negatives", "in_batch"]
    assert "each target is alone (one user for each lane" in refusal(train.main, *words, *alone)
    assert not (tmp_path / "run").exists()
    run = train_here(shop, tmp_path / "run", *words[2:4], *alone, "--train.lanes", 8, "--train.max_steps", 1)
    assert records(run)[0]["loss"] > 0
    longer = built(shop, tmp_path / "longer", [3] * 19 + [4])
    train_here(shop, tmp_path / "other", "--store.path", longer, "--loss.predict_first", "false", "--train.epochs", 1)
    assert max(record["loss"] for record in records(tmp_path / "other")) > 0


@pytest.mark.parametrize("mode", ["table", "inline"])
def test_features_that_are_the_same_for_all_items(mode: str, shop: Path, trained: Path, tmp_path: Path) -> None:
    inline = ["--store.feature_mode", mode, "--loss.softmax", "sampled"]
    store = built(shop, tmp_path, None, True, *inline)
    line = refusal(train.main, "--config", shop, "--store.path", store, "--run.dir", tmp_path / "run", *inline)
    assert f"all items of store {store} have the same features (vector, colour), and the model has no id table" in line
    assert not (tmp_path / "run").exists()
    assert "have the same features" in refusal(evaluate.main, "--checkpoint", trained, "--store", store, "--threads", 1)
    if mode == "table":
        train_here(shop, tmp_path / "run", "--store.path", store, "--model.id_table", "true", "--train.max_steps", 1)


def test_weights_whose_outputs_are_not_finite(trained: Path, tmp_path: Path) -> None:
    """Finite weights, in a checkpoint and in an export."""
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    run_here(export.main, ["--checkpoint", run, "--size", 8, "--output", tmp_path / "export"])
    best = load_checkpoint(run).path
    for file in (best / "model.safetensors", tmp_path / "export" / "item_embeddings.safetensors"):
        save_file({name: t * 1e30 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    reseal(best)
    reseal_export(tmp_path / "export")
    before = (run / "evaluation.json").read_bytes()
    for model in (run, tmp_path / "export"):
        line = refusal(evaluate.main, "--checkpoint", model, "--threads", 1)
        assert "the model's item embeddings are not finite, or too large to compare" in line
    words = ["--checkpoint", run, "--size", 4, "--output", tmp_path / "other"]
    assert "are not finite, or too large to compare" in refusal(export.main, *words)
    assert (run / "evaluation.json").read_bytes() == before and not (tmp_path / "other").exists()
