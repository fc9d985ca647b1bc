"""What a run's folder says about the run. A part that is missing or damaged is named, and the others still serve."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.json_text import read_object, read_objects
from fmrl_dist.base.yaml_text import read_yaml
from fmrl_dist.checkpoint.folder import Checkpoint, latest_sha256, load_checkpoint
from fmrl_dist.checkpoint.run_folder import FINAL_EVALUATION, FINISHED_FILE, is_finished
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.results.figures import Rows
from fmrl_dist.evaluation.results.report import both_protocols
from fmrl_dist.evaluation.results.user_ranks import UserRanks, read_user_ranks, row_names
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

PROTOCOL_NAMES = {UNSEEN: "seen items masked", ALL: "all items"}
T = TypeVar("T")
LOG_FILE, MONITOR_FILE = "metrics.jsonl", "ranks.jsonl"


@dataclass(frozen=True)
class Figures:
    """An ``evaluation.json`` whose figures are numbers, and where they should be."""

    raw: Mapping[str, Any]
    metrics: tuple[str, ...]
    sizes: tuple[Rows, Rows]  # by ALL, UNSEEN; keys are sizes
    vectors: tuple[Rows, Rows]  # of cut vectors; may be empty
    baselines: tuple[Rows, Rows]  # may be empty
    step: int  # of the checkpoint
    sha256: str  # of its record
    manifest_sha256: str


@dataclass(frozen=True)
class RunFacts:
    """All that the page is made of, but for what is measured."""

    folder: Path
    config: Config
    checkpoint: Checkpoint | None  # the best one, without its moments
    figures: Figures | None
    ranks: UserRanks | None  # of the same evaluation
    train_log: list[Mapping[str, float]]
    valid_log: list[Mapping[str, float]]
    peak_mb: float | None  # of the process of training that took most
    store: Store | None
    state: str  # "finished", or what else
    missing: list[str] = field(default_factory=list)  # what is not there, and what to do

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.config.model.sizes


def read_run(folder: Path, store: Store | str | None = None) -> RunFacts:
    """Everything in a run's folder.

    Args:
        folder: of the run.
        store: of its catalogue; a location, or None for the recorded one.

    Raises:
        UserError: it is not a run's: it has neither a config nor a checkpoint that can be read.
    """
    require(folder.is_dir(), f"{folder} is no folder; expected a run, such as runs/demo")
    missing: list[str] = []
    checkpoint = _tried(missing, "no best checkpoint", lambda: load_checkpoint(folder, with_optimizer=False))
    config = _read_config(folder, checkpoint, missing)
    figures = _tried(missing, "no figures", lambda: read_figures(folder / FINAL_EVALUATION, config))
    if figures is not None and checkpoint is not None and figures.sha256 != checkpoint.sha256:
        missing.append(
            f"no figures of the best checkpoint, step {checkpoint.state.step}: {FINAL_EVALUATION} is of another one, "
            f"step {figures.step}; evaluate again with python -m fmrl_dist.evaluate --checkpoint {folder}"
        )
        figures = None
    ranks = None
    if figures is not None:
        ranks = _tried(missing, "no intervals", lambda: read_own_ranks(folder / "evaluation-users.parquet", figures))
    train_log, valid_log = _read_log(folder / LOG_FILE, missing)
    opened = store if isinstance(store, Store) else _open_store(store, config, missing)
    if opened is not None and checkpoint is not None and opened.manifest.sha256 != checkpoint.manifest_sha256:
        missing.append(
            f"nothing about the store that the run was trained on: store {opened.location} is another one; give the "
            "right one with --store"
        )
        opened = None
    state = _state_of(folder, checkpoint)
    return RunFacts(
        folder=folder,
        config=config,
        checkpoint=checkpoint,
        figures=figures,
        ranks=ranks,
        train_log=train_log,
        valid_log=valid_log,
        peak_mb=_peak_mb(folder / MONITOR_FILE),
        store=opened,
        state=state,
        missing=missing,
    )


def _tried(missing: list[str], what: str, read: Callable[[], T]) -> T | None:
    """What ``read`` returns; None, and a line in ``missing``, where a user would get its error."""
    try:
        return read()
    except UserError as error:
        missing.append(f"{what}: {error}")
    except OSError as error:
        missing.append(f"{what}: {error.strerror} ({error.filename})")
    return None


def _read_config(folder: Path, checkpoint: Checkpoint | None, missing: list[str]) -> Config:
    """The config that belongs to the weights; that of the folder where there are none."""
    if checkpoint is not None:
        return config_from_dict(checkpoint.config)
    file = folder / "config.yaml"
    require(
        file.is_file(),
        f"{folder} is no run: it has neither a config.yaml nor a checkpoint that can be read ({missing[-1]})",
    )
    raw = read_yaml(file, "config")
    require(isinstance(raw, dict), f"config {file} holds no sections; restore it")
    return config_from_dict(raw)


def read_figures(file: Path, config: Config) -> Figures:
    """A run's ``evaluation.json``.

    Raises:
        UserError: it is missing, cannot be read, or is not of the sizes of ``config``.
    """
    mend = f"evaluate with python -m fmrl_dist.evaluate --checkpoint {file.parent}"
    require(file.is_file(), f"{file} does not exist; {mend}")
    raw = read_object(file, "evaluation", mend)
    try:
        sizes, vectors, baselines = (both_protocols(raw, (key,)) for key in ("sizes", "vectors", "baselines"))
        metrics = tuple(next(iter(sizes[ALL].values())))
        for rows in (*sizes, *vectors, *baselines):
            for name, row in rows.items():
                if tuple(row) != metrics or not all(_is_share(value) for value in row.values()):
                    raise ValueError(f"the figures of {name}")
        names = [str(size) for size in config.model.sizes]
        if [list(rows) for rows in sizes] != [names, names] or any(list(r) not in ([], names[:-1]) for r in vectors):
            raise ValueError(f"sizes {list(sizes[ALL])}, expected {names}")
        for key, kind in (("users", int), ("items", int), ("split", str), ("split_rule", str), ("ties", str)):
            if type(raw[key]) is not kind:
                raise ValueError(key)
        checkpoint = raw["checkpoint"]
        origin = int(checkpoint["step"]), str(checkpoint["sha256"]), str(raw["manifest_sha256"])
        segments = raw.get("segments", {})
        for part in segments.values():
            for key in ("sizes", "vectors"):
                for row in (row for rows in both_protocols(part, (key,)) for row in rows.values()):
                    if not all(_is_share(row[metric]) for metric in metrics):
                        raise ValueError("segments")
            int(part["users"])
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file} cannot be read ({problem}); {mend}") from None
    return Figures(raw, metrics, sizes, vectors, baselines, *origin)


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= typing.cast(float, value) <= 1  # false for NaN


def read_own_ranks(file: Path, figures: Figures) -> UserRanks:
    """The users' ranks that the figures are of.

    Raises:
        UserError: there are none, or they are of another evaluation.
    """
    ranks = read_user_ranks(file)
    rows = row_names(figures.sizes[ALL], figures.vectors[ALL])
    try:
        origin = ranks.origin["checkpoint"]["sha256"], ranks.origin["manifest_sha256"]
    except (LookupError, TypeError):
        origin = "", ""
    require(
        origin == (figures.sha256, figures.manifest_sha256)
        and len(ranks.lengths) == figures.raw["users"]
        and all((which, row) in ranks.ranks for which in (ALL, UNSEEN) for row in rows),
        f"{file} and {FINAL_EVALUATION} are of different evaluations; evaluate again with python -m "
        f"fmrl_dist.evaluate --checkpoint {file.parent} --per-user",
    )
    return ranks


def _read_log(file: Path, missing: list[str]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Records of training, and of validation, whose values are all finite numbers."""
    kept: dict[str, list[Mapping[str, float]]] = {"train": [], "valid": []}
    if not file.is_file():
        missing.append(f"no curves: {file} does not exist")
        return [], []
    left_out = 0
    try:
        for _, record in read_objects(file, "the curves end there; restore it from a copy"):
            split = record.pop("split", None)
            values = {key: value for key, value in record.items() if type(value) in (int, float)}
            whole = {"step", "epoch"} <= values.keys() and all(map(math.isfinite, values.values()))
            if split in kept and whole and len(values) == len(record):
                kept[str(split)].append(values)
            else:
                left_out += 1
    except UserError as error:
        missing.append(f"some of the curves: {error}")
    if left_out:
        missing.append(f"{left_out} of the records in {file}: they do not have a step, an epoch and finite numbers")
    return kept["train"], kept["valid"]


def _peak_mb(file: Path) -> float | None:
    """Largest memory of a process, as training logged it; None where it has not."""
    largest: float | None = None
    try:
        for _, record in read_objects(file, ""):
            values = record.get("memory_mb")
            numbers = [v for v in values if type(v) in (int, float)] if isinstance(values, list) else []
            largest = max([*numbers, *([] if largest is None else [largest])], default=None)
    except (UserError, OSError):
        pass
    return largest


def _open_store(location: str | None, config: Config, missing: list[str]) -> Store | None:
    path = location or config.store.path
    store = _tried(missing, "nothing about the store", lambda: Store.open(path, config.store))
    if store is None:
        missing[-1] += "; give its folder with --store"
    return store


def _state_of(folder: Path, checkpoint: Checkpoint | None) -> str:
    if is_finished(folder):
        return "finished"
    if checkpoint is None:
        return "not finished: it has no checkpoint yet"
    try:
        record = json.loads((folder / FINISHED_FILE).read_text(encoding="utf-8"))
        was_finished = record["latest_sha256"] == latest_sha256(folder / "checkpoints")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "not finished: training has not come to its end"
    return "finished, and evaluated again since" if was_finished else "not finished: trained further since its end"
