"""A small shop whose histories follow a pattern, and short runs on it: shared by the tests of train and evaluate."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fmrl_dist import train
from fmrl_dist.config import load_config
from fmrl_dist.errors import EXIT_USER_ERROR, run_command
from shards.build import build
from tests.processes import REPOSITORY, clean_environment
from tests.store_fixture import write_histories, write_items

NUM_USERS = 113  # 16 lanes of 7 users but one of 8: in an epoch's last step, only that lane has a user
NUM_ITEMS = 40
STEPS_PER_EPOCH = 8
FEATURE_DIMS = {"vector": 6, "colour": 4}


def write_shop(root: Path, num_items: int = NUM_ITEMS) -> None:
    """Raw tables in ``root``: four of five items follow from the one before; histories have 2 to 10 events."""
    generator = np.random.default_rng(13)
    root.mkdir(parents=True)
    write_items(root / "items.parquet", [f"i{item}" for item in range(num_items)])
    successor = generator.permutation(num_items)
    histories = {}
    for user in range(NUM_USERS):
        history = [int(generator.integers(num_items))]
        while len(history) < 2 + user % 9:
            follows = generator.random() < 0.8
            history.append(int(successor[history[-1]] if follows else generator.integers(num_items)))
        histories[f"u{user}"] = [f"i{item}" for item in history]
    write_histories(root / "sequences.parquet", histories)
    for name, dim in FEATURE_DIMS.items():
        np.save(root / f"{name}.npy", generator.standard_normal((num_items, dim)).astype(np.float32))


def shop_values(root: Path) -> dict[str, Any]:
    """Config values: a store in small blocks under ``root``, and three epochs of a tiny model."""
    features = {name: {"source": "npy", "path": f"{name}.npy"} for name in FEATURE_DIMS}
    return {
        "data": {"root": str(root / "raw"), "features": features},
        "store": {"path": str(root / "store"), "users_per_block": 16, "items_per_block": 16, "blocks_per_shard": 2},
        "model": {
            **{"sizes": [4, 8], "width": 8, "depth": 1, "dropout": 0.2, "lru_dropout": 0.2},
            "feature_scale": "standardize",
        },
        "train": {
            **{"epochs": 3, "batch_size": 16, "lr": 0.03, "warmup_steps": 4, "patience": 0},
            **{"log_every_steps": 1, "threads": 1},
        },
        "eval": {"size": 4},  # whose best epoch is the first, by far, so that best and latest differ
        "run": {"dir": str(root / "run"), "tensorboard": False},
    }


def make_shop(root: Path, num_items: int = NUM_ITEMS) -> Path:
    """Write the raw tables and build the store; returns the config's path."""
    write_shop(root / "raw", num_items)
    config = root / "shop.yaml"
    config.write_text(yaml.safe_dump(shop_values(root), sort_keys=False))
    build(load_config(config))
    return config


def run_here(main: Callable[[list[str]], None], words: Sequence[object]) -> None:
    """A command's ``main`` in this process; what it sets for the whole process is put back."""
    threads = torch.get_num_threads()
    try:
        main([str(word) for word in words])
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def train_here(config: Path, run: Path, *words: object) -> Path:
    """``python -m fmrl_dist.train`` in this process, into the folder ``run``; ``words`` end its command line."""
    run_here(train.main, ["--config", config, "--run.dir", run, *words])
    return run


def run_module(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """``python -m module words`` in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, words)]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)


def records(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of one split."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def figures(run: Path) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` without what a clock tells: equal for equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "data_wait_share")} for line in lines]


def evaluation(run: Path, name: str = "evaluation") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / f"{name}.json").read_text())
    return result


def refusal(main: Callable[[list[str]], None], *words: object) -> str:
    """The line on stderr with which a command refuses ``words``: one line, and exit code 2."""
    complaint = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(complaint),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        run_here(lambda _: run_command(main), [])
    assert ended.value.code == EXIT_USER_ERROR
    (line,) = complaint.getvalue().splitlines()
    assert line.startswith("error: ")
    return line


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file of a folder, and where its links lead: equal where nothing was changed."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
