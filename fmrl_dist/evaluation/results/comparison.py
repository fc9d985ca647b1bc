"""Runs compared user by user: means over seeds, differences to a reference, and how sure they are.

Runs of several seeds whose configurations are otherwise the same, but for what cannot change a figure, are one model. A
model's figure for a user is the mean over its runs. Users are paired by their external ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.evaluation.metrics import metric_of_users
from fmrl_dist.evaluation.results.bootstrap import bootstrap, holm
from fmrl_dist.evaluation.results.user_ranks import UserRanks, read_user_ranks, row_names
from fmrl_dist.evaluation.segments import users_by_length
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

PROTOCOLS = {ALL: "unmasked", UNSEEN: "masked"}
# What may differ between runs of one model: the seed, and what does not change the model.
IRRELEVANT = {
    "data": ("root",),
    "store": ("path", "timeout_s", "retries", "cache_dir", "cache_gb"),
    "model": ("scan",),
    "loss": ("impl", "catalogue"),
    "train": (
        *("seed", "threads", "workers", "worker_timeout_s", "hang_timeout_s", "log_every_steps", "micro_batches"),
        *("checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints"),
    ),
    "eval": ("cutoffs", "metrics", "baselines", "per_user", "cut_vectors"),
    "run": ("dir", "tensorboard"),
}


@dataclass(frozen=True)
class EvaluatedRun:
    """An evaluation of a run, an export or the baselines, with its users' ranks."""

    path: Path
    figures: Mapping[str, Any]  # evaluation.json
    ranks: UserRanks
    config: str  # of the model, as canonical JSON; the path where there is none
    seed: int | None  # None where there is no config

    @property
    def rows(self) -> list[str]:
        """Its sizes, or the names of baselines, then its cut vectors."""
        return rows_of(self.figures)

    @property
    def largest(self) -> str:
        """Its largest size, or its last baseline."""
        return list(self.figures["sizes"])[-1]


def rows_of(figures: Mapping[str, Any]) -> list[str]:
    """What an evaluation has figures of."""
    return row_names(figures["sizes"], figures.get("vectors", {}))


@dataclass(frozen=True)
class Model:
    """Runs that differ in the seed alone."""

    name: str
    runs: tuple[EvaluatedRun, ...]


def load_evaluated_run(path: Path, split: str) -> EvaluatedRun:
    """Read what ``fmrl_dist.evaluate`` left in a folder.

    Raises:
        UserError: there is no evaluation, or the users' ranks are of another one.
    """
    name = evaluation_file(split, mask_seen=False)
    file, users_file = path / f"{name}.json", path / f"{name}-users.parquet"
    mend = f"evaluate it with python -m fmrl_dist.evaluate --checkpoint {path} --split {split}"
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))
        rows, origin = rows_of(figures), (figures["checkpoint"]["sha256"], figures["manifest_sha256"])
    except FileNotFoundError:
        raise UserError(f"{path} has no {file.name}; {mend}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:100]}); {mend}") from None
    require(users_file.exists(), f"{path} has no {users_file.name}, the ranks of every user; {mend}")
    ranks = read_user_ranks(users_file)
    require(
        origin == (ranks.origin["checkpoint"]["sha256"], ranks.origin["manifest_sha256"])
        and all((which, row) in ranks.ranks for which in PROTOCOLS for row in rows),
        f"{users_file} and {file.name} are of different evaluations; {mend}",
    )
    return EvaluatedRun(path, figures, ranks, *_model_config(path, figures))


def _model_config(path: Path, figures: Mapping[str, Any]) -> tuple[str, int | None]:
    """Config and seed of an :class:`EvaluatedRun`."""
    file = path / "config.yaml"
    if not file.exists():
        return str(path.resolve()), None
    try:
        config = config_from_dict(yaml.safe_load(file.read_text(encoding="utf-8"))).to_dict()
        seed = int(config["train"]["seed"])
        for section, keys in IRRELEVANT.items():
            for key in keys:
                config[section].pop(key, None)
    except (OSError, yaml.YAMLError, LookupError, AttributeError, TypeError, UserError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:100]}); restore it") from None
    return json.dumps([config, figures["manifest_sha256"]], sort_keys=True), seed


def group_models(runs: Sequence[EvaluatedRun]) -> list[Model]:
    """Runs by model, in the order in which models first appear; a model is named after its first run.

    Runs of one seed are models of their own: what differs between them is no seed, whatever it is.

    Raises:
        UserError: a checkpoint is given twice, or runs of one model have figures of different things.
    """
    seen: dict[str, Path] = {}
    groups: dict[tuple[str, int], list[EvaluatedRun]] = {}  # by config, and how many runs of their seed came before
    for place, run in enumerate(runs):
        sha256 = run.figures["checkpoint"]["sha256"]
        require(sha256 not in seen, f"{run.path} and {seen.get(sha256)} are the same checkpoint; give each once")
        seen[sha256] = run.path
        of_seed = [other for other in runs[:place] if (other.config, other.seed) == (run.config, run.seed)]
        group = groups.setdefault((run.config, len(of_seed)), [])
        group.append(run)
        require(
            run.rows == group[0].rows,
            f"{run.path} has figures of {', '.join(run.rows)}, {group[0].path}, the same model, of "
            f"{', '.join(group[0].rows)}; evaluate both with the same --cut-vectors",
        )
    names = [group[0].path.resolve().name for group in groups.values()]
    paths = [str(group[0].path) for group in groups.values()]
    return [
        Model(name if names.count(name) == 1 else path, tuple(group))
        for name, path, group in zip(names, paths, groups.values(), strict=True)
    ]


