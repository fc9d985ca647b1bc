"""The log's content is tested in test_training; here, which ranks write nothing, and what damage means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.training.monitoring.logbook import Logbook, kept_lines


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with Logbook(tmp_path, step=0, tensorboard=True, enabled=False) as logbook:
        logbook.write({"step": 1, "epoch": 0, "split": "train", "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_damage(tmp_path: Path) -> None:
    """Half a line at the end is what a killed run leaves; anything else is refused, and nothing is dropped silently."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "split": "train", "loss": 0.5}) for step in (1, 2, 3)]
    path.write_text("\n".join([*whole, '{"step": 4, "lo']))
    assert kept_lines(path, 2) == [f"{line}\n" for line in whole[:2]]
    for line in ('{"step":\0\0', "[1]", "3", "{}", '{"step": []}', "[" * 50_000):
        path.write_text("\n".join([whole[0], line, whole[2]]))
        with pytest.raises(UserError, match=r"metrics\.jsonl(, line 2,| has a line with step) .* restore it"):
            kept_lines(path, 3)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="line 1, is not UTF-8 text"):
        kept_lines(path, 3)
