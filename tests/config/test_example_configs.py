"""The examples of sampled, split and inline training: the demo with a few keys changed, each trained for some steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from tests.fixtures.config_keys import flat
from tests.fixtures.processes import REPOSITORY, launch
from tests.fixtures.training import evaluation, records, train_here

CHANGED = {
    "demo-sampled": {"loss.softmax", "loss.negatives"},
    "demo-split": {"loss.catalogue"},
    "demo-inline": {"store.feature_mode", "store.users_per_block", "train.shuffle_blocks"},
}
SMALL = (
    *("--data.demo.users", 200, "--data.demo.items", 150, "--data.features.text.dim", 16),
    *("--model.sizes", "[8, 16]", "--eval.size", 16, "--model.dropout", 0, "--model.lru_dropout", 0),
    *("--train.batch_size", 64, "--train.max_steps", 8, "--train.lr", 0.003, "--train.warmup_steps", 1),
    *("--train.threads", 1, "--train.workers", 0, "--train.log_every_steps", 1, "--run.tensorboard", "false"),
)


def path_of(name: str) -> Path:
    return REPOSITORY / "configs" / f"{name}.yaml"


@pytest.mark.parametrize("name", CHANGED)
def test_an_example_is_the_demo_with_a_few_keys_changed(name: str) -> None:
    demo, example = (flat(load_config(path_of(n)).to_dict()) for n in ("demo", name))
    assert {key for key in demo if demo[key] != example[key]} == CHANGED[name] | {"store.path", "run.dir"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first of the runs generates the demo's tables."""
    return tmp_path_factory.mktemp("demo") / "data"


def small(data: Path, name: str) -> tuple[object, ...]:
    """Words that keep a run small and in a folder of its own."""
    return (*SMALL, "--data.root", data, "--store.path", data.parent / f"{name}-store")


@pytest.mark.parametrize("name", ["demo-sampled", "demo-inline"])
def test_it_trains(name: str, data: Path) -> None:
    run = train_here(path_of(name), data.parent / name, *small(data, name))
    losses = [record["loss"] for record in records(run)]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert evaluation(run)["users"] == 200
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["loss"]["softmax"] == "sampled"
    assert Store.open(data.parent / f"{name}-store").manifest.inline == (name == "demo-inline")


@pytest.mark.multiproc
def test_the_split_catalogue_trains_in_two_processes(data: Path) -> None:
    run = data.parent / "demo-split"
    words = ["--config", path_of("demo-split"), "--run.dir", run, *small(data, "demo-split")]
    config_file = REPOSITORY / "launch" / "accelerate" / "cpu-2.yaml"  # as the example's header says
    ended = launch(None, ["-m", "fmrl_dist.train", *map(str, words)], config_file=config_file)
    assert ended.returncode == 0, ended.stderr
    assert "2 process(es), engine multi_cpu" in ended.stdout
    alone = train_here(path_of("demo-split"), data.parent / "demo-alone", *small(data, "demo-split"))
    for ours, expected in zip(records(run), records(alone), strict=True):
        for key in ("loss@8", "loss@16"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-5)
    assert evaluation(run)["users"] == 200
