"""``python -m fmrl_dist.evaluate`` from end to end on a small shop."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from fmrl_dist import __version__, evaluate
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.run_folder import is_finished
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.results.report import describe
from shards.store.builder import build_store
from tests.fixtures.checkpoints import flip
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    contents,
    evaluate_here,
    evaluation,
    figures,
    make_shop,
    origin_of_evaluation,
    records,
    refusal,
    run_module,
    shop_values,
    train_here,
    write_shop,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    """A run whose best checkpoint is not its latest."""
    run = train_here(shop, shop.parent / "run")
    assert (run / "checkpoints" / "best").resolve() != (run / "checkpoints" / "latest").resolve()
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_command_repeats_the_end_of_training(run: Path) -> None:
    """The command itself writes the table, the JSON and the plot of a run that lacks them."""
    expected = (run / "evaluation.json").read_bytes()
    ranks = (run / "evaluation-users.parquet").read_bytes()
    for name in ("evaluation.json", "evaluation.png", "evaluation-users.parquet"):
        (run / name).unlink()
    result = run_module("fmrl_dist.evaluate", "--checkpoint", run, "--threads", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert (run / "evaluation.json").read_bytes() == expected
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "evaluation-users.parquet").read_bytes() == ranks
    assert result.stdout == (
        f"{describe(evaluation(run))}\nwritten: {run / 'evaluation.json'}\npicture: {run / 'evaluation.png'}\n"
        f"users: {run / 'evaluation-users.parquet'}\n"
    )


def test_validation_of_the_best_is_what_training_saw(run: Path) -> None:
    evaluate_here(run, "--split", "valid")
    result = evaluation(run, "evaluation-valid")
    assert (result["split"], result["mask_seen"]) == ("valid", False)
    best = max(records(run, "valid"), key=lambda record: record["ndcg@10@4"])
    assert result["sizes"] == {
        size: {metric: best[f"{metric}@{size}"] for metric in row} for size, row in result["sizes"].items()
    }


def test_masking_seen_items_only_helps(run: Path) -> None:
    evaluate_here(run, "--mask-seen")
    masked, plain = evaluation(run, "evaluation-masked"), evaluation(run)
    assert masked["mask_seen"] is True and masked["users"] == plain["users"]
    assert plain["masked"]["sizes"] == masked["sizes"] and masked["unmasked"]["sizes"] == plain["sizes"]
    for size, row in plain["sizes"].items():
        assert all(masked["sizes"][size][metric] >= value for metric, value in row.items())
    assert masked["sizes"] != plain["sizes"]
    assert (run / "evaluation-masked.png").exists()


def test_best_checkpoint_reports_into_its_run(run: Path) -> None:
    expected = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    evaluate_here(run / "checkpoints" / "best")
    assert (run / "evaluation.json").read_bytes() == expected


def test_latest_checkpoint_does_not_change_the_runs_figures(run: Path) -> None:
    before = (run / "evaluation.json").read_bytes()
    evaluate_here(run / "checkpoints" / "latest")
    assert (run / "evaluation.json").read_bytes() == before
    assert evaluation(run / "checkpoints" / "latest")["sizes"] != evaluation(run)["sizes"]


def test_store_that_was_moved(run: Path, shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop.parent / "store", tmp_path / "store")
    expected = evaluation(run)
    (run / "evaluation.json").unlink()
    evaluate_here(run, "--store", tmp_path / "store")
    assert evaluation(run) == expected
    assert origin_of_evaluation(run)["store"] == str(tmp_path / "store")


def test_figures_say_what_they_are_of(run: Path, shop: Path, tmp_path: Path) -> None:
    """Model, store and version; figures on another store than the run's own do not replace the run's."""
    best, store = load_checkpoint(run), Store.open(shop.parent / "store")
    assert origin_of_evaluation(run) == {
        "checkpoint": {"step": best.state.step, "sha256": best.sha256},
        "store": str(store.path),
        "manifest_sha256": store.manifest.sha256,
        "fmrl_dist_version": __version__,
    }
    before = (run / "evaluation.json").read_bytes()
    other, _ = build_store(
        load_config(shop, ["--store.users_per_block", "32", "--store.path", str(tmp_path / "other")])
    )
    evaluate_here(run, "--store", other.path)
    assert (run / "evaluation.json").read_bytes() == before
    name = f"evaluation-on-{other.manifest.sha256[:12]}"
    assert evaluation(run, name)["users"] == evaluation(run)["users"]
    assert origin_of_evaluation(run, name)["manifest_sha256"] == other.manifest.sha256
    for part in ("1/2", "2/2"):
        evaluate_here(run, "--store", other.path, "--part", part)
    (run / f"{name}.json").unlink()
    evaluate_here(run, "--store", other.path, "--join")
    assert evaluation(run, name)["users"] == evaluation(run)["users"]
    assert (run / "evaluation.json").read_bytes() == before


def test_an_evaluation_does_not_finish_a_run(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that is stopped halfway, say: resumed, it trains on, and its figures are those of its end."""
    whole = train_here(shop, tmp_path / "whole")
    run = train_here(shop, tmp_path / "run", "--train.max_steps", 2 * STEPS_PER_EPOCH)
    assert is_finished(run)
    (run / "finished.json").unlink()  # as if a signal had stopped it
    evaluate_here(run)
    assert not is_finished(run)
    capsys.readouterr()
    train_here(shop, run, "--resume", "auto")
    assert "is finished" not in capsys.readouterr().out
    assert figures(run) == figures(whole) and evaluation(run) == evaluation(whole)
    train_here(shop, run, "--resume", "auto")
    assert "is finished (step 24); nothing to do" in capsys.readouterr().out
    flip(run / "evaluation.json", (run / "evaluation.json").read_bytes().index(b'"recall@5": 0.') + 14)
    assert not is_finished(run) and evaluation(run) != evaluation(whole)
    train_here(shop, run, "--resume", "auto")
    assert is_finished(run) and evaluation(run) == evaluation(whole), "damaged figures are computed again"


