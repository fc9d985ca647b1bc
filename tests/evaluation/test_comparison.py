"""Runs side by side: seeds aggregated, users paired, intervals and significance."""

from __future__ import annotations

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fmrl_dist.evaluation.results.bootstrap
from fmrl_dist import baselines, compare
from fmrl_dist.config.loading import load_config
from fmrl_dist.evaluation.results.bootstrap import bootstrap
from tests.fixtures.training import evaluate_here, evaluation, make_shop, refusal, run_here, train_here


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> list[Path]:
    """A model that learns much, with two seeds, and one that learns nothing."""
    words = [("a0", "--train.seed", 0), ("a1", "--train.seed", 1), ("b", "--train.lr", 1e-9)]
    longer = ("--train.epochs", 12, "--eval.size", 8, "--eval.cut_vectors", "true")
    return [train_here(shop, shop.parent / name, *longer, *options) for name, *options in words]


@pytest.fixture
def runs(trained: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / run.name, symlinks=True)) for run in trained]


def compared(folder: Path, *words: object) -> Any:
    run_here(compare.main, [*words, "--output", folder])
    return json.loads((folder / "comparison.json").read_text())


def test_examples_run() -> None:
    result = doctest.testmod(fmrl_dist.evaluation.results.bootstrap)
    assert result.attempted >= 3 and result.failed == 0


def test_the_bootstrap_is_that_of_resampled_users() -> None:
    """Against plain resampling with replacement, and against the normal approximation."""
    generator = np.random.default_rng(1)
    values = generator.choice([0.0, 0.3, 0.5, 1.0], 400, p=[0.7, 0.1, 0.1, 0.1])
    found = bootstrap(values, 20_000, [0])
    plain = np.array([values[generator.integers(0, 400, 400)].mean() for _ in range(20_000)])
    assert found.mean == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.002)
    error = values.std() / np.sqrt(400)
    assert [found.low, found.high] == pytest.approx([found.mean - 1.96 * error, found.mean + 1.96 * error], abs=0.003)
    assert found.p == pytest.approx(2 / 20_001)
    assert bootstrap(values - values.mean(), 20_000, [0]).p > 0.9
    assert bootstrap(np.zeros(50), 1000, [0]).p == 1
    assert bootstrap(values, 500, [3]) == bootstrap(values, 500, [3]) != bootstrap(values, 500, [4])


