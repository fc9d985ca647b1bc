"""From a YAML file, or from recorded plain values, to a :class:`~fmrl_dist.config.sections.Config`."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import require
from fmrl_dist.base.yaml_text import read_yaml
from fmrl_dist.config.parsing import apply_overrides, build, open_section
from fmrl_dist.config.sections import Config

DEMO_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


# What a recorded configuration means that is older than a key, where that is not the key's default.
UNRECORDED: dict[str, dict[str, Any]] = {
    "model": {"input_norm": False, "output_norm": False, "id_table": False, "id_init": None, "id_dropout": 0.0}
    | {"feature_scale": "none", "dropout_power": 0.0},
    "loss": {"softmax": "full", "negatives": "uniform", "num_negatives": 256, "scope": "lane"}
    | {"distillation": 0.0, "temperature_power": 0.0, "score_untrained": True},
    "train": {"id_lr_power": 0.0},
}

# Of the section train; every version has recorded them.
RECORDED_KEYS = {"epochs", "batch_size", "lr", "beta1", "beta2", "eps", "clip_norm", "seed", "log_every_steps"}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (``None``: the demo) and apply ``--section.key value`` overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is impossible.
    """
    path = path or DEMO_CONFIG
    require(not path.is_dir(), f"config {path} is a folder; expected a YAML file such as configs/demo.yaml")
    require(path.is_file(), f"config {path} does not exist; expected a YAML file such as configs/demo.yaml")
    raw = read_yaml(path, "config")
    raw = {} if raw is None else raw
    require(isinstance(raw, dict), f"config {path} holds {type(raw).__name__}; expected a mapping of sections")
    if is_recorded(raw):
        raw = with_unrecorded(raw)
    apply_overrides(raw, overrides)
    name = path.stem if path.name != "config.yaml" else path.resolve().parent.name
    _set_default(raw, "store", "path", f"stores/{name}")
    _set_default(raw, "run", "dir", f"runs/{name}")
    return _build_config(raw)


def is_recorded(raw: dict[str, Any]) -> bool:
    """Whether a file's content is what a run has recorded: all sections, and keys of training that nobody varies."""
    train = raw.get("train")
    has_all_sections = raw.keys() >= {field.name for field in fields(Config)}
    return has_all_sections and isinstance(train, dict) and train.keys() >= RECORDED_KEYS


def with_unrecorded(raw: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with the keys that it is older than."""
    return raw | {key: values | raw[key] for key, values in UNRECORDED.items() if isinstance(raw.get(key), dict)}


def config_from_dict(raw: dict[str, Any]) -> Config:
    """The inverse of :meth:`Config.to_dict`, also for what older versions have recorded."""
    raw = with_unrecorded(raw)
    loss = raw.get("loss")
    if isinstance(loss, dict) and loss.get("impl") == "compiled":  # removed since; "tiled" computes the same
        raw = raw | {"loss": loss | {"impl": "tiled"}}
    return _build_config(raw)


def _build_config(raw: dict[str, Any]) -> Config:
    """``model.width``, once a key, is accepted where it is the last of ``model.sizes``."""
    model, width = raw.get("model"), None
    if isinstance(model, dict) and "width" in model:
        model = dict(model)
        width = model.pop("width")
        raw = raw | {"model": model}
    config = typing.cast(Config, build(Config, raw, ""))
    require(
        width in (None, config.model.width),
        f"the last of model.sizes is {config.model.width} but model.width is {width}; "
        "leave model.width out, it follows from model.sizes",
    )
    return config


def _set_default(raw: dict[str, Any], section: str, key: str, value: str) -> None:
    values = open_section(raw, section)
    if isinstance(values, dict) and not values.get(key):
        values[key] = value