def other_store(root: Path, num_items: int, dim: int) -> Path:
    """A store whose catalogue has ``num_items`` items and whose feature ``vector`` has ``dim`` channels."""
    write_shop(root / "raw", num_items)
    np.save(root / "raw" / "vector.npy", np.ones((num_items, dim), np.float32))
    values = shop_values(root)
    (root / "config.yaml").write_text(yaml.safe_dump(values))
    build_store(load_config(root / "config.yaml"))
    return Path(values["store"]["path"])


def test_store_with_another_feature_dim(run: Path, tmp_path: Path) -> None:
    store = other_store(tmp_path / "other", num_items=40, dim=5)
    before = contents(run)
    line = refusal(evaluate.main, "--checkpoint", run, "--store", store)
    assert "reads features {'vector': 6, 'colour': 4}" in line and f"store {store} has {{'vector': 5" in line
    assert contents(run) == before


def test_store_with_another_catalogue(shop: Path, run: Path, tmp_path: Path) -> None:
    """A model without an id table ranks a new catalogue; one with an id table knows its own items only."""
    store = other_store(tmp_path / "other", num_items=50, dim=6)
    evaluate_here(run, "--store", store)
    ids = train_here(shop, tmp_path / "ids", "--model.id_table", "true", "--train.max_steps", 1)
    line = refusal(evaluate.main, "--checkpoint", ids, "--store", store)
    assert f"store {store} has 10 items that" in line and "does not know, such as 'i40'" in line


def test_store_without_the_feature(shop: Path, run: Path, tmp_path: Path) -> None:
    values = shop_values(shop.parent)
    values["data"]["features"].pop("colour")
    values["store"]["path"] = str(tmp_path / "store")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    build_store(load_config(tmp_path / "config.yaml"))
    line = refusal(evaluate.main, "--checkpoint", run, "--store", tmp_path / "store")
    assert f"'colour'; the store {tmp_path / 'store'} has: vector" in line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--checkpoint", "nowhere"], "nowhere holds no checkpoint; expected a run folder"),
        ([], "--checkpoint"),
        (["--checkpoint", "nowhere", "--split", "train"], "invalid choice: 'train'"),
        (["--checkpoint", "nowhere", "--threads", "-1"], "--threads is -1; expected at least 1"),
    ],
)
def test_mistake_on_the_command_line(words: list[str], complaint: str) -> None:
    assert complaint in refusal(evaluate.main, *words)


def test_run_without_a_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert f"{run} holds no checkpoint" in refusal(evaluate.main, "--checkpoint", run)
    assert contents(run) == before


def test_damaged_checkpoint(run: Path) -> None:
    file = run / "checkpoints" / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = contents(run)
    line = refusal(evaluate.main, "--checkpoint", run)
    assert f"checkpoint {(run / 'checkpoints' / 'best').resolve()} is damaged" in line
    assert contents(run) == before


def test_store_is_gone(run: Path, tmp_path: Path) -> None:
    line = refusal(evaluate.main, "--checkpoint", run, "--store", tmp_path / "gone")
    assert f"store {tmp_path / 'gone'} does not exist" in line


def test_launcher_precision_is_checked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "mixed precision 'fp16'; expected no or bf16" in refusal(evaluate.main, "--checkpoint", run)
