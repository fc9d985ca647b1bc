"""Stores whose events went through the engine: what trains, what is held out, and which items there are."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist import baselines, train
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.training.build_model import build_model, fitted_items
from shards.build import main
from shards.interactions.__main__ import main as show_interactions
from shards.store.problems import store_problems
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import tiny_config, write_items, write_raw
from tests.fixtures.training import contents, refusal, run_here, shop_values

DAY = 86_400
NUM_ITEMS, NUM_USERS, DIM = 30, 80, 6
SPLIT = {"by": "time", "valid_from": "1970-02-10", "test_from": "1970-02-20"}  # days 40 and 50
COLUMNS = {"user": "user", "items": "item", "times": "time"}
PERIODS = ((0, 40), (40, 50), (50, 60))  # days
TEXTS = {"source": "tfidf", "dim": 3}


def write_shop(root: Path, seed: int = 0, until_day: int = 60) -> Path:
    """Raw tables of single events on days 0 … 59, and a config; returns its path."""
    generator = np.random.default_rng(seed)
    raw = root / "raw"
    raw.mkdir(parents=True)
    write_items(raw / "items.parquet", [f"i{item}" for item in range(NUM_ITEMS)])
    np.save(raw / "vector.npy", np.random.default_rng(1).standard_normal((NUM_ITEMS, DIM)).astype(np.float32))
    users, items = generator.integers(NUM_USERS, size=900), np.minimum(generator.geometric(0.1, 900) - 1, NUM_ITEMS - 1)
    days = generator.integers(60, size=900)
    items[(days < 40) & (items > 20)] = 0  # items 21 … 29 are not in training
    chosen = days < until_day
    table = {
        "user": [f"u{user}" for user in users[chosen]],
        "item": [f"i{item}" for item in items[chosen]],
        "time": pa.array(days[chosen] * DAY + generator.integers(DAY, size=900)[chosen]),
    }
    pq.write_table(pa.table(table), raw / "events.parquet")
    values = shop_values(root)
    values["data"] = {
        "root": str(raw),
        "sequences": {
            "path": "events.parquet",
            "layout": "interactions",
            "user": "user",
            "items": "item",
            "times": "time",
        },
        "items": {"title": "title"},
        "features": {"vector": {"source": "npy", "path": "vector.npy"}, "words": TEXTS},
        "split": SPLIT,
    }
    config = root / "shop.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    return config


def slices(store: Store, split: str) -> dict[str, list[str]]:
    """External items of each external user in a split."""
    vocabulary = pq.read_table(pa.BufferReader(store.read_table(VOCAB_FILE)))["external_id"].to_pylist()
    users = pq.read_table(pa.BufferReader(store.read_table("users.parquet")))["external_id"].to_pylist()
    found = {}
    for block in store.manifest.splits[split]:
        arrays = store.read_block(block)
        for user, low, high in zip(arrays["users"], arrays["starts"][:-1], arrays["starts"][1:], strict=True):
            found[users[user]] = [vocabulary[item] for item in arrays["items"][low:high]]
    return found


def expected_slices(config: Path, target: str) -> dict[str, dict[str, list[str]]]:
    """By hand, of the events as they are; no two of a user have one time."""
    rows = pq.read_table(load_config(config).data.root + "/events.parquet").to_pylist()
    found: dict[str, dict[str, list[str]]] = {"train": {}, "valid": {}, "test": {}}
    for user in {row["user"] for row in rows}:
        own = sorted((row["time"], row["item"]) for row in rows if row["user"] == user)
        train, valid, test = (
            [item for when, item in own if low * DAY <= when < high * DAY]
            for low, high in ((0, 40), (40, 50), (50, 60))
        )
        if train:
            found["train"][user] = train
        for split, before, held_out in (("valid", train, valid), ("test", train + valid, test)):
            if held_out and len(before + held_out[: 1 if target == "first" else None]) > 1:
                found[split][user] = before + (held_out[:1] if target == "first" else held_out)
    return found


@pytest.mark.parametrize("target", ["first", "last"])
def test_a_split_by_time(target: str, tmp_path: Path) -> None:
    config = write_shop(tmp_path)
    main(["--config", str(config), "--data.split.target", target])
    store = Store.open(tmp_path / "store")
    assert {split: slices(store, split) for split in ("train", "valid", "test")} == expected_slices(config, target)
    assert list(store_problems(store)) == []
    assert store.manifest.schema_version == 4
    assert store.manifest.split_rule == (
        "by time: validation from 1970-02-10T00:00:00+00:00, test from 1970-02-20T00:00:00+00:00, "
        f"the {target} event of each user there is to be predicted"
    )


def test_training_and_evaluation_say_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_shop(tmp_path)
    main(["--config", str(config)])
    run_here(train.main, ["--config", str(config), "--train.epochs", "1"])
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    store = Store.open(tmp_path / "store")
    assert figures["split_rule"] == store.manifest.split_rule
    assert figures["users"] == sum(block.count for block in store.manifest.splits["test"])
    assert "by time: validation from 1970-02-10T00:00:00+00:00" in capsys.readouterr().out


def test_statistics_know_nothing_of_what_comes_after_the_cut(tmp_path: Path) -> None:
    """Text fit, feature scale and popularity, in a catalogue that grows with held-out events."""
    fits, scales, counts = [], [], []
    for name, until_day in (("less", 52), ("more", 60)):
        config = write_shop(tmp_path / name, until_day=until_day)
        main(["--config", str(config), "--data.items.keep", "with_events"])
        store = Store.open(tmp_path / name / "store")
        fits.append((tmp_path / name / "store" / "fit-words.safetensors").read_bytes())
        model = build_model(load_config(config).model, load_item_table(store, None), None, fitted_items(store))
        scales.append((model.encoder.feature_shift, model.encoder.feature_scale))
        vocabulary = pq.read_table(pa.BufferReader(store.read_table(VOCAB_FILE))).to_pylist()
        counts.append([(row["external_id"], row["train_count"]) for row in vocabulary if row["train_count"]])
        assert store.manifest.num_items == len(vocabulary) > len(counts[-1])
    assert fits[0] == fits[1] and counts[0] == counts[1]
    assert all(one.equal(other) for one, other in zip(*scales, strict=True))


def test_codes_are_fitted_to_items_of_training(tmp_path: Path) -> None:
    """In a catalogue that grows with held-out events, as all that is fitted."""
    pytest.importorskip("faiss")
    codes = "{vector: {source: npy, path: vector.npy}, codes: {source: pq, of: vector, parts: 2, codes: 4}}"
    fits = []
    for name, until_day in (("less", 52), ("more", 60)):
        config = write_shop(tmp_path / name, until_day=until_day)
        main(["--config", str(config), "--data.items.keep", "with_events", "--data.features", codes])
        fits.append((tmp_path / name / "store" / "fit-codes.safetensors").read_bytes())
    assert fits[0] == fits[1]


def test_rows_of_a_feature_follow_their_items(tmp_path: Path) -> None:
    """A catalogue of fewer items, in another order than the item table, and one that the table lacks."""
    config = write_shop(tmp_path)
    events = pq.read_table(tmp_path / "raw" / "events.parquet")
    extra = pa.table({"user": ["u1"] * 6, "item": ["new"] * 6, "time": list(range(6))}).cast(events.schema)
    pq.write_table(pa.concat_tables([events, extra]), tmp_path / "raw" / "events.parquet")
    assert "6 events name 1 items that are not in the item table, the first is 'new'" in refusal(
        main, "--config", config
    )
    words = ["--data.interactions.min_item_events", "6", "--data.on_unknown_item", "add"]
    main(["--config", str(config), *words])
    store = Store.open(tmp_path / "store")
    vocabulary = pq.read_table(pa.BufferReader(store.read_table(VOCAB_FILE)))["external_id"].to_pylist()
    assert 5 < len(vocabulary) < NUM_ITEMS and "new" in vocabulary
    given = np.load(tmp_path / "raw" / "vector.npy").astype(np.float16)
    table = load_item_table(store, ("vector",))
    for row, item in enumerate(vocabulary):
        expected = np.zeros(DIM) if item == "new" else given[int(item[1:])]
        assert np.array_equal(table.values[row].numpy(), expected), item
        assert bool(table.present[row]) == (item != "new")


def test_the_command_shows_what_each_step_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_shop(tmp_path)
    show_interactions(["--config", str(config), "--data.interactions.min_user_events", "5"])
    shown = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(shown) if line.split() == ["events", "removed", "left"])
    assert shown[first + 1].split() == ["rows", "read", "900"]
    assert shown[first + 2].startswith("users below 5 or items below 0 events")
    assert shown[-1] == f"wrote {tmp_path / 'store.build' / 'interactions'}"


def test_whole_histories_need_no_engine(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config(tmp_path / "raw", tmp_path / "store").to_yaml())
    assert "there is nothing to prepare; run python -m shards.build" in refusal(show_interactions, "--config", config)


def test_a_held_out_event_needs_one_event_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user with one training event and one for the test is verified, read and ranked; dates need no quotes."""
    config = write_shop(tmp_path)
    events = pq.read_table(tmp_path / "raw" / "events.parquet")
    extra = pa.table({"user": ["v1", "v1", "v2"], "item": ["i1", "i2", "i3"], "time": [0, 55 * DAY, 55 * DAY]})
    pq.write_table(pa.concat_tables([events, extra.cast(events.schema)]), tmp_path / "raw" / "events.parquet")
    main(["--config", str(config), "--data.split.valid_from", "1970-02-10", "--data.split.test_from", "1970-02-20"])
    store = Store.open(tmp_path / "store")
    assert slices(store, "test")["v1"] == ["i1", "i2"] and "v2" not in slices(store, "test")
    assert list(store_problems(store)) == []
    baselines.main(["--store", str(tmp_path / "store"), "--split", "test"])
    assert "by time: validation from 1970-02-10" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_random_instants_a_build_gives_the_same_store(tmp_path: Path) -> None:
    """KILL and TERM by turns; what they leave is gone in the end."""
    words: list[Any] = ["--data.interactions.min_user_events", "3", "--data.interactions.duplicates", "first"]
    undisturbed = write_shop(tmp_path / "undisturbed")
    main(["--config", str(undisturbed), *words])
    config = write_shop(tmp_path / "killed")
    command = [sys.executable, "-m", "shards.build", "--keep", "--config", str(config), *words]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    draw, longest = random.Random(0), 0.0
    began = time.monotonic()
    subprocess.run([*command, "--store.path", str(tmp_path / "timed")], cwd=REPOSITORY, env=environment, check=True)
    longest = time.monotonic() - began
    codes = []
    for number in range(10):
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 1.0) * longest)
        os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM)[number % 2])
        codes.append(process.wait(60))
    assert -signal.SIGKILL in codes
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    kept = {name: data for name, data in contents(tmp_path / "killed" / "store").items() if name.endswith(".tar")}
    assert kept == {
        name: data for name, data in contents(tmp_path / "undisturbed" / "store").items() if name.endswith(".tar")
    }
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["raw", "shop.yaml", "store", "store.build"]
    assert [path.name for path in (tmp_path / "killed" / "store.build").iterdir() if path.name.startswith(".")] == []
