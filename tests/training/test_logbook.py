"""The log's content is tested in test_training; here, which ranks write nothing."""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.training.logbook import Logbook


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with Logbook(tmp_path, step=0, tensorboard=True, enabled=False) as logbook:
        logbook.write({"step": 1, "epoch": 0, "split": "train", "loss": 1.0})
    assert list(tmp_path.iterdir()) == []
