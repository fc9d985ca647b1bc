"""The search space of a sweep: a YAML file with the base config, what varies in which range, and the number of trials.

    base: configs/demo.yaml             # the config of every trial
    study: demo                         # names the sweep
    trials: 8                           # how many, including those that fail
    metric: ndcg@10@16                  # default: the base's eval.metric at its eval.size
    sampler: {seed: 0}                  # default 0
    fixed: {train.epochs: 3}            # keys in which all trials differ from the base
    parameters:
      train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
      model.depth: {low: 1, high: 3, step: 1}          # integers give integers
      loss.predict_first: {choices: [true, false]}

A value is passed on as the argument that follows ``--section.key`` on a command line. The first trial has the base's
own values where the space has them all, so that a sweep says what its search has gained.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.yaml_text import read_yaml
from fmrl_dist.config.credentials import refuse_credentials, refuse_credentials_in_config
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.built_from import recorded_keys
from fmrl_dist.data.store.manifest import MANIFEST_FILE, Manifest
from fmrl_dist.data.store.resolve import resolved_for

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FIXED_SECTIONS = ("run", "eval", "store")  # the sweep sets the first two; all trials read one store
SECTIONS = ("base", "study", "trials", "metric", "sampler", "fixed", "parameters")


@dataclass(frozen=True)
class NumberRange:
    """Numbers from ``low`` to ``high``, both included; integers if both ends are."""

    low: int | float
    high: int | float
    step: int | float | None = None  # None: 1 for integers, any number otherwise
    log: bool = False

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def extremes(self) -> tuple[str, ...]:
        return as_argument(self.low), as_argument(self.high)

    def find(self, value: object) -> int | float | None:
        """A config's value as one of these numbers; None if it is none of them."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return None
        step = self.step or (1 if self.is_integer else None)
        is_on_grid = step is None or (Decimal(str(value)) - Decimal(str(self.low))) % Decimal(str(step)) == 0
        return value if is_on_grid else None


@dataclass(frozen=True)
class ValueChoices:
    """One of several values, each as an argument."""

    arguments: tuple[str, ...]

    @property
    def extremes(self) -> tuple[str, ...]:
        return self.arguments

    def find(self, value: object) -> str | None:
        """A config's value as one of the arguments; None if it is none of them."""
        argument = as_argument(list(value) if isinstance(value, tuple) else value)
        return argument if argument in self.arguments else None


@dataclass(frozen=True)
class SearchSpace:
    """What a sweep searches."""

    base: Path
    study: str
    trials: int
    seed: int
    fixed: Mapping[str, str]  # arguments by key, including those that follow from `metric`
    parameters: Mapping[str, NumberRange | ValueChoices]  # by key
    raw: Mapping[str, Any]  # the file's content

    def config(self, arguments: Mapping[str, str] | None = None) -> Config:
        """The config of a trial whose parameters have these arguments, by key."""
        return load_config(self.base, overrides({**self.fixed, **(arguments or {})}))

    def base_values(self) -> dict[str, int | float | str] | None:
        """The base's own value of each parameter, by key; None if one of them is not in the space.

        What the base leaves to the store has its value, unless "auto" is one of the choices, if the store is there.
        """
        values: dict[str, int | float | str] = {}
        config = self.config()
        manifest = Path(config.store.path, MANIFEST_FILE)
        for key, parameter in self.parameters.items():
            section, *names = key.split(".")
            if len(names) > 1:  # within a mapping, such as a feature's
                return None
            own = getattr(getattr(config, section), names[0])
            value = parameter.find(own)
            if value is None and own == "auto" and manifest.is_file():
                resolved = resolved_for(config, Manifest.from_bytes(manifest.read_bytes()))
                value = parameter.find(getattr(getattr(resolved, section), names[0]))
            if value is None:
                return None
            values[key] = value
        return values


def overrides(arguments: Mapping[str, str]) -> list[str]:
    """``--section.key argument`` for a command line."""
    return [part for key, argument in arguments.items() for part in (f"--{key}", argument)]


def as_argument(value: Any) -> str:
    """A plain value as an argument of a command line, where it is read as YAML."""
    with contextlib.suppress(yaml.YAMLError, ValueError):
        if isinstance(value, str) and yaml.safe_load(value) == value:
            return value
    return json.dumps(value)


def metric_of(config: Config) -> str:
    """The name in ``metrics.jsonl`` of the figure that decides which checkpoint is best, and which trial."""
    return config.chosen_by


def read_space(path: Path) -> SearchSpace:
    """Read a space file, and check that both ends of every range and every choice give a valid config.

    Raises:
        UserError: the file is missing, not YAML or invalid, or it, or its base, holds credentials; the message names
            the key.
    """
    require(path.is_file(), f"space {path} does not exist; expected a YAML file such as configs/sweeps/demo.yaml")
    raw = read_yaml(path, "space")
    try:
        space = _space(raw)
        refuse_credentials("the space", raw)
        refuse_credentials_in_config(space.config())
    except UserError as error:
        raise UserError(f"space {path}: {error}") from None
    for key, parameter in space.parameters.items():
        for argument in parameter.extremes:
            try:
                space.config({key: argument})
            except UserError as error:
                raise UserError(f"space {path}: parameters.{key} cannot be {argument}: {error}") from None
    try:
        _require_comparable(space)
    except UserError as error:
        raise UserError(f"space {path}: {error}") from None
    return space