def shared_users(runs: Sequence[EvaluatedRun]) -> list[np.ndarray]:
    """For each run the rows of the users that all runs have, in the same order.

    Raises:
        UserError: there is none, or the catalogue, the split or a user's target is not the same in all runs.
    """
    first = runs[0].ranks
    places = [pc.index_in(first.users, value_set=run.ranks.users) for run in runs]
    is_shared = np.logical_and.reduce([place.is_valid().to_numpy(zero_copy_only=False) for place in places])
    require(
        bool(is_shared.any()), f"{runs[0].path} has no user that all other runs have; compare runs on the same users"
    )
    rows = [place.filter(pa.array(is_shared)).to_numpy(zero_copy_only=False).astype(np.int64) for place in places]
    for run, own in zip(runs, rows, strict=True):
        for key, what in (("items", "items ranked"), ("split_rule", "split"), ("ties", "tie rule")):
            ours, theirs = run.figures[key], runs[0].figures[key]
            require(
                ours == theirs,
                f"{run.path} and {runs[0].path} do not compare, {what}: {ours} and {theirs}; evaluate both on the same "
                "store",
            )
        same = run.ranks.targets.take(pa.array(own)).equals(first.targets.take(pa.array(rows[0])))
        require(
            same,
            f"{run.path} and {runs[0].path} have different targets for the same users: their stores are split in "
            "different ways; compare runs on the same split",
        )
    return rows


def compare(
    models: Sequence[Model], metric: str, num_samples: int, seed: int, by_history: bool = False
) -> dict[str, Any]:
    """The content of ``comparison.json``: every row of every model, by protocol, against the first model.

    A row is compared with the reference's row of the same name, or else with its last, the largest size.

    Args:
        models: the first is the reference.
        metric: such as ndcg@10.
        num_samples: of the bootstrap.
        seed: of the bootstrap.
        by_history: compare the users of each history length, too.

    Raises:
        UserError: the runs have no common users, or other targets.
    """
    runs = [run for model in models for run in model.runs]
    user_rows = {id(run): rows for run, rows in zip(runs, shared_users(runs), strict=True)}
    first = runs[0]
    facts = first.figures
    result = {
        "metric": metric,
        "split": facts["split"],
        "split_rule": facts["split_rule"],
        "items": facts["items"],
        "ties": facts["ties"],
        "users": len(user_rows[id(first)]),
        "users_of_runs": {str(run.path): len(run.ranks.users) for run in runs},
        "samples": num_samples,
        "seed": seed,
        "models": {model.name: [str(run.path) for run in model.runs] for model in models},
        "rows": _compared_rows(models, user_rows, metric, num_samples, seed),
        "baselines": _baselines(facts, metric),
    }
    if by_history:
        result["history"] = {}
        for name, is_inside in users_by_length(first.ranks.lengths[user_rows[id(first)]]):
            inside = {run: rows[is_inside] for run, rows in user_rows.items()}
            rows = _compared_rows(models, inside, metric, num_samples, seed)
            result["history"][name] = {"users": int(is_inside.sum()), "rows": rows}
    return result


def _compared_rows(
    models: Sequence[Model], user_rows: Mapping[int, np.ndarray], metric: str, num_samples: int, seed: int
) -> list[dict[str, Any]]:
    """Figures of every row of every model for some users: ``user_rows`` has their rows in each run, by its id."""
    reference = models[0]

    def values(model: Model, which: int, row: str) -> np.ndarray:
        """The metric of every shared user in each run, float64 [runs, n]."""
        of_runs = [run.ranks.ranks[which, row][user_rows[id(run)]] for run in model.runs]
        return metric_of_users(np.stack(of_runs), metric)

    entries: list[dict[str, Any]] = []
    for model in models:
        for row in model.runs[0].rows:
            entry: dict[str, Any] = {"model": model.name, "row": row, "seeds": len(model.runs)}
            against = row if row in reference.runs[0].rows else reference.runs[0].largest
            for which, protocol in PROTOCOLS.items():
                own = values(model, which, row)
                by_seed = own.mean(1)
                estimate = bootstrap(own.mean(0), num_samples, (seed, which, len(entries), 0))
                figure = {
                    "mean": estimate.mean,
                    "low": estimate.low,
                    "high": estimate.high,
                    "by_seed": by_seed.tolist(),
                    "std_over_seeds": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
                }
                if model is not reference:
                    difference = own.mean(0) - values(reference, which, against).mean(0)
                    paired = bootstrap(difference, num_samples, (seed, which, len(entries), 1))
                    figure["difference"] = {"to": f"{reference.name} {against}"} | asdict(paired)
                entry[protocol] = figure
            entries.append(entry)
    for protocol in PROTOCOLS.values():
        compared = [entry[protocol]["difference"] for entry in entries if "difference" in entry[protocol]]
        for figure, p in zip(compared, holm([figure["p"] for figure in compared]), strict=True):
            figure["p_holm"] = p
    return entries


def _baselines(figures: Mapping[str, Any], metric: str) -> dict[str, dict[str, float]]:
    """The metric of the baselines that an evaluation has beside its figures, by protocol; none for other metrics."""
    of_protocol = {"unmasked": figures.get("baselines", {}), "masked": figures["masked"].get("baselines", {})}
    return {
        name: {protocol: rows[name][metric] for protocol, rows in of_protocol.items()}
        for name, row in of_protocol["unmasked"].items()
        if metric in row
    }
