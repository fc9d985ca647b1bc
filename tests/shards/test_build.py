"""The commands of ``shards``: kept stores, exit codes, and the demo from raw tables to a checked store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fmrl_dist.base.errors import EXIT_USER_ERROR
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders.pixels import DIM
from tests.fixtures.commands import run_main
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import FEATURE_DIM, ITEMS, tiny_config, write_raw
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
    assert "not the config's ['other']; build it again with --overwrite" in refusal(
        main, "--config", config, "--keep", *another
    )
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
