"""The configuration: what is refused and with which words, overrides, defaults, the round trip, the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import TrainState, save_checkpoint
from fmrl_dist.checkpoint.run_folder import open_run
from fmrl_dist.config.data_section import DataConfig, StoreConfig
from fmrl_dist.config.features import NpyFeature
from fmrl_dist.config.loading import DEMO_CONFIG, config_from_dict, load_config
from fmrl_dist.config.model_section import LossConfig, ModelConfig
from fmrl_dist.config.sections import Config
from fmrl_dist.config.train_section import RunConfig, TrainConfig
from tests.fixtures.processes import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def write(folder: Path, raw: Any, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(raw))
    return path


def refusal(folder: Path, raw: Any, overrides: tuple[str, ...] = ()) -> str:
    """The message with which ``raw`` is refused; always one line."""
    with pytest.raises(UserError) as error:
        load_config(write(folder, raw), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_live_under_their_own_name(path: Path) -> None:
    config = load_config(path)
    assert (config.store.path, config.run.dir) == (f"stores/{path.stem}", f"runs/{path.stem}")


def test_no_path_is_the_demo() -> None:
    assert load_config(None) == load_config(DEMO_CONFIG)
    assert load_config(None).data.demo is not None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"batchsize": 3}}, "unknown config key 'train.batchsize'; did you mean 'train.batch_size'?"),
        ({"modle": {}}, "unknown config key 'modle'; did you mean 'model'?"),
        ({"eval": {"zzz": 1}}, "unknown config key 'eval.zzz'; known keys: cutoffs, metrics, metric, size"),
        ({"data": {"features": {"text": {"sauce": "npy"}}}}, "unknown config key 'data.features.text.sauce'; did you"),
        ({7: {}}, "unknown config key '7'; known keys: data, store"),
    ],
)
def test_unknown_key(raw: Any, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, raw).startswith(message)


@pytest.mark.parametrize(("section", "key"), [("train", "lr"), ("model", "feature_scale")])
def test_an_integer_that_no_float_holds(section: str, key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, {section: {key: 10**400}}).startswith(f"{section}.{key} is 1000")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"epochs": "many"}}, "train.epochs is 'many'; expected int (at least 1) or auto"),
        ({"train": {"epochs": 2.5}}, "train.epochs is 2.5; expected int (at least 1) or auto"),
        ({"train": {"epochs": True}}, "train.epochs is True; expected int (at least 1) or auto"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast'; expected float"),
        ({"train": {"lr": float("nan")}}, "train.lr is nan; expected a finite number"),
        ({"train": {"threads": [1]}}, "train.threads is [1]; expected int (at least 1) or auto"),
        ({"run": {"tensorboard": 1}}, "run.tensorboard is 1; expected bool"),
        ({"model": {"sizes": 8}}, "model.sizes is 8; expected a list"),
        ({"model": {"sizes": [8, "x"]}}, "model.sizes[1] is 'x'; expected int"),
        ({"data": {"features": ["text"]}}, "data.features is ['text']; expected a mapping"),
        ({"train": [1]}, "train is [1]; expected a mapping"),
        ({"store": "here"}, "store is 'here'; expected a mapping"),
    ],
)
def test_wrong_type(raw: Any, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, raw) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model": {"sizes": []}}, "model.sizes is empty"),
        ({"model": {"sizes": [8, 8, 128]}}, "model.sizes [8, 8, 128] do not increase"),
        ({"model": {"sizes": [4] * 10_000}}, "model.sizes has 10,000 numbers; expected at most 64"),
        ({"model": {"sizes": [16, 8]}}, "model.sizes [16, 8] do not increase"),
        ({"model": {"sizes": [2, 128]}}, "model.sizes [2, 128] have a chunk of 2 channels"),
        ({"model": {"sizes": [8, 11, 128]}}, "model.sizes [8, 11, 128] have a chunk of 3 channels"),
        ({"model": {"sizes": [8, 64], "width": 128}}, "the last of model.sizes is 64 but model.width is 128"),
        ({"model": {"depth": 0}}, "model.depth is 0; expected 1 <= value <= 1000"),
        ({"model": {"dropout": 1.0}}, "model.dropout is 1.0; expected float (0 <= value < 1) or auto"),
        ({"model": {"r_min": 0.2, "r_max": 0.1}}, "model.r_min, r_max are 0.2, 0.1"),
        ({"model": {"features": [], "id_table": False}}, "model.features is empty and model.id_table is off"),
        ({"model": {"features": ["text", "text"]}}, "model.features ['text', 'text'] name a feature twice"),
        ({"model": {"feature_scale": "big"}}, "model.feature_scale is 'big'"),
        (
            {"model": {"feature_scale": 0}},
            "model.feature_scale is 0; expected none, standardize, length or float (more than 0)",
        ),
        ({"train": {"batch_size": 32, "lanes": 5}}, "train.lanes is 5, which does not divide train.batch_size 32"),
        ({"train": {"lanes": 5}}, "train.lanes is 5, which does not divide train.batch_size 128"),
        ({"train": {"log_every_steps": 0}}, "train.log_every_steps is 0; expected at least 1"),
        ({"train": {"warmup_steps": -1}}, "train.warmup_steps is -1; expected at least 0"),
        ({"train": {"lr": 0}}, "train.lr is 0.0; expected more than 0"),
        ({"train": {"beta2": 1}}, "train.beta2 is 1.0"),
        ({"train": {"precision": "fp16"}}, "train.precision is 'fp16'; expected one of: fp32, bf16"),
        ({"train": {"threads": "all"}}, "train.threads is 'all'; expected int (at least 1) or auto"),
        ({"eval": {"metric": "auc"}}, "eval.metric is 'auc'; expected one of: recall@5"),
        ({"eval": {"metric": "ndcg@20"}}, "eval.metric is 'ndcg@20'; expected one of: recall@5"),
        ({"eval": {"cutoffs": [10, 5]}}, "eval.cutoffs is [10, 5]; expected increasing numbers, such as [5, 10]"),
        ({"eval": {"cutoffs": []}}, "eval.cutoffs is []; expected increasing numbers"),
        ({"eval": {"cutoffs": [2000]}}, "eval.cutoffs"),
        ({"eval": {"metrics": ["coverage"]}}, "eval.metrics is ['coverage']; expected at least one of recall, ndcg"),
        ({"eval": {"metrics": ["mrr", "mrr"]}}, "eval.metrics is ['mrr', 'mrr']; expected different names"),
        ({"eval": {"baselines": ["random"]}}, "eval.baselines"),
        ({"eval": {"size": 12}}, "eval.size is 12, which is not trained; choose one of [8, 16, 32, 64, 128]"),
        ({"data": {"max_length": 0}}, "data.max_length is 0; expected at least 1"),
        ({"data": {"windows": "first"}}, "data.windows is 'first'; expected one of: last, all"),
        ({"data": {"features": {"users": {"path": "x.npy"}}}}, "feature name 'users' is not allowed"),
        ({"data": {"features": {"Text": {"path": "x.npy"}}}}, "feature name 'Text' is not allowed"),
        ({"data": {"features": {"text": {}}}}, "data.features.text has no path; source 'npy' needs one"),
        ({"data": {"features": {"text": {"source": "tfidf"}}}}, "data.features.text has no dim; source 'tfidf'"),
        (
            {"data": {"features": {"image": {"source": "pixels", "path": "s3://me:secret@shop/images.parquet"}}}},
            "data.features.image.path is s3://***@shop/images.parquet, a URL, and the file of a feature is read from a",
        ),
        (
            {"data": {"root": "https://host/shop", "features": {"text": {"path": "x.npy"}}}},
            "data.root is https://host/shop, a URL, and the file of a feature is read from a folder; copy it there",
        ),
        ({"data": {"sequences": {"layout": "rows"}}}, "data.sequences.layout is 'rows'"),
        (
            {"data": {"interactions": {"min_rating": 3}}},
            "data.interactions.min_rating is set, but data.sequences.rating",
        ),
        (
            {"data": {"interactions": {"duplicates": "event"}}},
            "data.interactions.duplicates: event is set, but data.sequences.times",
        ),
        (
            {"data": {"interactions": {"max_events": 2}}},
            "data.interactions.max_events is 2, and data.split.by leave_one_out holds out two events",
        ),
        ({"data": {"interactions": {"events": ["buy"]}}}, "data.interactions.events is set, but data.sequences.event"),
        ({"data": {"split": {"by": "given"}}}, "data.split.by: given is set, but data.sequences.split names no column"),
        ({"data": {"split": {"by": "time"}}}, "data.split.by: time is set, but data.sequences.times names no column"),
        (
            {"data": {"split": {"valid_from": "2023-03-01", "test_from": "2023-04-01"}}},
            "data.split.valid_from needs data.split.by: time, which is leave_one_out; set it, or leave valid_from out",
        ),
        (
            {"data": {"split": {"by": "given", "test_quantile": 0.95}}},
            "data.split.test_quantile needs data.split.by: time, which is given",
        ),
        ({"data": {"split": {"valid": "v.csv", "test": "t.csv"}}}, "data.split.valid needs data.split.by: given"),
        ({"data": {"split": {"target": "last"}}}, "data.split.target needs data.split.by: time or given"),
        (
            {"data": {"split": {"by": "time", "valid_from": 3, "test_from": 4, "test_quantile": 0.95}}},
            "data.split.test_quantile is for a split without valid_from and test_from",
        ),
        (
            {"data": {"sequences": {"layout": "interactions", "split": "part"}}},
            "data.sequences.split names column 'part', but data.split.by is leave_one_out; set data.split.by: given",
        ),
        (
            {
                "data": {
                    "sequences": {"layout": "interactions", "split": "part"},
                    "split": {"by": "given", "valid": "v.csv", "test": "t.csv"},
                }
            },
            "data.sequences.split names column 'part', but data.split.by is given, with tables of its own",
        ),
        ({"data": {"sequences": {"time_unit": "ms"}}}, "data.sequences.time_unit is ms, but data.sequences.times"),
        (
            {"data": {"interactions": {"duplicates": "event"}}},
            "data.interactions.duplicates: event is set, but data.sequences.times names no column",
        ),
        ({"data": {"items": {"path": "", "id": "sku"}}}, "data.items.id is set, but data.items.path is empty"),
        (
            {"data": {"items": {"path": ""}, "on_unknown_item": "drop"}},
            "data.on_unknown_item is drop, but data.items.path is empty",
        ),
        *(
            (
                {"data": {"format": "amazon2018", section: {key: value}}},
                f"data.{section}.{key} is set, but data.format is amazon2018, from which columns",
            )
            for section, key, value in (
                ("sequences", "user", "customer"),
                ("sequences", "items", "article"),
                ("sequences", "layout", "interactions"),
                ("sequences", "times", "when"),
                ("sequences", "csv", {"delimiter": ";"}),
                ("items", "id", "sku"),
                ("items", "title", "name"),
                ("interactions", "events", ["buy"]),
            )
        ),
        (
            {"data": {"format": "movielens", "split": {"by": "given"}}},
            "data.split.by is given, but events of data.format movielens have no column of it; name tables",
        ),
    ],
)
def test_impossible_value(raw: Any, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, raw).startswith(message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(epochs=0), "train.epochs is 0; expected int (at least 1) or auto"),
        (
            lambda: TrainConfig(precision="fp16"),  # type: ignore[arg-type]
            "train.precision is 'fp16'; expected one of: fp32, bf16",
        ),
        (lambda: ModelConfig(dropout=1.0), "model.dropout is 1.0; expected float (0 <= value < 1) or auto"),
        (lambda: DataConfig(features={"text": NpyFeature(path="a.npy", dim=-1)}), "data.features.text.dim is -1"),
    ],
)
def test_values_are_checked_in_python_too(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_a_file_that_is_not_a_config(tmp_path: Path) -> None:
    missing, text, binary = tmp_path / "missing.yaml", tmp_path / "text.yaml", tmp_path / "binary.yaml"
    text.write_text("train: [1,\nmodel: }")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in [(missing, "does not exist"), (text, "is not YAML"), (binary, "is not YAML")]:
        with pytest.raises(UserError, match=re.escape(f"config {path} {message}")) as error:
            load_config(path)
        assert "\n" not in str(error.value)
    assert "holds list; expected a mapping of sections" in refusal(tmp_path, [1])


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, {"train": {"epochs": 3, "lr": 0.1}, "eval": None})
    words = "--train.epochs 7 --train.lr=1e-4 --model.sizes [8,16] --eval.size 8 --run.dir".split()
    config = load_config(path, [*words, "here", "--data.features.text.path", "a.npy", "--train.threads", "2"])
    assert (config.train.epochs, config.train.lr, config.train.threads) == (7, 1e-4, 2)
    assert (config.model.sizes, config.eval.size, config.run.dir) == ((8, 16), 8, "here")
    assert config.data.features["text"] == NpyFeature(path="a.npy")
    assert config == load_config(write(tmp_path, config.to_dict()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--train.epochs",), "override --train.epochs has no value"),
        (("--train.epochs", "--train.lr", "1"), "override --train.epochs has no value"),
        (("--resum", "auto"), "argument '--resum' is not known"),
        (("train.epochs", "3"), "argument 'train.epochs' is not known"),
        (("--train.epochs.first", "3"), "override --train.epochs.first: 'epochs' holds a value, not a section"),
        (("--train.epochs", "[1"), "override --train.epochs: '[1' is not a YAML value"),
        (
            ("--data.sequences.path", "*.csv"),
            "override --data.sequences.path: '*.csv' is not a YAML value; a text",
        ),
        (("--train.epoch", "1"), "unknown config key 'train.epoch'; did you mean 'train.epochs'?"),
        (("--run.dir", "7"), "run.dir is 7; expected str"),
    ],
)
def test_bad_override(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, {"train": {"epochs": 2}}, overrides).startswith(message)


def test_config_of_a_run_keeps_the_run_as_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "blue"
    folder.mkdir()
    assert load_config(write(folder, {}, "config.yaml")).run.dir == "runs/blue"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config == config_from_dict(config.to_dict())
    assert load_config(copy).hash == config.hash


def test_hash_names_the_configuration() -> None:
    assert Config().hash == Config().hash == config_from_dict(Config().to_dict()).hash
    assert re.fullmatch(r"[0-9a-f]{12}", Config().hash)
    assert load_config(None).hash != load_config(None, ["--train.seed", "1"]).hash


def test_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().train.lr = 1.0  # type: ignore[misc]


def test_width_follows_from_sizes(tmp_path: Path) -> None:
    """Configs written or recorded before it did may still name it, if they name it right."""
    config = Config(model=ModelConfig(sizes=(8, 64)))
    assert config.model.width == 64
    assert "width" not in config.to_dict()["model"]
    old = {"model": {**config.to_dict()["model"], "width": 64}}
    assert config_from_dict(old).model == config.model
    assert old["model"]["width"] == 64, "the values handed over are not changed"
    assert load_config(write(tmp_path, old), ["--model.sizes", "[8]", "--model.width", "8"]).model.width == 8
    refused = refusal(tmp_path, old, ("--model.sizes", "[8, 16]"))
    assert refused == (
        "the last of model.sizes is 16 but model.width is 64; leave model.width out, it follows from model.sizes"
    )


def test_a_checkpoint_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path))).resolved(
        num_items=1, num_users=1, num_events=1, has_features=True
    )
    recorded = config.to_dict()
    recorded["model"]["width"] = config.model.width
    recorded["loss"]["impl"] = "compiled"
    assert refusal(tmp_path, recorded) == "loss.impl is 'compiled'; expected one of: auto, tiled, triton, plain"
    facts = {"config": recorded, "features": {}, "num_items": 1, "manifest_sha256": "0" * 64}
    save_checkpoint(tmp_path / "checkpoints", TrainState(step=3), {}, {}, facts)
    checkpoint = open_run(config, "auto", "0" * 64)
    assert checkpoint is not None and checkpoint.state.step == 3
    with pytest.raises(UserError, match=r"has model.sizes \(8, 16, 32, 64, 128\), this run \(8, 16\)"):
        open_run(replace(config, model=ModelConfig(sizes=(8, 16))), "auto", "0" * 64)


def test_keys_that_a_recorded_config_lacks_mean_what_was_done_then() -> None:
    """Whatever the defaults are now: neither norms nor ids, and the whole softmax."""
    recorded = Config().to_dict()
    for section, key in (
        ("model", "input_norm"),
        ("model", "output_norm"),
        ("model", "id_dropout"),
        ("loss", "score_untrained"),
    ):
        del recorded[section][key]
    del recorded["loss"]["temperature_power"]
    for section, key in (("model", "id_init"), ("loss", "distillation"), ("eval", "cut_vectors")):
        del recorded[section][key]
    then = config_from_dict(recorded)
    assert (then.model.input_norm, then.model.output_norm, then.model.id_init) == (False, False, None)
    assert then.loss.distillation == 0 and set(then.temperatures) == {1.0}
    assert then.loss.score_untrained and then.model.id_dropout == 0
    assert then.eval.cut_vectors, "which changes no model"


def test_a_recorded_file_means_what_was_done_then(tmp_path: Path) -> None:
    """Also where it is given as a config; a file that names some keys gets the defaults for the others."""
    recorded = Config().to_dict()
    del recorded["loss"]["temperature_power"], recorded["model"]["input_norm"]
    path = write(tmp_path, recorded, "config.yaml")
    assert load_config(path).loss.temperature_power == 0 and not load_config(path).model.input_norm
    some_keys = {section: {} for section in recorded} | {"train": {"lr": 1e-3, "beta2": 0.99}, "model": {"depth": 3}}
    by_hand = load_config(write(tmp_path, some_keys))
    assert by_hand.loss.temperature_power == 0.5 and by_hand.model.input_norm


@pytest.mark.parametrize(
    ("store", "loss", "num_items", "num_users", "has_features", "expected"),
    [
        ({}, {}, 4096, 10_000, True, (True, 0.1, "full", 20)),
        ({}, {}, 4097, 10_000, True, (True, 0.1, "sampled", 20)),
        ({}, {}, 4096, 10_000, False, (True, 0.0, "full", 20)),
        ({}, {"catalogue": "split"}, 10**7, 10**7, True, (True, 0.1, "full", 20)),
        ({"feature_mode": "inline"}, {}, 100, 1, True, (False, 0.0, "sampled", 400)),
        ({"feature_mode": "inline"}, {"softmax": "full"}, 100, 512_000, True, (False, 0.0, "full", 20)),
    ],
)
def test_what_depends_on_the_store(
    store: dict[str, Any],
    loss: dict[str, Any],
    num_items: int,
    num_users: int,
    has_features: bool,
    expected: tuple[bool, float, str, int],
) -> None:
    config = Config(store=StoreConfig(**store), loss=LossConfig(**loss)).resolved(
        num_items, num_users, 5 * num_users, has_features
    )
    assert (config.model.id_table, config.model.id_dropout, config.loss.softmax, config.train.epochs) == expected
    assert config.resolved(1, 1, 10**6, True) == config, "what is set stays"


@pytest.mark.parametrize(
    ("train", "windows", "num_users", "mean_events", "expected"),
    [
        ({}, "last", 4_800, 8, (128, 16)),
        ({}, "last", 4_799, 8, (64, 16)),
        ({}, "last", 1_200, 8, (32, 16)),
        ({}, "last", 100, 8, (16, 16)),
        ({}, "last", 31_999, 9, (64, 16)),
        ({}, "last", 32_000, 9, (128, 16)),  # 20 epochs have 5,000 steps
        ({}, "last", 9_600, 20, (32, 16)),
        ({}, "last", 9_600, 10**3, (32, 16)),  # of 1,000 events 50 are targets
        ({}, "last", 16_000, 30, (64, 16)),
        ({}, "last", 6_040, 163, (16, 16)),
        ({}, "all", 6_040, 163, (16, 16)),
        ({"lanes": 32}, "all", 6_040, 163, (32, 32)),
        ({"lanes": 128}, "last", 100, 8, (128, 128)),
        ({"lanes": 4}, "last", 100, 8, (16, 4)),
        ({"batch_size": 96}, "all", 100, 10**3, (96, 16)),
    ],
)
def test_a_step_has_fewer_histories_where_they_are_long_or_few(
    train: dict[str, Any],
    windows: Literal["last", "all"],
    num_users: int,
    mean_events: int,
    expected: tuple[int, int],
) -> None:
    """So that an epoch has as many steps as it can use; the lanes, which ranks share, are not fewer for it."""
    config = Config(data=DataConfig(windows=windows), train=TrainConfig(epochs=1, **train))
    lanes_before = config.train.num_lanes
    config = config.resolved(100, num_users, num_users * mean_events, True)
    assert (config.train.batch_size, config.train.num_lanes) == expected and lanes_before == expected[1]


@pytest.mark.parametrize(
    ("targets_per_item", "expected"),
    [(0.01, 0.5), (1, 0.5), (30, 0.5), (95, 0.35), (299, 0.2), (300, 0.2), (10**6, 0.2)],
)
def test_dropout_follows_how_often_items_are_seen(targets_per_item: float, expected: float) -> None:
    config = Config(data=DataConfig(windows="all"), model=ModelConfig(lru_dropout=0.1))
    config = config.resolved(100, 100, round(100 * targets_per_item), True)
    assert config.model.dropout_rates == {"dropout": expected, "lru_dropout": 0.1}


def test_only_what_a_window_has_counts() -> None:
    """MovieLens-1M: 163 events of a user, 50 of them in its last window."""
    rates = []
    for windows in ("last", "all"):
        config = Config(data=DataConfig(windows=windows)).resolved(3416, 6040, 987_531, True)
        rates.append(config.model.dropout_rates["dropout"])
    assert rates == [0.36, 0.2]


def test_temperatures_follow_from_the_sizes() -> None:
    config = Config(model=ModelConfig(sizes=(4, 16, 64)))
    assert config.temperatures == (0.25, 0.5, 1.0) and config.temperature_of(16) == 0.5
    given_ones = replace(config, loss=LossConfig(temperatures=(1.0, 2.0, 3.0)))
    assert given_ones.temperatures == (1.0, 2.0, 3.0)


@given(st.lists(st.integers(-2, 40), min_size=1, max_size=6))
def test_sizes_are_accepted_exactly_when_they_nest(sizes: list[int]) -> None:
    nested = sizes[0] >= 4 and all(high - low >= 4 for low, high in zip(sizes, sizes[1:], strict=False))
    try:
        ModelConfig(sizes=tuple(sizes))
    except UserError:
        assert not nested
    else:
        assert nested


@given(st.integers(1, 400))
def test_lanes_are_the_largest_divisor_up_to_sixteen(batch_size: int) -> None:
    lanes = TrainConfig(batch_size=batch_size).num_lanes
    assert batch_size % lanes == 0
    assert lanes == max(n for n in range(1, 17) if batch_size % n == 0)


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_print_config_shows_what_is_in_force() -> None:
    result = run("shards.build", "--config", "configs/clothing-id.yaml", "--train.epochs", "3", "--print-config")
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        yaml.safe_load(result.stdout)
        == load_config(REPOSITORY / "configs" / "clothing-id.yaml", ["--train.epochs", "3"]).to_dict()
    )


def test_help_and_version() -> None:
    help_text = run("fmrl_dist.train", "--help")
    assert help_text.returncode == 0
    assert all(flag in help_text.stdout for flag in ("--config", "--resume", "--print-config", "--section.key"))
    version = run("shards.build", "--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "fmrl-dist")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--train.epoch", "3"), "error: unknown config key 'train.epoch'; did you mean 'train.epochs'?"),
        (("--config",), "error: argument --config: expected one argument; see --help"),
    ],
)
def test_a_user_mistake_ends_in_one_line_and_exit_code_2(arguments: tuple[str, ...], line: str) -> None:
    result = run("shards.build", *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{line}\n")


@pytest.mark.parametrize("key", ["run.dir", "store.path"])
@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("runs/a\nrm -rf /", "with a character that cannot be printed"),
        ("runs/a\0b", "with a character that cannot be printed"),
        ("runs/a ", "with a blank at its begin or end"),
        ("runs/" + "a" * 300, "with a name of 300 bytes; expected at most 255"),
        ("a/" * 600, "and 1024 in all"),
    ],
)
def test_paths_that_no_script_survives(key: str, path: str, complaint: str) -> None:
    """They are words of batch scripts: a line break there begins a command."""
    section, name = key.split(".")
    with pytest.raises(UserError, match=complaint) as error:
        config_from_dict({section: {name: path}})
    assert str(error.value).startswith(f"{key} is ") and "\n" not in str(error.value)
