"""The table's rows: a configuration per model and set, trained by the real command, resumed if it was begun."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import REPOSITORY
from fmrl_dist.base.errors import UserError, require
from fmrl_dist.config.loading import config_from_dict, load_config

SETS = ("beauty", "sports")
RIVALS = ("sasrec", "bert4rec", "fmlprec", "lrurec", "bsarec", "esasrec", "unisrec", "vqrec")
PROJECTION = ["--model.item_encoder", "projection"]  # the paper's item encoder
DEFAULTS = [
    "--train.batch_size",
    "128",
    "--model.dropout",
    "0.5",
    "--model.lru_dropout",
    "0.5",
]  # what they are on these sets
OURS_CHANGED = {
    "ours": DEFAULTS,
    "ours-projection": [*DEFAULTS, *PROJECTION],
    "ours-projection-attention": [*DEFAULTS, "--model.mixer", "attention", *PROJECTION],
}
MODELS = (*OURS_CHANGED, *RIVALS)


@dataclass(frozen=True)
class Row:
    """A model on a set."""

    of_set: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.of_set}-{self.model}"

    @property
    def config(self) -> Path:
        """The configuration, relative to the repository."""
        if self.model in OURS_CHANGED:
            return Path("configs", f"{self.of_set}-text-npy.yaml")
        return Path("configs", "rivals", f"{self.name}.yaml")


@dataclass(frozen=True)
class Places:
    """Where the work happens."""

    data: str  # the raw tables' root
    stores: Path
    runs: Path
    further: tuple[str, ...] = ()  # words for every row

    def words(self, row: Row) -> list[str]:
        """What a command needs beside the config."""
        store = self.stores / Path(load_config(REPOSITORY / row.config).store.path).name
        paths = ["--data.root", self.data, "--store.path", str(store), "--run.dir", str(self.runs / row.name)]
        return [*paths, *OURS_CHANGED.get(row.model, []), *self.further]

    def is_finished(self, row: Row) -> bool:
        """Whether the row's run has ended.

        Raises:
            UserError: the run that is there is of another configuration, or began with other words.
        """
        self.check_is_the_rows(row)
        return (self.runs / row.name / "finished.json").is_file()

    def begin(self, row: Row) -> None:
        """Record what the row's run is begun with."""
        self.runs.mkdir(parents=True, exist_ok=True)
        self._record(row).write_text(json.dumps(self.meaning(row), indent=1) + "\n", encoding="utf-8")

    def check_is_the_rows(self, row: Row) -> None:
        """Refuse a run that is not what the row says now.

        Raises:
            UserError: it was begun with another configuration or other words, or by something else.
        """
        if not (self.runs / row.name).exists():
            return
        found = json.loads(self._record(row).read_text(encoding="utf-8")) if self._record(row).is_file() else None
        require(
            self.is_meaning(found, row),
            f"{self.runs / row.name} is no run of {row.config} as it is now with the words "
            f"{shlex.join(self.further) or 'none'}; delete it, or choose another --runs",
        )

    def _record(self, row: Row) -> Path:
        return self.runs / f"{row.name}.begun.json"

    def meaning(self, row: Row) -> dict[str, Any]:
        """What the row's figures depend on: the configuration in force, defaults included."""
        words = [*OURS_CHANGED.get(row.model, []), *self.further]
        return {"config": load_config(REPOSITORY / row.config, words).to_dict()}

    def is_meaning(self, found: Any, row: Row) -> bool:
        """Whether ``found``, a meaning that was recorded, is the row's now; newer keys have their old values."""
        now = self.meaning(row)
        try:
            return {"config": config_from_dict(found["config"]).to_dict()} == now
        except (TypeError, LookupError, UserError):
            return False

    def evaluation(self, row: Row) -> dict[str, Any] | None:
        """What ``evaluation.json`` of a finished run says; None if there is none."""
        if not self.is_finished(row):
            return None
        result: dict[str, Any] = json.loads((self.runs / row.name / "evaluation.json").read_text(encoding="utf-8"))
        return result


def build_command(row: Row, places: Places) -> list[str]:
    """Builds the row's store, or leaves it as it is."""
    return [sys.executable, "-m", "shards.build", "--config", str(row.config), "--keep", *places.words(row)]


def train_command(row: Row, places: Places, threads: int) -> list[str]:
    """Trains, or resumes, and evaluates."""
    words = ["--resume", "auto", "--train.threads", str(threads), *places.words(row)]
    return [sys.executable, "-m", "fmrl_dist.train", "--config", str(row.config), *words]


def submit_command(row: Row, places: Places) -> list[str]:
    """The same as a chain of SLURM jobs."""
    return [sys.executable, "-m", "launch.submit", "--config", str(row.config), *places.words(row)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A command of ours in the background, its output added to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, env=os.environ.copy())
