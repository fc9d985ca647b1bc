"""Refusals of ``python -m fmrl_dist.train``: one line on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from fmrl_dist import train
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.manifest import Block
from fmrl_dist.data.store.reader import Store
from shards.store.builder import build_store
from tests.fixtures.checkpoints import reseal
from tests.fixtures.training import (
    contents,
    evaluation,
    make_shop,
    records,
    refusal,
    run_module,
    shop_values,
    train_here,
)

MAX_STEPS = 4


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def stopped(shop: Path) -> Path:
    """A run stopped by its step limit."""
    return train_here(shop, shop.parent / "stopped", "--train.max_steps", MAX_STEPS)


@pytest.fixture
def copied_run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def copied_store(shop: Path, tmp_path: Path) -> Path:
    shutil.copytree(shop.parent / "store", tmp_path / "store")
    return tmp_path / "store"


def flip_byte(store: Path, block: Block) -> None:
    """Change one byte in the middle of a block."""
    with (store / block.shard).open("r+b") as file:
        file.seek(block.offset + block.num_bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--train.learning_rate", "1"], "unknown config key 'train.learning_rate'"),
        (["--model.sizes", "[8, 4]"], "do not increase"),
        (["--store.path", "nowhere"], "store nowhere does not exist; build it with python -m shards.build"),
        (["--model.features", "[vector, picture]"], "'picture'; the store"),
        (["--model.features", "[vector, picture]", "--resume", "auto"], "has: vector, colour"),
        (["--resume", "nowhere"], "nowhere holds no checkpoint; expected a run folder"),
    ],
)
def test_mistake_leaves_no_folder(words: list[str], complaint: str, shop: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    assert complaint in refusal(train.main, "--config", shop, "--run.dir", run, *words)
    assert list(tmp_path.iterdir()) == []


def test_refusal_by_the_command_itself(shop: Path, stopped: Path) -> None:
    before = contents(stopped)
    result = run_module("fmrl_dist.train", "--config", shop, "--run.dir", stopped)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: run folder {stopped} exists; resume it with --resume auto, or choose another --run.dir\n"
    )
    assert contents(stopped) == before


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--model.sizes", "[4, 12]", "--model.width", "12"], "model.sizes"),
        (["--model.depth", "2"], "model.depth"),
        (["--model.features", "[colour]"], "model.features"),
        (["--loss.predict_first", "false"], "loss.predict_first"),
        (["--train.lr", "0.04"], "train.lr 0.03, this run 0.04"),
        (["--train.seed", "1"], "train.seed"),
        (["--train.batch_size", "32"], "train.batch_size"),
        (["--train.lanes", "8"], "train.lanes 16, this run 8"),
        (
            ["--train.epochs", "4"],
            "train.schedule_epochs 3, this run 4; restore the value (--train.epochs 3, which it follows)",
        ),
        (["--train.schedule_epochs", "4"], "train.schedule_epochs 3, this run 4; restore the value, or start"),
        (["--train.precision", "bf16"], "train.precision"),
        (["--data.windows", "all"], "data.windows"),
    ],
)
def test_checkpoint_of_another_config(words: list[str], key: str, shop: Path, stopped: Path) -> None:
    before = contents(stopped)
    line = refusal(train.main, "--config", shop, "--run.dir", stopped, "--resume", "auto", *words)
    assert f"checkpoint {(stopped / 'checkpoints' / 'latest').resolve()} has {key}" in line
    assert contents(stopped) == before


def test_what_may_change_on_resume(shop: Path, copied_run: Path, copied_store: Path) -> None:
    """Length with a fixed schedule, evaluation, logging, the loss's implementation and paths."""
    words = ["--train.epochs", 4, "--train.schedule_epochs", 3, "--eval.users", 20, "--train.log_every_steps", 2]
    words += ["--loss.impl", "plain", "--store.path", copied_store, "--train.max_steps", MAX_STEPS + 4]
    train_here(shop, copied_run, "--resume", "auto", *words)
    assert [record["step"] for record in records(copied_run)] == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("words", [["--eval.metric", "recall@10"], ["--eval.size", "mean"]], ids=["metric", "size"])
def test_a_best_that_is_chosen_otherwise_is_searched_anew(
    words: list[object], shop: Path, copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of two metrics do not compare: by the old one's value no later checkpoint might ever be the best."""
    latest = load_checkpoint(copied_run / "checkpoints" / "latest")
    state = json.loads((latest.path / "state.json").read_text())
    state["state"]["best_value"] = 2.0
    (latest.path / "state.json").write_text(json.dumps(state))
    reseal(latest.path)
    train_here(shop, copied_run, "--resume", "auto", "--eval.every_steps", 1, *words)
    assert "was chosen by other eval.users, eval.metric or eval.size: the search restarts" in capsys.readouterr().out
    assert load_checkpoint(copied_run).state.step > latest.state.step


def test_checkpoint_of_another_store(shop: Path, copied_run: Path, tmp_path: Path) -> None:
    values = shop_values(shop.parent)
    values["data"]["features"].pop("colour")
    values["store"]["path"] = str(tmp_path / "other")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(values))
    build_store(load_config(other))
    before = contents(copied_run)
    line = refusal(train.main, "--config", other, "--run.dir", copied_run, "--resume", "auto")
    assert "has the store's manifest " in line
    assert contents(copied_run) == before


