"""Image features through ``python -m shards.build``: killed and resumed, and with a worker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import yaml

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")


from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.images import image_keys
from shards.store.builder import build_store
from tests.fixtures.image_model import MODEL, write_image_shop
from tests.fixtures.images import photo
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import store_contents, tiny_values
from tests.fixtures.training import refusal


def num_units_done(store: Path) -> int:
    return len(list(store.with_name(f"{store.name}.build").rglob("*.safetensors")))


def write_config(tmp_path: Path, weights: Path, name: str, num_images: int, workers: int) -> Path:
    """The config of a build into the store ``name``; one of its images cannot be decoded."""
    photos = [photo(i, size=(160, 120), kind="JPEG") for i in range(20)]
    images = [photos[i % len(photos)] + bytes([i // 256, i % 256]) for i in range(num_images)]  # no two are equal
    images[5] = b"bad"
    write_image_shop(tmp_path / "raw", pa.array(images), list(range(num_images)))
    values = tiny_values(tmp_path / "raw", tmp_path / name)
    values["store"] |= {"items_per_block": 256}
    keys = {"source": "open_clip", "path": "images.parquet", "model": str(MODEL), "pretrained": str(weights)}
    values["data"]["features"] = {"image": keys | {"workers": workers, "batch_images": 32}}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def wait_for(condition: Callable[[], bool], still_at_work: Callable[[], bool], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert still_at_work(), "ended before"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.alone
def test_a_build_killed_at_work_is_resumed_to_the_same_store(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed with two workers; resumed, and compared with a whole one, in this process: bit for bit the same."""
    num_images = 2 * image_keys.UNIT_ROWS + 40
    config = write_config(tmp_path, weights, "store", num_images, workers=2)
    command = [sys.executable, "-m", "shards.build", "--config", str(config)]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    try:
        wait_for(lambda: num_units_done(tmp_path / "store") >= 1, lambda: process.poll() is None)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "store").exists()
    assert 1 <= num_units_done(tmp_path / "store") < 3
    _, alive = psutil.wait_procs(workers, timeout=3)  # by themselves they would notice after 5 s, if ever
    assert len(workers) >= 2 and not alive, "decoding processes outlive the build"
    capsys.readouterr()
    build_store(load_config(config, ["--data.features.image.workers", "0"]))
    assert " 0 were kept" not in capsys.readouterr().out
    whole = write_config(tmp_path, weights, "whole", num_images, workers=0)
    _, (feature,) = build_store(load_config(whole))
    assert feature.note.startswith("1 images unreadable: 1 ")
    assert f"{num_images:,} images encoded, 0 were kept" in capsys.readouterr().out
    assert Store.open(tmp_path / "store").manifest.sha256 == Store.open(tmp_path / "whole").manifest.sha256
    assert store_contents(tmp_path / "store") == store_contents(tmp_path / "whole")


@pytest.mark.alone
def test_a_worker_that_dies_ends_the_build(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within seconds and with one line; finished units are kept."""
    monkeypatch.setattr(image_keys, "UNIT_ROWS", 64)
    config = write_config(tmp_path, weights, "store", 1280, workers=1)
    killed: list[float] = []

    def kill_worker() -> None:
        wait_for(lambda: num_units_done(tmp_path / "store") >= 1, lambda: True)
        children = psutil.Process().children()
        (worker,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(time.monotonic())

    killer = threading.Thread(target=kill_worker)
    killer.start()
    line = refusal(main, "--config", config)
    killer.join()
    assert time.monotonic() - killed[0] < 30
    assert "feature 'image': a process that decodes images died" in line and "build again" in line
    assert not (tmp_path / "store").exists()
    assert 1 <= num_units_done(tmp_path / "store") < 20