def test_seeds_are_aggregated_and_users_are_paired(runs: list[Path], tmp_path: Path) -> None:
    result = compared(tmp_path, runs[2], runs[0], runs[1])
    assert result["models"] == {"b": [str(runs[2])], "a0": [str(runs[0]), str(runs[1])]}
    rows = {(row["model"], row["row"]): row for row in result["rows"]}
    assert list(rows) == [(model, row) for model in ("b", "a0") for row in ("4", "8", "vectors-4")]
    own = [evaluation(run) for run in runs]
    for key, size, row in (("sizes", "4", "4"), ("sizes", "8", "8"), ("vectors", "4", "vectors-4")):
        for protocol in ("unmasked", "masked"):
            a0, a1, b = ((e if protocol == "unmasked" else e["masked"])[key][size]["ndcg@10"] for e in own)
            figure = rows["a0", row][protocol]
            assert figure["by_seed"] == pytest.approx([a0, a1])
            assert figure["mean"] == pytest.approx((a0 + a1) / 2)
            assert figure["std_over_seeds"] == pytest.approx(abs(a0 - a1) / 2**0.5)
            assert figure["low"] < figure["mean"] < figure["high"]
            assert figure["difference"]["to"] == f"b {row}"
            assert figure["difference"]["mean"] == pytest.approx((a0 + a1) / 2 - b)
            assert figure["difference"]["low"] < figure["difference"]["mean"] < figure["difference"]["high"]
            assert "difference" not in rows["b", row][protocol]
    assert rows["a0", "8"]["unmasked"]["difference"]["p_holm"] < 0.05, "it has learned, and that is sure"
    assert result["baselines"]["popularity"]["masked"] == own[0]["masked"]["baselines"]["popularity"]["ndcg@10"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_seed_are_no_seeds(shop: Path, runs: list[Path], tmp_path: Path) -> None:
    """What differs cannot change a figure, it is said, but here it did: another checkpoint came out."""
    again = Path(shutil.copytree(runs[0], tmp_path / "again", symlinks=True))
    figures = (again / "evaluation.json").read_text()
    sha256 = json.loads(figures)["checkpoint"]["sha256"]
    (again / "evaluation.json").write_text(figures.replace(sha256, "0" * 64))
    table = pq.read_table(again / "evaluation-users.parquet")
    origin = {key: value.replace(sha256.encode(), b"0" * 64) for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(origin), again / "evaluation-users.parquet")
    result = compared(tmp_path, runs[0], again, runs[1])
    assert result["models"] == {"a0": [str(runs[0]), str(runs[1])], "again": [str(again)]}


def test_users_of_each_history_length(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as an evaluation of those users has, and as a comparison of all."""
    result = compared(tmp_path, runs[2], runs[0], runs[1], "--by-history")
    said = capsys.readouterr().out
    assert len(result["history"]) > 1
    for name, group in result["history"].items():
        own = evaluation(runs[0])["segments"][f"history {name}"]
        assert group["users"] == own["users"]
        row = next(row for row in group["rows"] if (row["model"], row["row"]) == ("a0", "8"))
        assert row["unmasked"]["by_seed"][0] == pytest.approx(own["sizes"]["8"]["ndcg@10"])
        assert row["unmasked"]["difference"]["to"] == "b 8"
        assert f"histories of {name} events: {group['users']:,} users\n" in said
    whole = next(row for row in result["rows"] if (row["model"], row["row"]) == ("a0", "8"))["unmasked"]["mean"]
    parts = [
        group["users"] * next(r for r in group["rows"] if (r["model"], r["row"]) == ("a0", "8"))["unmasked"]["mean"]
        for group in result["history"].values()
    ]
    assert sum(parts) / result["users"] == pytest.approx(whole)


def test_seeds_with_other_rows_are_refused(runs: list[Path], tmp_path: Path) -> None:
    evaluate_here(runs[1], "--no-cut-vectors")
    line = refusal(compare.main, runs[0], runs[1], "--output", tmp_path)
    assert f"{runs[1]} has figures of 4, 8, {runs[0]}, the same model, of 4, 8, vectors-4; evaluate both" in line


def test_any_metric_and_the_baselines(
    shop: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks are exact, so cut-offs need not be those of the evaluation."""
    store = load_config(shop).store.path
    run_here(baselines.main, ["--store", store, "--output", tmp_path / "free", "--threads", 1])
    names = ["popularity", "cosine", "cosine:vector", "cosine:colour", "item_knn"]
    free = evaluation(tmp_path / "free")
    assert list(free["sizes"]) == names
    known = evaluation(runs[0])
    assert {name: free["sizes"][name] for name in known["baselines"]} == known["baselines"]
    capsys.readouterr()
    result = compared(tmp_path, runs[0], tmp_path / "free", "--metric", "recall@3", "--samples", 500)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        "recall@3, test, 100 users in all runs, whole catalogue ranked (40 items), leave-one-out"
    )
    assert [row["row"] for row in result["rows"]] == ["4", "8", "vectors-4", *names]
    ranks = pq.read_table(runs[0] / "evaluation-users.parquet")["rank@8"].to_numpy()
    assert result["rows"][1]["unmasked"]["mean"] == pytest.approx((ranks <= 3).mean())
    assert result["rows"][3]["masked"]["difference"]["to"] == "a0 8", "the largest size, not cut vectors"


def test_users_are_paired_by_id(runs: list[Path], tmp_path: Path) -> None:
    """A file in another order, and one that lacks users: the users of both are compared, and that is said."""
    expected = compared(tmp_path, runs[0], runs[2])
    file = runs[2] / "evaluation-users.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(pa.array(np.random.default_rng(0).permutation(len(table)))), file)
    found = compared(tmp_path, runs[0], runs[2])
    for row, same in zip(found["rows"], expected["rows"], strict=True):
        for key in ("mean", "low", "high", "p"):
            pair = [figures["masked"].get("difference", figures["masked"]).get(key) for figures in (row, same)]
            assert pair[0] == pytest.approx(pair[1])
    pq.write_table(table.slice(30), file)
    fewer = compared(tmp_path, runs[0], runs[2])
    assert (fewer["users"], expected["users"]) == (70, 100)


def test_refusals(runs: list[Path], tmp_path: Path) -> None:
    def line(*words: object) -> str:
        return refusal(compare.main, *words, "--output", tmp_path)

    a0, a1, b = runs
    assert "are the same checkpoint; give each once" in line(a0, a0)
    assert f"{tmp_path} has no evaluation.json; evaluate it with" in line(a0, tmp_path)
    assert "is no metric" in line(a0, b, "--metric", "auc@3") and "at least 100" in line(a0, b, "--samples", "3")
    figures = json.loads((b / "evaluation.json").read_text())
    for key, other, complaint in (
        ("items", 5000, "items ranked: 5000 and 40"),
        ("split_rule", "given", "split: given"),
    ):
        (b / "evaluation.json").write_text(json.dumps(figures | {key: other}))
        assert f"do not compare, {complaint}" in line(a0, b)
    (b / "evaluation.json").write_text(json.dumps(figures))
    file = b / "evaluation-users.parquet"
    table, metadata = pq.read_table(file), pq.read_schema(file).metadata
    targets = pa.array(table["target"].to_pylist()[1:] + ["i0"])
    pq.write_table(table.set_column(2, "target", targets).replace_schema_metadata(metadata), file)
    assert "have different targets for the same users" in line(a0, b)
    renamed = pa.array([f"other {user}" for user in table["user"].to_pylist()])
    pq.write_table(table.set_column(0, "user", renamed).replace_schema_metadata(metadata), file)
    assert "has no user that all other runs have" in line(a0, b)
    shutil.copy(a0 / "evaluation-users.parquet", file)
    assert "are of different evaluations" in line(a0, b)
    file.write_bytes(b"PAR1 nonsense")
    assert "cannot be read" in line(a0, b)
    file.unlink()
    assert "has no evaluation-users.parquet, the ranks of every user" in line(a0, b)
    assert not (tmp_path / "comparison.json").exists()
