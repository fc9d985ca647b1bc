"""Space files: what they mean, and the line that names a mistake in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.loading import load_config
from launch import sweep
from launch.sweeps.space import NumberRange, ValueChoices, as_argument, metric_of, overrides, read_space
from tests.fixtures.training import make_shop, refusal

RAW: dict[str, Any] = {
    "base": "configs/demo.yaml",
    "study": "a",
    "trials": 3,
    "parameters": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
}


def write(folder: Path, **values: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**RAW, **values}.items() if value != "absent"}))
    return path


def test_a_space_file(tmp_path: Path) -> None:
    parameters = {
        "train.lr": {"low": "1e-4", "high": 1, "log": True},  # as YAML 1.1 reads 1e-4
        "train.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
        "model.depth": {"low": 1, "high": 3, "step": 2},
        "model.sizes": {"choices": [[64, 128], [8, 64, 128]]},
        "loss.impl": {"choices": ["tiled", "plain"]},
        "loss.predict_first": {"choices": [True, False]},
    }
    fixed = {"train.epochs": 2, "data.root": "elsewhere"}
    space = read_space(write(tmp_path, parameters=parameters, fixed=fixed, metric="recall@5@64", sampler={"seed": 7}))
    assert space.parameters == {
        "train.lr": NumberRange(1e-4, 1, None, True),
        "train.weight_decay": NumberRange(0.0, 0.3, 0.1),
        "model.depth": NumberRange(1, 3, 2),
        "model.sizes": ValueChoices(("[64, 128]", "[8, 64, 128]")),
        "loss.impl": ValueChoices(("tiled", "plain")),
        "loss.predict_first": ValueChoices(("true", "false")),
    }
    assert space.base_values() is None  # the demo's sizes are none of the choices
    assert [name for name, p in space.parameters.items() if isinstance(p, NumberRange) and p.is_integer] == [
        "model.depth"
    ]
    assert (space.study, space.trials, space.seed) == ("a", 3, 7)
    config = space.config({"model.depth": "3", "loss.predict_first": "false"})
    assert (config.train.epochs, config.data.root, config.model.depth) == (2, "elsewhere", 3)
    assert not config.loss.predict_first
    assert metric_of(config) == "recall@5@64"


def test_the_metric_is_the_configs_own_by_default(tmp_path: Path) -> None:
    assert metric_of(read_space(write(tmp_path)).config()) == "ndcg@10@128"


def test_the_demo_sweep() -> None:
    assert read_space(Path("configs/sweeps/demo.yaml")).trials == 6


@pytest.mark.parametrize("value", [1, -2.5, 1e-7, 1e22, True, None, "auto", "1", "true", "", "a: b", "[", [8, 16]])
def test_arguments_are_read_back_as_their_values(value: Any) -> None:
    read = yaml.safe_load(as_argument(value))
    assert (float(read) if isinstance(value, float) else read) == value


def test_overrides() -> None:
    assert overrides({"a.b": "1", "c.d": "x"}) == ["--a.b", "1", "--c.d", "x"]


def parameter(key: str, **values: Any) -> dict[str, Any]:
    return {"parameters": {key: values}}


MISTAKES = {
    "no mapping": ({"parameters": [1]}, "parameters is [1]; expected a mapping"),
    "unknown section": ({"trails": 3}, "unknown key 'trails'; did you mean 'trials'?"),
    "missing section": ({"study": "absent"}, "study is missing; expected base, study, trials and parameters"),
    "no parameters": ({"parameters": {}}, "parameters is empty; expected at least one key of the config"),
    "no base": ({"base": "configs/demmo.yaml"}, "config configs/demmo.yaml does not exist"),
    "study": ({"study": "a/b"}, "study is 'a/b'; expected letters, digits and ._-"),
    "trials": ({"trials": 0}, "trials is 0; expected a whole number of at least 1"),
    "trials' type": ({"trials": "many"}, "trials is 'many'; expected a whole number of at least 1"),
    "sampler": ({"sampler": {"sead": 1}}, "unknown key 'sampler.sead'; did you mean 'seed'?"),
    "metric": ({"metric": "ndcg"}, "metric is 'ndcg'; expected one of a run's validation figures, such as ndcg@10@64"),
    "metric's name": ({"metric": "ndcg@7@64"}, "eval.metric is 'ndcg@7'; expected one of: recall@5"),
    "metric's size": ({"metric": "ndcg@10@50"}, "eval.size is 50, which is not trained"),
    "fixed key": ({"fixed": {"train.epoch": 1}}, "unknown config key 'train.epoch'; did you mean 'train.epochs'?"),
    "fixed run": ({"fixed": {"run.dir": "x"}}, "fixed sets run.dir, but each trial has its own; leave it out"),
    "fixed twice": ({"fixed": {"train.lr": 0.1}}, "train.lr is both fixed and a parameter; leave one out"),
    "no section": (parameter("lr", low=0, high=1), "parameter 'lr' is not a key of the config; expected section.key"),
    "not varied": (parameter("eval.users", low=1, high=2), "'eval.users' is not of the model or its training"),
    "unknown key": (
        parameter("train.lrr", low=0.1, high=1),
        "parameters.train.lrr cannot be 0.1: unknown config key 'train.lrr'; did you mean 'train.lr'?",
    ),
    "unknown word": (parameter("train.lr", lo=0, high=1), "unknown key 'parameters.train.lr.lo'; did you mean 'low'?"),
    "no high": (parameter("train.lr", low=0.1), "parameters.train.lr.high is missing; expected low and high"),
    "text": (parameter("train.lr", low="small", high=1), "parameters.train.lr.low is 'small'; expected a number"),
    "order": (
        parameter("train.lr", low=1, high=1),
        "parameters.train.lr has low 1 and high 1; expected low below high",
    ),
    "log from 0": (parameter("train.lr", low=0, high=1, log=True), "train.lr.low is 0; a logarithmic range starts ab"),
    "log and step": (parameter("model.depth", low=1, high=3, step=1, log=True), "has both log and step; leave one out"),
    "log's type": (parameter("train.lr", low=1, high=2, log=1), "parameters.train.lr.log is 1; expected true or false"),
    "step": (
        parameter("train.lr", low=0.1, high=0.5, step=0.3),
        "step 0.3 does not divide the range from 0.1 to 0.5; change",
    ),
    "float step": (parameter("model.depth", low=1, high=2, step=0.5), "step is 0.5; expected an integer, as low is"),
    "floats": (parameter("model.depth", low=1.0, high=2.0), "cannot be 1.0: model.depth is 1.0; expected int"),
    "impossible": (
        parameter("model.dropout", low=0.0, high=1.0),
        "cannot be 1.0: model.dropout is 1.0; expected float (0 <=",
    ),
    "no choices": (parameter("model.depth", choices=[]), "model.depth.choices is []; expected a list of values"),
    "a choice": (
        parameter("loss.impl", choices=["plain", "fast"]),
        "cannot be fast: loss.impl is 'fast'; expected one",
    ),
    "choices twice": (parameter("model.depth", choices=[1, 1]), "choices contains a value twice; leave one out"),
    "both kinds": (
        parameter("model.depth", choices=[1], low=1),
        "unknown key 'parameters.model.depth.low'; known: cho",
    ),
}


@pytest.mark.parametrize(("values", "complaint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gives_one_line(values: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path, **values)
    with pytest.raises(UserError) as error:
        read_space(path)
    assert str(error.value).startswith(f"space {path}: ")
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("a: [")
    assert "is not YAML" in refusal(sweep.main, path)
    assert "does not exist; expected a YAML file" in refusal(sweep.main, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"parameters": {"data.interactions.min_user_events": {"choices": [1, 5]}}},
            "parameter 'data.interactions.min_user_events' says what a store holds, and all trials read one store",
        ),
        (
            {"parameters": {"model.sizes": {"choices": [[8, 16], [8, 16, 32]]}}, "metric": "ndcg@10@mean"},
            "parameter 'model.sizes' changes of which sizes ndcg@10@mean is the mean",
        ),
    ],
)
def test_trials_that_do_not_compare(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        read_space(write(tmp_path, **values))


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ({"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, 2e-3),
        ({"train.lr": {"low": 1e-4, "high": 1e-3}}, None),
        ({"model.depth": {"low": 1, "high": 3}}, 2),
        ({"model.depth": {"low": 1, "high": 3, "step": 2}}, None),
        ({"model.dropout": {"low": 0.1, "high": 0.3, "step": 0.1}}, 0.2),
        ({"model.dropout": {"low": 0.1, "high": 0.4, "step": 0.15}}, None),
        ({"model.sizes": {"choices": [[64, 128], [8, 16, 32, 64, 128]]}}, "[8, 16, 32, 64, 128]"),
        ({"loss.predict_first": {"choices": [True, False]}}, "true"),
        ({"data.interactions.threads": {"choices": [1, 2]}}, None),
    ],
)
def test_the_value_of_the_base(tmp_path: Path, parameter: dict[str, Any], expected: object) -> None:
    space = read_space(write(tmp_path, parameters=parameter))
    (key,) = parameter
    assert space.base_values() == (None if expected is None else {key: expected})


def test_a_value_that_the_base_leaves_to_the_store(tmp_path: Path) -> None:
    store, base = load_config(make_shop(tmp_path)).store.path, tmp_path / "base.yaml"
    found = []
    for place in ("nowhere", store):
        base.write_text(yaml.safe_dump({"store": {"path": place}}))
        parameters = {"model.dropout": {"low": 0.3, "high": 0.6, "step": 0.1}}
        found.append(read_space(write(tmp_path, base=str(base), parameters=parameters)).base_values())
    assert found == [None, {"model.dropout": 0.5}]


@pytest.mark.parametrize("is_there", [True, False])
def test_the_base_keeps_auto_where_it_is_a_choice(is_there: bool, tmp_path: Path) -> None:
    store, base = load_config(make_shop(tmp_path)).store.path, tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"store": {"path": store if is_there else "nowhere"}}))
    parameters = {"model.dropout": {"choices": [0.2, "auto"]}, "train.batch_size": {"choices": ["auto", 32, 64]}}
    space = read_space(write(tmp_path, base=str(base), parameters=parameters))
    assert space.base_values() == {"model.dropout": "auto", "train.batch_size": "auto"}
