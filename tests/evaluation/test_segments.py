"""Segments of users, by hand; their figures are those of their users, and together those of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.metrics import metric_of_users
from fmrl_dist.evaluation.segments import NUM_CELLS, Segments, segments_of_cells
from tests.fixtures.stores import read_split
from tests.fixtures.training import evaluate_here, evaluation, make_shop, train_here

CELLS = dict(segments_of_cells())


def segments_of(counts: list[int], target: int, length: int) -> list[str]:
    """The two segments of a user."""
    cell = Segments.of(np.array(counts)).cells(torch.tensor([target]), torch.tensor([length])).item()
    return [name for name, cells in CELLS.items() if cell in cells]


def test_every_cell_is_in_two_segments() -> None:
    cells = [cell for cells in CELLS.values() for cell in cells]
    assert sorted(cells) == sorted(list(range(NUM_CELLS)) * 2)


def test_head_is_a_fifth_of_the_items_that_were_trained_on() -> None:
    counts = [0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 10]  # the most trained on of ten: items 12 and 3
    kinds = [segments_of(counts, item, 5)[0] for item in range(13)]
    assert [item for item, kind in enumerate(kinds) if kind == "cold target"] == [0, 1, 2]
    assert [item for item, kind in enumerate(kinds) if kind == "head target"] == [3, 12]


def test_items_that_tie_with_the_first_outside_are_no_head() -> None:
    assert segments_of([5, 5, 5, 5, 9], 0, 1)[0] == "tail target"
    assert segments_of([5, 5, 5, 5, 9], 4, 1)[0] == "head target"
    assert segments_of([5, 5, 5, 5, 5], 2, 1)[0] == "tail target"
    assert segments_of([0, 0], 1, 1)[0] == "cold target"


@pytest.mark.parametrize(
    ("length", "name"),
    [(1, "1-4"), (4, "1-4"), (5, "5-9"), (9, "5-9"), (10, "10-19"), (20, "20-49"), (49, "20-49"), (50, "50 or more")],
)
def test_lengths(length: int, name: str) -> None:
    assert segments_of([1], 0, length)[1] == f"history {name}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shop = make_shop(tmp_path_factory.mktemp("segments"))
    return train_here(shop, shop.parent / "run", "--train.max_steps", 3)


def test_figures_are_those_of_their_users(run: Path) -> None:
    """Recomputed from each user's rank, history and target in the Parquet file."""
    store = Store.open(load_config(run / "config.yaml").store.path)
    table = pq.read_table(run / "evaluation-users.parquet").to_pydict()
    result, external = evaluation(run), pq.read_table(store.path / "vocab.parquet").to_pydict()
    counts = dict(zip(external["external_id"], external["train_count"], strict=True))
    lengths, of_target = np.array(table["history"]), np.array([counts[item] for item in table["target"]])
    assert table["user"] == [f"u{user}" for user in sorted(read_split(store, "test"))] or len(set(table["user"])) > 1
    assert 0 < (of_target == 0).sum() < len(of_target) or (of_target > 0).all()
    for prefix, figures in (("rank@", result), ("masked_rank@", result["masked"])):
        for size in ("4", "8"):
            ranks = np.array(table[f"{prefix}{size}"])
            for metric, value in figures["sizes"][size].items():
                assert metric_of_users(ranks, metric).mean() == pytest.approx(value, rel=1e-12)
            for name, mine in {
                "cold target": of_target == 0,
                "history 5-9": (lengths >= 5) & (lengths < 10),
                "history 1-4": lengths < 5,
            }.items():
                part = result["segments"][name]
                assert part["users"] == mine.sum()
                found = (part if figures is result else part["masked"])["sizes"][size]["ndcg@10"]
                assert found == pytest.approx(metric_of_users(ranks, "ndcg@10")[mine].sum() / max(mine.sum(), 1))
    by_kind = [result["segments"][f"{kind} target"]["users"] for kind in ("cold", "tail", "head")]
    assert sum(by_kind) == result["users"] == len(lengths) and min(by_kind[1:]) > 0


def test_cutoffs_and_metrics_by_option(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluation(run)
    evaluate_here(run, "--cutoffs", "5,20,40", "--metrics", "ndcg,recall", "--no-per-user")
    found = json.loads((run / "evaluation.json").read_text())
    names = [f"{name}@{k}" for k in (5, 20, 40) for name in ("ndcg", "recall")]
    for rows in (found["sizes"], found["baselines"], found["masked"]["sizes"], found["masked"]["baselines"]):
        assert all(list(row) == names for row in rows.values())
    assert found["sizes"]["8"]["ndcg@5"] == before["sizes"]["8"]["ndcg@5"]
    assert found["sizes"]["8"]["recall@40"] == 1.0, "the catalogue has 40 items"
    assert "recall@40" in capsys.readouterr().out
    evaluate_here(run)
    assert evaluation(run) == before
