"""Rivals: what each split may read, when scores are written, and that the judge follows docs/evaluation.md."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.rivals import judge
from benchmarks.rivals.histories import left_padded, read_histories, readable, targets
from benchmarks.rivals.marks import Marks
from benchmarks.rivals.scores import Scores, read_scores, write_scores
from fmrl_dist.base.errors import UserError

NUM_USERS, NUM_ITEMS = 40, 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Histories of 3 to 12 events, with repeated items."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(1, NUM_ITEMS + 1, generator.integers(3, 13)).tolist() for _ in range(NUM_USERS)]
    item_ids = pa.array(histories, pa.list_(pa.int32()))
    pq.write_table(pa.table({"user_id": range(NUM_USERS), "item_ids": item_ids}), tmp_path / "sequences.parquet")
    pq.write_table(pa.table({"item_id": range(1, NUM_ITEMS + 1)}), tmp_path / "items.parquet")
    return tmp_path


def tied_scores() -> Scores:
    """Small integers, so that many items tie; items that the rival cannot score tie at the end."""
    generator = np.random.default_rng(1)
    users = {split: generator.integers(-1, 2, (NUM_USERS, 3)).astype(np.float32) for split in ("valid", "test")}
    bias = np.where(np.arange(NUM_ITEMS) % 7 == 0, -np.inf, generator.integers(0, 2, NUM_ITEMS))
    return Scores(users, generator.integers(-1, 2, (NUM_ITEMS, 3)).astype(np.float32), bias.astype(np.float32))


def naive_figures(scores: Scores, data: Path, split: str, masks: bool) -> list[float]:
    """NDCG@10 and Recall@10, item by item."""
    hidden = {"valid": 2, "test": 1}[split]
    ndcg = recall = 0.0
    histories = pq.read_table(data / "sequences.parquet")["item_ids"].to_pylist()
    for output, history in zip(scores.users[split], histories, strict=True):
        target, seen = history[-hidden] - 1, [item - 1 for item in history[:-hidden]]
        values = [float(output @ vector) + bias for vector, bias in zip(scores.items, scores.bias, strict=True)]
        rank = 1.0
        for item, value in enumerate(values):
            if item != target and not (masks and item in seen):
                rank += 1.0 if value > values[target] else 0.5 if value == values[target] else 0.0
        if rank <= 10:
            ndcg, recall = ndcg + 1 / math.log2(1 + rank), recall + 1
    return [ndcg / NUM_USERS, recall / NUM_USERS]


def test_the_judge_counts_ties_half_and_masks_what_was_seen(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "USERS_AT_ONCE", 16)
    scores, path = tied_scores(), tmp_path / "10.npz"
    write_scores(path, scores, {"rival": "made up", "minutes": 10, "wall_s": 601.0, "cpu_s": 599.0, "epochs": 2.5})
    judge.main(["--data", str(data), "--threads", "1", str(path)])
    *_, row = capsys.readouterr().out.splitlines()
    expected = ["made up", "3", "10", "601", "599", "2.50"]
    for split in ("valid", "test"):
        for of_all, masked in zip(*(naive_figures(scores, data, split, masks) for masks in (False, True)), strict=True):
            expected += [f"{of_all:.4f}", f"{masked:.4f}"]
    assert row == f"| {' | '.join(expected)} |"
    assert len(set(expected[6:])) == 8, "a case in which masking, metric and split all matter"


def test_scores_of_another_data_set_are_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "10.npz", tied_scores(), {})
    with pytest.raises(UserError, match="--data names another data set"):
        read_scores(tmp_path / "10.npz", NUM_USERS, NUM_ITEMS + 1)


def test_validation_reads_all_but_two_events_and_test_all_but_one(data: Path) -> None:
    histories, num_items = read_histories(data)
    assert num_items == NUM_ITEMS
    for history, train, valid, test in zip(
        histories, *(readable(histories, split) for split in ("train", "valid", "test")), strict=True
    ):
        assert train.tolist() == valid.tolist() == history[:-2].tolist()
        assert test.tolist() == history[:-1].tolist()
    assert targets(histories, "valid").tolist() == [history[-2] for history in histories]
    assert targets(histories, "test").tolist() == [history[-1] for history in histories]
    assert left_padded([np.array([1, 2, 3, 4]), np.array([5])], 3, 9).tolist() == [[2, 3, 4], [9, 9, 5]]


def test_scores_are_written_at_each_mark_and_training_ends_at_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still while scores are computed."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.rivals.marks._now", lambda: (now[0], now[0] / 2))

    def score() -> Scores:
        now[0] += 1000
        return tied_scores()

    marks = Marks([2, 1], tmp_path, {"rival": "made up"})
    marks.start()
    done = []
    for step in range(1, 5):
        now[0] += 35
        done.append(marks.after_step(step / 2, score))
    assert done == [False, False, False, True]
    records = [read_scores(tmp_path / f"{minutes}.npz", NUM_USERS, NUM_ITEMS)[1] for minutes in (1, 2)]
    assert records == [
        {"rival": "made up", "minutes": 1, "wall_s": 70.0, "cpu_s": 35.0, "epochs": 1.0},
        {"rival": "made up", "minutes": 2, "wall_s": 140.0, "cpu_s": 70.0, "epochs": 2.0},
    ]
