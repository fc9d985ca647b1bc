"""Small sweeps over a small demo, for the tests of launch.sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.config import load_config
from launch.space import Space, read_space
from launch.study import Study, Trial
from launch.sweep_folder import open_folder, prepare_folder, run_of
from tests.test_slurm_launch import demo_words
from tests.training_fixture import records

LEARNING_RATE = {"train.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}}
METRIC = "ndcg@10@128"


def write_space(folder: Path, **values: Any) -> Path:
    """A space over the demo of ``demo_words``, whose store is in ``folder``; ``values`` are sections of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    base, path = folder / "small-demo.yaml", folder / f"{values.get('study', 'small')}.yaml"
    base.write_text(load_config(None, demo_words(folder, "unused")).to_yaml())
    sections = {"base": str(base), "study": "small", "trials": 4, "parameters": LEARNING_RATE}
    path.write_text(yaml.safe_dump({**sections, **values}, sort_keys=False))
    return path


def begin(path: Path, folder: Path) -> tuple[Space, Study]:
    """A sweep in ``folder`` whose workers are started by hand."""
    space = prepare_folder(folder, read_space(path))
    return space, Study(folder, space)


def trials_of(folder: Path) -> list[Trial]:
    """What the journal holds now, read anew."""
    return open_folder(folder)[1].trials()


def best_in_run(folder: Path, trial: Trial) -> float:
    """The highest validation figure that a trial's run holds."""
    return max(record[METRIC] for record in records(run_of(folder, trial), "valid"))
