"""``python -m fmrl_dist.train`` from end to end, in one process, on a small shop."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from fmrl_dist import train
from fmrl_dist.base.errors import EXIT_USER_ERROR, UserError
from fmrl_dist.config.loading import DEMO_CONFIG, load_config
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.train_stream import TrainStream
from fmrl_dist.data.windows import WindowRule
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.evaluation.metrics import METRICS
from fmrl_dist.training.build_model import build_model
from fmrl_dist.training.engine import DataParallelEngine
from fmrl_dist.training.learner import prepare_learner
from fmrl_dist.training.run import Run
from shards.store.builder import build_store
from tests.fixtures.checkpoints import reseal
from tests.fixtures.stores import as_older_version
from tests.fixtures.training import (
    NUM_ITEMS,
    STEPS_PER_EPOCH,
    evaluation,
    figures,
    make_shop,
    records,
    refusal,
    run_module,
    train_and_kill,
    train_here,
)

TRAIN_KEYS = {"step", "epoch", "split", "loss", "loss@4", "loss@8", "tokens_per_s", "data_wait_share"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def finished(shop: Path) -> tuple[Path, str]:
    """The run of the unchanged config, by the command itself: its folder and output."""
    result = run_module("fmrl_dist.train", "--config", shop, "--run.tensorboard", "true")
    assert (result.returncode, result.stderr) == (0, "")
    return shop.parent / "run", result.stdout


def assert_same_run(one: Path, other: Path) -> None:
    """Figures, weights and moments equal bit for bit, and equal evaluations."""
    assert figures(one) == figures(other)
    assert evaluation(one) == evaluation(other)
    for file in ("model", "optimizer"):
        left, right = (load_file(run / "checkpoints" / "latest" / f"{file}.safetensors") for run in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def test_run_leaves_everything(finished: tuple[Path, str]) -> None:
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        *(".lock", "config.yaml", "finished.json", "metrics.jsonl", "ranks.jsonl", "tensorboard"),
        *("checkpoints", "evaluation.json", "evaluation.png", "evaluation-users.parquet", "report.html"),
    }
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    best, latest = ((run / "checkpoints" / link).resolve() for link in ("best", "latest"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *("best", "latest", best.name, latest.name),
        "step-00000016",  # a fallback
    }
    assert (best.name, latest.name) == ("step-00000008", "step-00000024")


def test_recorded_config_repeats_the_run(finished: tuple[Path, str], shop: Path) -> None:
    assert load_config(finished[0] / "config.yaml") == load_config(shop, ["--run.tensorboard", "true"])


def test_start_message(finished: tuple[Path, str]) -> None:
    run, output = finished
    config = load_config(run / "config.yaml")
    parameters = sum(t.numel() for name, t in load_file(run / "checkpoints/best/model.safetensors").items())
    parameters -= 2 * 10  # shift and scale of the ten feature columns are not parameters
    start = output[: output.index("epoch 1")]
    for fact in (
        *("1 process(es)", "engine no", "device cpu", "1 thread(s) each", "precision fp32", f"config {config.hash}"),
        *(
            f"{parameters:,} parameters",
            "sizes [4, 8]",
            "8 steps per epoch of 16 histories each",
            "from step 0 to at most 24",
        ),
        "loss tiled, full softmax, catalogue whole, no ids, dropout 0.2\n",
    ):
        assert fact in start


def test_what_a_config_leaves_to_the_store_is_recorded(shop: Path, tmp_path: Path) -> None:
    """About 120 users with a few events each: the smallest batch, 20 epochs or what makes 400 steps, sparse items."""
    auto = [word for key in ("train.batch_size", "train.epochs", "model.dropout") for word in (f"--{key}", "auto")]
    run = train_here(shop, tmp_path / "run", *auto, "--train.max_steps", 1)
    config, blocks = load_config(run / "config.yaml"), Store.open(load_config(shop).store.path).manifest.splits["train"]
    num_users = sum(block.count for block in blocks)
    assert (config.train.batch_size, config.model.dropout) == (16, 0.5)
    assert config.train.epochs == max(20, math.ceil(400 / math.ceil(num_users / 16)))


def test_progress_shows_rate_data_wait_and_time_left(finished: tuple[Path, str]) -> None:
    line = r"24 of 24 steps, [^,]+, [\d:]+ elapsed, 00:00 left, loss \d\.\d{4}, [\d,]+ tokens/s, data wait \d+\.\d%"
    assert re.search(line, finished[1])


def test_metrics_are_flat_records(finished: tuple[Path, str]) -> None:
    run, _ = finished
    train, valid = records(run, "train"), records(run, "valid")
    assert [r["step"] for r in train] == list(range(1, 25))
    assert [(r["step"], r["epoch"]) for r in valid] == [(8, 0), (16, 1), (24, 2)]
    for record in train:
        assert set(record) == TRAIN_KEYS | {"lr", "grad_norm"}
        assert record["epoch"] == (record["step"] - 1) // STEPS_PER_EPOCH
        assert record["loss"] == pytest.approx((record["loss@4"] + record["loss@8"]) / 2, rel=1e-6)
        assert 0 <= record["data_wait_share"] <= 1 and record["tokens_per_s"] > 0 and record["grad_norm"] > 0
    metrics = {f"{metric}@{size}" for metric in METRICS for size in (4, 8, "mean")}
    for record in valid:
        assert set(record) == {"step", "epoch", "split"} | metrics
        assert all(0 <= record[metric] <= 1 for metric in metrics)
        assert record["mrr@5@mean"] == pytest.approx((record["mrr@5@4"] + record["mrr@5@8"]) / 2)
    assert [train[i]["lr"] for i in range(4)] == pytest.approx([0.0075, 0.015, 0.0225, 0.03])
    assert train[-1]["lr"] < 0.001


def test_loss_falls(finished: tuple[Path, str]) -> None:
    for size in (4, 8):
        losses = [record[f"loss@{size}"] for record in records(finished[0])]
        assert sum(losses[-4:]) / 4 < 0.9 * losses[0]


def test_evaluation_has_every_size(finished: tuple[Path, str]) -> None:
    run, output = finished
    result = evaluation(run)
    users = sum(block.count for block in Store.open(run.parent / "store").manifest.splits["test"])
    assert {"split", "users", "mask_seen", "sizes", "masked"} <= set(result)
    assert (result["split"], result["users"], result["mask_seen"]) == ("test", users, False)
    assert list(result["sizes"]) == ["4", "8"]
    for row in result["sizes"].values():
        assert list(row) == ["recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10"]
        assert row["recall@10"] >= row["ndcg@10"] >= row["mrr@10"] > 0
    table = output[output.index("whole catalogue ranked") :]
    assert all(f"{row['ndcg@10']:.4f}" in table for row in result["sizes"].values())
    assert str(run / "evaluation.png") in table


def test_tensorboard_has_the_same_figures(finished: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    for split, name in (("train", "loss@8"), ("train", "lr"), ("valid", "ndcg@10@8")):
        shown = [(event.step, event.value) for event in events.Scalars(f"{split}/{name}")]
        written = [(record["step"], record[name]) for record in records(finished[0], split)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]


def test_first_step_by_definition(shop: Path, tmp_path: Path) -> None:
    """Loss: the mean over sizes of the mean cross-entropy over positions. AdamW's first step equals the rate."""
    words = ["--train.max_steps", 1, "--model.dropout", 0, "--model.lru_dropout", 0]
    run = train_here(shop, tmp_path / "run", *words)
    (record,) = records(run)
    config = load_config(shop, [str(word) for word in words])
    store = Store.open(config.store.path)
    torch.manual_seed(config.train.seed)
    table = load_item_table(store, None)
    model = build_model(config.model, table)
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, config.train.seed)
    batch = TrainStream(store, order, WindowRule(50, "last", True)).batch(0, 0, range(16))
    items = model.encoder(model.encoder.normalize(table.values, table.present), table.present)
    z = model(items[batch.items], batch.starts, batch.from_start)
    losses = {size: F.cross_entropy(z[:, :size] @ items[:, :size].T, batch.targets) for size in (4, 8)}
    for size, loss in losses.items():
        assert record[f"loss@{size}"] == pytest.approx(loss.item(), rel=1e-5)
    (sum(losses.values(), torch.tensor(0.0)) / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moved = load_file(run / "checkpoints" / "latest" / "model.safetensors")["encoder.bias"] - model.encoder.bias
    assert moved.abs().tolist() == pytest.approx([record["lr"]] * 8, rel=1e-4)


def test_record_covers_all_steps_since_the_last(finished: tuple[Path, str], shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.log_every_steps", 100, "--train.max_steps", STEPS_PER_EPOCH)
    (record,) = records(run)
    store = Store.open(shop.parent / "store")
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    stream = TrainStream(store, order, WindowRule(50, "last", True))
    counts = [len(stream.batch(0, step, range(16)).targets) for step in range(STEPS_PER_EPOCH)]
    steps = records(finished[0])[:STEPS_PER_EPOCH]
    expected = sum(count * step["loss@8"] for count, step in zip(counts, steps, strict=True)) / sum(counts)
    assert record["loss@8"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH + 5, 2 * STEPS_PER_EPOCH])
def test_resumed_run_is_the_uninterrupted_one(stop: int, shop: Path, tmp_path: Path) -> None:
    words = ["--eval.every_steps", stop, "--train.log_every_steps", 3]
    whole = train_here(shop, tmp_path / "whole", *words)
    halved = train_here(shop, tmp_path / "halved", *words, "--train.max_steps", stop)
    assert records(halved)[-1]["step"] == stop
    train_here(shop, halved, *words, "--resume", "auto")
    assert_same_run(halved, whole)


def test_killed_run_resumes(shop: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints, with a half-written line: the work since the last checkpoint is repeated."""
    words = ["--train.epochs", "8", "--train.checkpoint_every_steps", "5", "--eval.every_steps", "10000"]
    run = tmp_path / "killed"
    train_and_kill(shop, run, words, lines=22)
    assert not (run / "evaluation.json").exists()
    saved = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["state"]["step"]
    assert saved >= 15 and saved % 5 == 0, "the checkpoint of step 20 may still be in progress when line 22 is written"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 64, "epoch": 7, "spl')

    train_here(shop, run, *words, "--resume", "auto")
    assert_same_run(run, train_here(shop, tmp_path / "whole", *words))


def test_resume_from_an_earlier_checkpoint_cuts_the_log_back(shop: Path, tmp_path: Path) -> None:
    whole = train_here(shop, tmp_path / "whole")
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "epoch": 2, "split": "train", "loss": -1.0}\n')
    train_here(shop, run, "--resume", run / "checkpoints" / "best")
    assert_same_run(run, whole)


def test_resume_from_another_run_keeps_its_own_best(finished: tuple[Path, str], shop: Path, tmp_path: Path) -> None:
    """The other run's best stays in its folder, so this run's best is the best of its own evaluations."""
    first = train_here(shop, tmp_path / "first", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    before = figures(first)
    second = train_here(shop, tmp_path / "second", "--resume", first)
    assert figures(second) == [line for line in figures(finished[0]) if line["step"] > 2 * STEPS_PER_EPOCH]
    assert (second / "checkpoints" / "best").resolve().name == "step-00000024"
    assert evaluation(second) != evaluation(finished[0])
    assert figures(first) == before


def test_resume_auto_without_a_checkpoint_starts_fresh(
    finished: tuple[Path, str], shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished[0] / "config.yaml", run)
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0, "split": "train", "loss": -1.0}\n')
    train_here(shop, run, "--resume", "auto")
    assert "from step 0" in capsys.readouterr().out
    assert_same_run(run, finished[0])


def test_finished_run_ends_at_once(finished: tuple[Path, str]) -> None:
    run, _ = finished
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    result = run_module("fmrl_dist.train", "--config", run / "config.yaml", "--resume", "auto")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{run} is finished (step 24); nothing to do\nreport: {run / 'report.html'}\n"
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before


def test_run_killed_before_its_evaluation_is_evaluated(finished: tuple[Path, str], shop: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, symlinks=True)
    (run / "evaluation.json").unlink()
    log = (run / "metrics.jsonl").read_bytes()
    train_here(shop, run, "--resume", "auto")
    assert evaluation(run) == evaluation(finished[0])
    assert (run / "metrics.jsonl").read_bytes() == log


def test_evaluation_of_the_shorter_run_does_not_stay(shop: Path, tmp_path: Path) -> None:
    """A run that is extended and fails has no final figures; those of the shorter run could be mistaken for them."""
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2)
    overwrite_weights(run, factor=1e30)
    assert (run / "evaluation.json").exists()
    with pytest.raises(UserError, match="is not finite"):
        train_here(shop, run, "--train.max_steps", 4, "--resume", "auto")
    assert not (run / "evaluation.json").exists()


def test_early_stopping(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train.lr", "1e-12", "--train.patience", 2, "--eval.every_steps", 3]
    run = train_here(shop, tmp_path / "run", *words)
    assert [record["step"] for record in records(run, "valid")] == [3, 6, 9], "best at 3, then two without gain"
    assert records(run)[-1]["step"] == 9
    assert (run / "checkpoints" / "best").resolve().name == "step-00000003"
    log = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train_here(shop, run, *words, "--resume", "auto")
    assert "is finished (step 9)" in capsys.readouterr().out
    train_here(shop, run, *words, "--resume", "auto", "--train.patience", 3)
    assert (run / "metrics.jsonl").read_bytes().startswith(log)
    assert [record["step"] for record in records(run, "valid")] == [3, 6, 9, 12]


@pytest.mark.parametrize(("metric", "size"), [("recall@5", 4), ("mrr@10", 0)])
def test_best_is_of_the_chosen_metric_and_size(metric: str, size: int, shop: Path, tmp_path: Path) -> None:
    words = ["--eval.metric", metric, "--eval.size", size, "--eval.every_steps", 3]
    run = train_here(shop, tmp_path / "run", *words)
    values = {record["step"]: record[f"{metric}@{size or 8}"] for record in records(run, "valid")}
    best = max(values, key=lambda step: (values[step], -step))
    assert len(set(values.values())) > 1
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best:08d}"


def test_limits_by_steps_and_a_subset_of_users(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 5, "--eval.every_steps", 2, "--eval.users", 10)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5]
    valid = records(run, "valid")
    assert [record["step"] for record in valid] == [2, 4, 5]
    for record, size in itertools.product(valid, (4, 8)):
        hits = record[f"recall@10@{size}"] * 10
        assert hits == pytest.approx(round(hits), abs=1e-9), "a fraction of ten users"
    assert evaluation(run)["users"] > 10


def test_all_windows_train_on_every_target(shop: Path, tmp_path: Path) -> None:
    words = ["--data.max_length", 3, "--train.max_steps", 2]
    last, every = (
        records(train_here(shop, tmp_path / windows, *words, "--data.windows", windows)) for windows in ("last", "all")
    )
    assert [record["step"] for record in every] == [1, 2]
    assert all(one["loss"] != other["loss"] for one, other in zip(last, every, strict=True))


def test_ids_alone(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--model.features", "[]", "--model.id_table", "true")
    tensors = load_file(run / "checkpoints" / "best" / "model.safetensors")
    assert tensors["encoder.id_table"].shape == (NUM_ITEMS, 8)
    assert tensors["encoder.weight"].shape == (8, 0)
    assert (run / "report.html").is_file()
    losses = [record["loss"] for record in records(run)]
    assert sum(losses[-4:]) / 4 < 0.97 * losses[0]


def test_feature_subset(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--model.features", "[colour]", "--train.max_steps", 2)
    assert json.loads((run / "checkpoints" / "best" / "state.json").read_text())["features"] == {"colour": 4}
    assert load_file(run / "checkpoints" / "best" / "model.safetensors")["encoder.weight"].shape == (8, 4)


def test_bf16_is_near_fp32(finished: tuple[Path, str], shop: Path, tmp_path: Path) -> None:
    """But in the epoch's last step, of one history: norms of nearly equal channels magnify rounding."""
    run = train_here(shop, tmp_path / "run", "--train.precision", "bf16", "--train.max_steps", STEPS_PER_EPOCH - 1)
    for half, single in zip(records(run), records(finished[0]), strict=False):
        assert half["loss"] == pytest.approx(single["loss"], rel=1e-2)
        assert half["loss"] != single["loss"]
    tensors = load_file(run / "checkpoints" / "latest" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def overwrite_weights(run: Path, factor: float) -> None:
    """Multiply the latest checkpoint's weights."""
    file = run / "checkpoints" / "latest" / "model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)
    reseal(file.parent)


def test_missing_demo_store_is_built(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "stores" / "demo"
    words = ["--data.demo", "{users: 60, items: 80}", "--data.root", tmp_path / "data", "--store.path", store]
    words += ["--data.features", "{text: {source: tfidf, dim: 8}}", "--train.max_steps", 1, "--train.threads", 1]
    run = train_here(DEMO_CONFIG, tmp_path / "run", *words, "--run.tensorboard", "false")
    assert f"building the demo store {store} …" in capfd.readouterr().out
    assert set(store.parent.iterdir()) == {store, store.parent / "demo.derived"}
    assert list(evaluation(run)["sizes"]) == ["8", "16", "32", "64", "128"]


def test_a_demo_store_of_another_config_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A store that is already there was trained on whatever the config asked for, with exit code 0."""
    store = tmp_path / "store"
    demo = ["--data.demo", "{users: 60, items: 80}", "--data.root", str(tmp_path / "data"), "--store.path", str(store)]
    demo += ["--data.features", "{text: {source: tfidf, dim: 8}}"]
    build_store(load_config(DEMO_CONFIG, demo))
    words = [*demo, "--train.max_steps", 1, "--train.threads", 1, "--run.tensorboard", "false"]
    other = ["--data.features", "{text: {source: tfidf, dim: 9}}", "--data.demo", "{users: 61, items: 80}"]
    line = refusal(train.main, "--config", DEMO_CONFIG, "--run.dir", tmp_path / "run", *words, *other)
    assert f"demo store {store} was built from something else: data.demo.users is 60, the config's 61; " in line
    assert "data.features.text.dim is 8, the config's 9; build it again with python -m shards.build" in line
    assert not (tmp_path / "run").exists()
    as_older_version(store)
    run = train_here(DEMO_CONFIG, tmp_path / "run", *words, *other, "--data.max_length", 7)
    assert f"note: an older version built {store}, and did not record what from" in capfd.readouterr().out
    assert evaluation(run)["users"] > 0


def test_a_key_that_the_store_was_not_built_with_is_noted(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--train.max_steps", 1]
    train_here(shop, tmp_path / "same", *words, "--data.max_length", 9)
    assert "note:" not in capsys.readouterr().out
    train_here(shop, tmp_path / "other", *words, "--data.items.title", "title", "--store.items_per_block", 17)
    note = "was built by another config: data.items.title is '', the config's 'title'; store.items_per_block is 16, the"
    assert note in capsys.readouterr().out


def test_events_that_windows_leave_out_are_noted(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--train.max_steps", 1, "--data.max_length", 3]
    train_here(shop, tmp_path / "last", *words)
    said = re.search(
        r"note: at least (\d+)% of the training events .* the last 3 events of each user train", capsys.readouterr().out
    )
    assert said is not None
    store = Store.open(load_config(shop).store.path)
    blocks = store.read_each(store.manifest.splits["train"])
    lengths = [length for block in blocks if block for length in np.diff(block["starts"]).tolist()]
    left_out = sum(max(0, length - 3) for length in lengths) / sum(lengths)
    assert 0.05 < int(said[1]) / 100 <= left_out + 0.005
    train_here(shop, tmp_path / "all", *words, "--data.windows", "all")
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("log_every_steps", [1, 100], ids=["seen in the record", "seen before the next step"])
def test_loss_that_is_not_finite_stops_and_leaves_the_best(log_every_steps: int, shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    overwrite_weights(run, factor=1e30)
    checkpoints = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*") if path.is_file()}
    log = (run / "metrics.jsonl").read_text()
    users = r"users of the batch: \[\d+(, \d+){7}\]"
    with pytest.raises(UserError, match=rf"step 17, rank 0: loss is not finite; {users}"):
        train_here(shop, run, "--resume", "auto", "--train.log_every_steps", log_every_steps)
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*") if path.is_file()} == checkpoints
    assert (run / "metrics.jsonl").read_text() == log


def a_run(shop: Path, folder: Path) -> Run:
    """The learner that :func:`fmrl_dist.train` would train."""
    config = load_config(shop)
    store = Store.open(config.store.path)
    order = Order([block.count for block in store.manifest.splits["train"]], 16, 16, 0)
    return Run(config, start_runtime(1, lanes=16), folder, store, order, total_steps=8)


def test_a_gradient_that_is_not_finite_changes_no_weight(shop: Path, tmp_path: Path) -> None:
    """The optimiser is notified on the device, before it steps; later steps are as if this one had not happened."""
    engine = prepare_learner(a_run(shop, tmp_path), None).engine
    assert isinstance(engine, DataParallelEngine)
    parameters = dict(engine._module.named_parameters())
    before: dict[str, torch.Tensor] = {}
    for value in (1.0, math.nan, math.inf, 1.0):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 0.01)
        parameters["model.encoder.bias"].grad.view(-1)[3] = value  # type: ignore[union-attr]
        norm = engine.clip_and_step()
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        assert norm.isfinite() == (value == 1.0)
        assert not before or all(torch.equal(now[name], before[name]) for name in now) != (value == 1.0)
        before = now
    assert {float(state["step"]) for state in engine._optimizer.state.values()} == {2.0}


def test_a_step_waits_for_one_exchange(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two records, the agreement before each step is the only exchange that blocks the processes."""
    reduced: list[int] = []
    reduce = Accelerator.reduce

    def note(self: Accelerator, tensor: torch.Tensor, *words: object) -> object:
        reduced.append(tensor.numel())
        return reduce(self, tensor, *words)

    monkeypatch.setattr(Accelerator, "reduce", note)
    train_here(shop, tmp_path / "few", "--train.max_steps", 2, "--train.log_every_steps", 100)
    few = len(reduced)
    train_here(shop, tmp_path / "more", "--train.max_steps", 7, "--train.log_every_steps", 100)
    assert len(reduced) - few == few + 5


def test_learning_rate_that_explodes_ends_the_command(shop: Path, tmp_path: Path) -> None:
    result = run_module("fmrl_dist.train", "--config", shop, "--run.dir", tmp_path / "run", "--train.lr", "1e30")
    assert result.returncode == EXIT_USER_ERROR
    assert re.fullmatch(r"error: step 2, rank 0: \w+ is not finite.*; lower train.lr, or look .*\n", result.stderr)
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
