"""What the commands need: a small shop's raw tables, its store, a finished run, one to be resumed, and an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from fmrl_dist import export, train
from tests.fixtures.training import make_shop, run_here, shop_values
from tests.fuzz.commands import PARTIAL_STEPS, SIZE, Command

PARTS = {  # a part of the world, and the folder that is it in a case
    "raw": "raw",
    "store": "store",
    "derived": "store.derived",
    "run": "run",
    "partial": "run",
    "export": "export",
}


def make_world(root: Path) -> Path:
    """Make every part in ``root``."""
    config = make_shop(root)
    config.write_text(yaml.safe_dump(shop_values(root) | {"run": {"tensorboard": False}}, sort_keys=False))
    words = ["--config", config, "--store.path", root / "store"]
    run_here(train.main, [*words, "--run.dir", root / "run"])
    run_here(train.main, [*words, "--run.dir", root / "partial", "--train.max_steps", PARTIAL_STEPS])
    run_here(export.main, ["--checkpoint", root / "run", "--size", SIZE, "--output", root / "export"])
    (root / "store.derived").rename(root / "derived")
    return root


def write_space(folder: Path) -> None:
    """A space of one trial over the case's own config."""
    values = yaml.safe_load((folder / "shop.yaml").read_text())
    base = folder / "base.yaml"
    values["data"]["root"], values["store"]["path"] = str(folder / "raw"), str(folder / "store")
    base.write_text(yaml.safe_dump(values, sort_keys=False))
    space = {
        "base": str(base),
        "study": "fuzz",
        "trials": 1,
        "parameters": {"train.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True}},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))


def prepare(world: Path, folder: Path, *parts: str) -> Path:
    """A folder with copies of some parts of the world."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(world / "shop.yaml", folder / "shop.yaml")
    write_space(folder)
    (folder / "ids.txt").write_text("i3\ni5\n", encoding="utf-8")
    for part in parts:
        shutil.copytree(world / part, folder / PARTS[part], symlinks=True)
    return folder


def prepare_for(command: Command, world: Path, folder: Path) -> Path:
    """A folder with what a command needs."""
    return prepare(world, folder, *command.needs)