def test_store_of_another_schema_version(shop: Path, copied_store: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied_store / "manifest.json").read_text())
    (copied_store / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--store.path", copied_store)
    assert f"store {copied_store}: the store has schema version 99, this program reads versions 2 to 4" in line
    assert not (tmp_path / "run").exists()


def test_store_without_users_to_validate_on(shop: Path, tmp_path: Path) -> None:
    """Refused before hours of training, not after."""
    values = shop_values(tmp_path)
    shutil.copytree(shop.parent / "raw", tmp_path / "raw")
    table = pq.read_table(tmp_path / "raw" / "sequences.parquet")
    pq.write_table(
        table.filter([len(items) == 2 for items in table["item_ids"].to_pylist()]),
        tmp_path / "raw" / "sequences.parquet",
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    build_store(load_config(config))
    line = refusal(train.main, "--config", config, "--run.dir", tmp_path / "run")
    assert "has no valid users (all histories are shorter than 3 events); build it from more events" in line
    assert not (tmp_path / "run").exists()


def test_damaged_features_leave_no_folder(shop: Path, copied_store: Path, tmp_path: Path) -> None:
    block = Store.open(copied_store).manifest.items[-1]
    flip_byte(copied_store, block)
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", "--store.path", copied_store)
    assert f"shard {copied_store / block.shard} is damaged" in line
    assert not (tmp_path / "run").exists()


def test_damaged_training_shard(shop: Path, copied_store: Path, tmp_path: Path) -> None:
    """Found when the block is read; once the shard is repaired, the run resumes as if nothing had happened."""
    block = Store.open(copied_store).manifest.splits["train"][3]
    flip_byte(copied_store, block)
    run = tmp_path / "run"
    words = ["--store.path", copied_store]
    line = refusal(train.main, "--config", shop, "--run.dir", run, *words)
    assert f"block at byte {block.offset} of shard {copied_store / block.shard} is damaged" in line
    assert "python -m shards.verify" in line
    flip_byte(copied_store, block)
    train_here(shop, run, *words, "--train.max_steps", 2, "--resume", "auto")
    assert [record["step"] for record in records(run)] == [1, 2]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_checkpoint(file: str, damage: str, shop: Path, copied_run: Path) -> None:
    path = copied_run / "checkpoints" / "latest" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    before = contents(copied_run)
    line = refusal(train.main, "--config", shop, "--run.dir", copied_run, "--resume", "auto")
    assert str(copied_run) in line
    assert "is damaged" in line or "holds no checkpoint" in line
    assert contents(copied_run) == before


def test_weights_that_do_not_fit(shop: Path, copied_run: Path) -> None:
    path = copied_run / "checkpoints" / "latest" / "model.safetensors"
    save_file({name: t[:4].contiguous() for name, t in load_file(path).items()}, path)
    reseal(path.parent)
    before = contents(copied_run)
    line = refusal(train.main, "--config", shop, "--run.dir", copied_run, "--resume", "auto")
    assert "does not fit its config" in line
    assert contents(copied_run) == before


def test_nothing_left_to_train_elsewhere(shop: Path, stopped: Path, tmp_path: Path) -> None:
    words = ["--run.dir", tmp_path / "run", "--train.max_steps", MAX_STEPS]
    line = refusal(train.main, "--config", shop, "--resume", stopped, *words)
    assert "has nothing left to train" in line and "has none of its own" in line
    assert not (tmp_path / "run").exists()


def test_one_process_where_several_were_requested(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run")
    assert "several processes were requested but one was started" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_launcher_precision_that_is_refused(
    precision: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run")
    assert f"the launcher requests mixed precision {precision!r}; expected no or bf16" in line
    assert not (tmp_path / "run").exists()


def test_launcher_precision_is_recorded(
    shop: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the run cannot resume with another precision unnoticed."""
    words = ["--train.max_steps", 2]
    by_config = train_here(shop, tmp_path / "config", *words, "--train.precision", "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    by_launcher = train_here(shop, tmp_path / "launcher", *words)
    assert [record["loss"] for record in records(by_launcher)] == [record["loss"] for record in records(by_config)]
    assert evaluation(by_launcher) == evaluation(by_config)
    assert load_config(by_launcher / "config.yaml").train.precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    line = refusal(train.main, "--config", shop, "--run.dir", by_launcher, "--resume", "auto")
    assert "has train.precision 'bf16', this run 'fp32'" in line


@pytest.mark.parametrize("folder", [".", "/", "~", "file"])
def test_a_folder_that_is_not_a_runs_own(
    folder: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    path = str(tmp_path / "home") if folder == "~" else folder
    line = refusal(train.main, "--config", shop, "--run.dir", path, "--resume", "auto")
    assert f"run.dir is {path!r}; expected a folder of its own, such as runs/first" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "home"]
    assert (tmp_path / "file").read_text() == "mine" and list((tmp_path / "home").iterdir()) == []
