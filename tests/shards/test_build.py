"""The commands of ``shards``: kept stores, exit codes, and the demo from raw tables to a checked store."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist.base.errors import EXIT_USER_ERROR
from fmrl_dist.base.files import file_sha256
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.manifest import fit_file
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders import pixels
from shards.encoders.pixels import DIM
from shards.store.problems import store_problems
from tests.fixtures.commands import run_main
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import FEATURE_DIM, ITEMS, as_older_version, png, tiny_config, write_raw
from tests.fixtures.training import contents, refusal


def test_a_whole_store_of_the_config_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--keep`` builds a missing store, keeps a whole one, and refuses one that is damaged or another config's."""
    write_raw(tmp_path / "raw")
    config, store = tmp_path / "config.yaml", tmp_path / "store"
    config.write_text(tiny_config(tmp_path / "raw", store).to_yaml())
    main(["--config", str(config), "--keep"])
    assert f"\nbuilt {store} in " in capsys.readouterr().out
    before = contents(store)
    main(["--config", str(config), "--keep"])
    assert capsys.readouterr().out == f"kept {store}: 4 users, 6 items\n"
    another = ["--data.features.other.source", "npy", "--data.features.other.path", "vectors.npy"]
    line = refusal(main, "--config", config, "--keep", *another)
    assert "data.features is ['vector'], the config's ['vector', 'other']; build it again with --overwrite" in line
    assert "exists; keep it, or build it again with --overwrite" in refusal(main, "--config", config)
    assert "not allowed with" in refusal(main, "--config", config, "--keep", "--overwrite")
    assert contents(store) == before
    shard = next(iter(sorted(store.glob("train-*"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} has {shard.stat().st_size} bytes, the manifest says" in refusal(
        main, "--config", config, "--keep"
    )
    shard.unlink()
    assert f"{shard.name} has 0 bytes, the manifest says" in refusal(main, "--config", config, "--keep")


def write_shop_of_every_light_source(root: Path) -> Path:
    """Raw tables, and a config whose features are an array, texts, and images in files; returns the config's path."""
    write_raw(root / "raw")
    for item, colour in zip(ITEMS, range(0, 240, 40), strict=True):
        (root / "raw" / f"{item}.png").write_bytes(png((colour, 255 - colour, 90)))
    images = pa.table({"item_id": ITEMS, "image": [f"{item}.png" for item in ITEMS]})
    pq.write_table(images, root / "raw" / "images.parquet")
    features = {
        "vector": {"source": "npy", "path": "vectors.npy"},
        "words": {"source": "tfidf", "dim": 3},
        "image": {"source": "pixels", "path": "images.parquet"},
    }
    config = root / "config.yaml"
    config.write_text(tiny_config(root / "raw", root / "store", features=features).to_yaml())
    return config


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a built store of every light source; neither may be changed."""
    config = write_shop_of_every_light_source(tmp_path_factory.mktemp("built"))
    main(["--config", str(config)])
    return config


def rewrite(name: str, column: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], object]:
    """Change a column of a raw table."""

    def spoil(raw: Path) -> None:
        table = pq.read_table(raw / name)
        number = table.column_names.index(column)
        values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
        pq.write_table(table.set_column(number, column, values), raw / name)

    return spoil


OTHER_CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a title": (rewrite("items.parquet", "title", lambda t: ["Thing 9", *t[1:]]), "data.items.path"),
    "another event": (rewrite("sequences.parquet", "item_ids", lambda t: [t[0][::-1], *t[1:]]), "data.sequences.path"),
    "a number": (
        lambda raw: np.save(raw / "vectors.npy", np.load(raw / "vectors.npy") + np.float32(1e-3)),
        "data.features.vector.path",
    ),
    "images swapped": (rewrite("images.parquet", "image", lambda t: t[::-1]), "data.features.image.path"),
    "an image of the same size": (
        lambda raw: (raw / "a.png").write_bytes((raw / "a.png").read_bytes()[:-1] + b"x"),
        "data.features.image.path",
    ),
    "an image gone": (lambda raw: (raw / "c.png").unlink(), "data.features.image.path"),
}


@pytest.mark.parametrize("name", OTHER_CONTENTS)
def test_a_store_of_other_contents_is_not_kept(name: str, built: Path, tmp_path: Path) -> None:
    spoil, key = OTHER_CONTENTS[name]
    raw = Path(shutil.copytree(built.parent / "raw", tmp_path / "raw"))
    spoil(raw)
    line = refusal(main, "--config", built, "--keep", "--data.root", raw)
    assert f"was built from something else: what {key} names has the sha256 " in line and line.count("sha256") == 1
    assert line.endswith("; build it again with --overwrite, or choose another --store.path")


OTHER_KEYS = {
    "data.features.words.dim": ("2", "is 3, the config's 2"),
    "data.features.words.text": ("['{title}']", "the config's ['{title}']"),
    "data.text": ("['{title}']", "data.features.words.text is ['Title: {title}', "),
    "data.text_separator": ("' '", "data.features.words.text_separator is '\\n', the config's ' '"),
    "data.features.image.id": ("image", "data.features.image.id is 'item_id', the config's 'image'"),
    "data.items.title": ("''", "data.items.title is 'title', the config's ''"),
    "data.sequences.times": ("item_ids", "data.sequences.times is '', the config's 'item_ids'"),
    "store.users_per_block": ("3", "store.users_per_block is 2, the config's 3"),
    "store.items_per_block": ("3", "store.items_per_block is 2"),
    "store.blocks_per_shard": ("3", "store.blocks_per_shard is 2"),
    "store.feature_mode": ("inline", "store.feature_mode is 'table', the config's 'inline'"),
    "data.items.path": ("sequences.parquet", "what data.items.path names has the sha256"),
}


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_a_store_of_other_keys_is_not_kept(key: str, built: Path) -> None:
    value, words = OTHER_KEYS[key]
    assert words in refusal(main, "--config", built, "--keep", f"--{key}", value)


def test_features_in_another_order_are_another_store(built: Path) -> None:
    """Their order is that of the columns that a model reads."""
    features = load_config(built).to_dict()["data"]["features"]
    turned = yaml.safe_dump({name: features[name] for name in reversed(features)}, sort_keys=False)
    words = ["--data.features", turned]
    line = refusal(main, "--config", built, "--keep", *words)
    assert "data.features is ['vector', 'words', 'image'], the config's ['image', 'words', 'vector']" in line


def test_paths_and_ways_of_reading_are_no_difference(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = Path(shutil.copytree(built.parent / "raw", tmp_path / "elsewhere"))
    (raw / "items.parquet").rename(raw / "catalogue.parquet")
    words = [
        "--data.root",
        raw,
        "--data.items.path",
        "catalogue.parquet",
        "--data.max_length",
        7,
        "--data.windows",
        "all",
    ]
    words += ["--store.retries", 1, "--store.on_bad_shard", "skip", "--data.features.vector.dim", FEATURE_DIM]
    before = contents(built.parent / "store")
    main(["--config", str(built), "--keep", *map(str, words)])
    assert capsys.readouterr().out == f"kept {built.parent / 'store'}: 4 users, 6 items\n"
    assert contents(built.parent / "store") == before


def test_input_that_is_gone_cannot_be_compared(built: Path, tmp_path: Path) -> None:
    line = refusal(main, "--config", built, "--keep", "--data.root", tmp_path)
    assert f"{tmp_path / 'items.parquet'} does not exist; check data.root and the path in the config" in line


def test_code_that_gives_other_rows_is_a_difference(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "REVISION", "3")
    line = refusal(main, "--config", built, "--keep")
    assert "feature 'image' has revision '2' of pixels, this version '3'" in line


def test_a_store_of_an_older_version_is_kept_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_shop_of_every_light_source(tmp_path)
    main(["--config", str(config)])
    store = as_older_version(tmp_path / "store")
    assert list(store_problems(store)) == [f"{fit_file('words')}: not in the manifest"]
    capsys.readouterr()
    main(["--config", str(config), "--keep"])
    kept, note = capsys.readouterr().out.splitlines()
    assert kept == f"kept {tmp_path / 'store'}: 4 users, 6 items"
    assert note.startswith("note: an older version built") and "did not record what from" in note
    np.save(tmp_path / "raw" / "vectors.npy", np.load(tmp_path / "raw" / "vectors.npy") + 1)
    assert "feature 'vector' is npy" in refusal(main, "--config", config, "--keep")
    line = refusal(main, "--config", config, "--keep", "--data.features.image.source", "npy")
    assert "data.features.image" in line


def test_what_the_manifest_records(built: Path) -> None:
    """A new key of the sections is recorded, unless it is decided here that it changes no byte of a store."""
    manifest = Store.open(built.parent / "store").manifest
    record = manifest.built_from
    assert record is not None
    raw = built.parent / "raw"
    whole = {
        "data.items": "items.parquet",
        "data.sequences": "sequences.parquet",
        "data.features.vector": "vectors.npy",
    }
    expected = {f"{key}.path": file_sha256(raw / name) for key, name in whole.items()}
    assert {key: record.files[key] for key in expected} == expected
    assert set(record.files) - set(expected) == {"data.features.image.path"}
    assert set(record.keys) == {
        *("data.demo", "data.features", "data.format", "data.ids", "data.on_unknown_item"),
        *(f"data.items.{key}" for key in ("id", "title", "csv", "keep")),
        *(f"data.sequences.{key}" for key in ("layout", "user", "items", "times", "time_unit", "csv")),
        *(f"data.sequences.{key}" for key in ("rating", "event", "split")),
        *(f"data.interactions.{key}" for key in ("min_rating", "events", "duplicates", "ties", "max_events")),
        *(f"data.interactions.{key}" for key in ("min_user_events", "min_item_events")),
        *(f"data.split.{key}" for key in ("by", "valid_from", "test_from", "valid_quantile", "test_quantile")),
        *(f"data.split.{key}" for key in ("valid", "test", "target")),
        *(f"data.features.vector.{key}" for key in ("source", "dim")),
        *(f"data.features.words.{key}" for key in ("source", "dim", "fit", "text", "text_separator")),
        *(f"data.features.image.{key}" for key in ("source", "id", "image")),
        *(f"store.{key}" for key in ("users_per_block", "items_per_block", "blocks_per_shard", "feature_mode")),
    }
    assert record.keys["data.features.vector.dim"] == FEATURE_DIM
    assert {"fmrl-dist", "python", "pyarrow", "scikit-learn", "pillow", "numpy"} <= set(record.made_with)
    recipes = {feature.name: feature.recipe for feature in manifest.features}
    text = [f"{name.title()}: {{{name}}}" for name in ("title", "price", "brand", "categories")]  # the default
    assert recipes == {
        "vector": {"source": "npy"},
        "words": {"source": "tfidf", "tfidf": 1, "text": text, "text_separator": "\n"},
        "image": {"source": "pixels", "pixels": "2", "decoding": 3},
    }


def test_the_commands_on_the_demo(tmp_path: Path) -> None:
    """Missing demo data are drawn, built, verified and described."""
    data = {
        "root": str(tmp_path / "data"),
        "demo": {"users": 60, "items": 100},
        "sequences": {"path": "demo/sequences.parquet"},
        "items": {"path": "demo/items.parquet", "title": "title"},
        "features": {"image": {"source": "pixels", "path": "demo/images.parquet"}},
    }
    config = tmp_path / "demo.yaml"
    config.write_text(yaml.safe_dump({"data": data}))
    store = tmp_path / "store"
    built = run_main("shards.build", "--config", config, "--store.path", store)
    assert (built.code, built.stderr) == (0, "")
    assert "60 users, 100 items" in built.stdout and f"feature image: {DIM} x float16" in built.stdout
    verified, inspected = (start("shards.verify", store), start("shards.inspect", store))
    assert (verified.returncode, verified.stderr, inspected.returncode, inspected.stderr) == (0, "", 0, "")
    assert verified.stdout.splitlines()[-1].startswith(f"ok: {store}: 4 shards, 4 blocks, 60 users, 100 items, ")
    assert Store.open(store).manifest.sha256 in inspected.stdout


def start(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True)


def test_commands_end_with_code_2_and_one_line(tmp_path: Path) -> None:
    """The exit code and the missing traceback, in real processes."""
    write_raw(tmp_path / "raw")
    np.save(tmp_path / "raw" / "vectors.npy", np.full((len(ITEMS), FEATURE_DIM), np.nan, np.float32))
    config = tmp_path / "config.yaml"
    config.write_text(tiny_config(tmp_path / "raw", tmp_path / "store").to_yaml())
    for words in (["build", "--config", config], ["verify", tmp_path / "nowhere"], ["inspect"]):
        done = start(f"shards.{words[0]}", *words[1:])
        assert done.returncode == EXIT_USER_ERROR, done.stderr
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("place", ["file", "file/store", "circle", "circle/store"])
def test_a_store_that_would_be_below_a_file(place: str, tmp_path: Path) -> None:
    """One line from each command that writes or reads one, and the file stays."""
    write_raw(tmp_path / "raw")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to("circle")
    store, config = tmp_path / place, tmp_path / "config.yaml"
    config.write_text(tiny_config(tmp_path / "raw", store).to_yaml())
    commands: list[tuple[str, list[object]]] = [
        ("shards.build", ["--config", config]),
        ("shards.build", ["--config", config, "--overwrite"]),
        ("shards.build", ["--config", config, "--keep"]),
        ("shards.verify", [store]),
        ("shards.inspect", [store]),
        ("fmrl_dist.train", ["--config", config, "--run.dir", tmp_path / "run"]),
    ]
    for command, words in commands:
        ended = run_main(command, *words)
        assert ended.code == EXIT_USER_ERROR, command
        assert ended.stderr.startswith("error: ") and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "config.yaml", "file", "raw"]