def _require_comparable(space: SearchSpace) -> None:
    """Refuse parameters that change nothing in a trial, or what its figure means."""
    base = space.config()
    for key, parameter in space.parameters.items():
        require(
            all(recorded_keys(space.config({key: argument})) == recorded_keys(base) for argument in parameter.extremes),
            f"parameter {key!r} says what a store holds, and all trials read one store; build a store for each of its "
            "values, and sweep each of them",
        )
    require(
        "model.sizes" not in space.parameters or base.eval.size != "mean",
        f"parameter 'model.sizes' changes of which sizes {metric_of(base)} is the mean; name a metric of one size that "
        "all trials have, such as metric: ndcg@10@64",
    )


def _space(raw: Any) -> SearchSpace:
    values = _mapping("a space", raw)
    _require_known("", values, SECTIONS)
    for key in ("base", "study", "trials", "parameters"):
        require(key in values, f"{key} is missing; expected base, study, trials and parameters")
    for key in ("base", "study"):
        require(isinstance(values[key], str), f"{key} is {values[key]!r}; expected text")
    study = values["study"]
    require(STUDY_NAME.fullmatch(study) is not None, f"study is {study!r}; expected letters, digits and ._-")
    sampler = _mapping("sampler", values.get("sampler", {}))
    _require_known("sampler.", sampler, ("seed",))
    fixed = _mapping("fixed", values.get("fixed", {}))
    require("run.dir" not in fixed, "fixed sets run.dir, but each trial has its own; leave it out")
    parameters = _mapping("parameters", values["parameters"])
    require(bool(parameters), "parameters is empty; expected at least one key of the config")
    for key in parameters:
        section, dot, _ = str(key).partition(".")
        require(bool(dot), f"parameter {key!r} is not a key of the config; expected section.key, such as train.lr")
        require(
            section not in FIXED_SECTIONS,
            f"parameter {key!r} is not of the model or its training; leave it out",
        )
        require(key not in fixed, f"{key} is both fixed and a parameter; leave one out")
    return SearchSpace(
        base=Path(values["base"]),
        study=study,
        trials=_at_least(1, "trials", values["trials"]),
        seed=_at_least(0, "sampler.seed", sampler.get("seed", 0)),
        fixed={str(key): as_argument(value) for key, value in fixed.items()} | _metric_keys(values.get("metric")),
        parameters={str(key): _parameter(f"parameters.{key}", value) for key, value in parameters.items()},
        raw=values,
    )


def _metric_keys(metric: Any) -> dict[str, str]:
    """The keys that make a run choose its best checkpoint by ``metric``."""
    if metric is None:
        return {}
    name, _, size = str(metric).rpartition("@")
    require(
        isinstance(metric, str) and "@" in name and (size.isdecimal() or size == "mean"),
        f"metric is {metric!r}; expected one of a run's validation figures, such as ndcg@10@64 or ndcg@10@mean",
    )
    return {"eval.metric": name, "eval.size": size}


def _parameter(where: str, raw: Any) -> NumberRange | ValueChoices:
    values = _mapping(where, raw)
    if "choices" in values:
        _require_known(f"{where}.", values, ("choices",))
        choices = values["choices"]
        require(
            isinstance(choices, list) and bool(choices), f"{where}.choices is {choices!r}; expected a list of values"
        )
        arguments = tuple(as_argument(choice) for choice in choices)
        require(len(set(arguments)) == len(arguments), f"{where}.choices contains a value twice; leave one out")
        return ValueChoices(arguments)
    _require_known(f"{where}.", values, ("low", "high", "step", "log"))
    for key in ("low", "high"):
        require(key in values, f"{where}.{key} is missing; expected low and high, or choices")
    low, high = (_number(f"{where}.{key}", values[key]) for key in ("low", "high"))
    require(low < high, f"{where} has low {low} and high {high}; expected low below high")
    log = values.get("log", False)
    require(isinstance(log, bool), f"{where}.log is {log!r}; expected true or false")
    require(not log or low > 0, f"{where}.low is {low}; a logarithmic range starts above 0")
    if values.get("step") is None:
        return NumberRange(low, high, None, log)
    step = _number(f"{where}.step", values["step"])
    found = NumberRange(low, high, step, log)
    require(not log, f"{where} has both log and step; leave one out")
    require(step > 0, f"{where}.step is {step}; expected more than 0")
    require(isinstance(step, int) or not found.is_integer, f"{where}.step is {step}; expected an integer, as low is")
    steps = (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step))
    require(steps == 0, f"{where}.step {step} does not divide the range from {low} to {high}; change one of them")
    return found


def _mapping(where: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, dict), f"{where} is {value!r}; expected a mapping")
    return dict(value)


def _require_known(prefix: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        close = difflib.get_close_matches(str(key), known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        require(key in known, f"unknown key {f'{prefix}{key}'!r}; {hint}")


def _at_least(low: int, where: str, value: Any) -> int:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= low,
        f"{where} is {value!r}; expected a whole number of at least {low}",
    )
    return int(value)


def _number(where: str, value: Any) -> int | float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where} is {value!r}; expected a number") from None
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        f"{where} is {value!r}; expected a number",
    )
    found: int | float = value
    return found
