"""``shards.build --part I/N``: any number of parts, at once, killed and started again, give the store of one build."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders import text_feature
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import store_contents, tiny_values, write_histories, write_raw
from tests.fixtures.text_model import random_texts, write_text_model
from tests.fixtures.training import refusal, run_here

NUM_ITEMS = 2 * text_feature.UNIT_TEXTS + 1000  # three units: no part is without work


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue whose texts a small model encodes, with the config ``shop.yaml``."""
    root = tmp_path_factory.mktemp("shop")
    write_text_model(root / "model")
    pq.write_table(
        pa.table({"item_id": range(NUM_ITEMS), "title": random_texts(NUM_ITEMS, longest=12)}), root / "items.parquet"
    )
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    text = {"source": "transformers", "model": str(root / "model"), "text": ["{title}"], "max_tokens": 40}
    values = {"data": {"root": str(root), "features": {"text": text}}, "store": {"path": str(root / "store")}}
    (root / "shop.yaml").write_text(yaml.safe_dump(values))
    return root


def words_of(shop: Path, store: str) -> list[str]:
    return ["--config", str(shop / "shop.yaml"), "--store.path", str(shop / store)]


@pytest.fixture(scope="module")
def undisturbed(shop: Path) -> Store:
    """Built in one piece, on one thread as all others."""
    with start(shop, "undisturbed") as process:
        assert process.wait() == 0
    return Store.open(shop / "undisturbed")


def start(shop: Path, store: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shards.build", *words_of(shop, store), *words]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_any_number_of_parts_gives_one_store(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build that follows finds every row. Parts that run again encode nothing."""
    monkeypatch.setattr(text_feature, "UNIT_TEXTS", 256)
    main(words_of(shop, "whole"))
    expected = store_contents(shop / "whole")
    for count in (1, 2, 3, 5):
        store = f"parts-{count}"
        capsys.readouterr()
        encoded = []
        for number in range(count, 0, -1):
            main([*words_of(shop, store), "--part", f"{number}/{count}"])
            out = capsys.readouterr().out
            assert f"part {number}/{count}: encoded its share of text, in " in out
            encoded.append(int(out.split(" texts encoded")[0].split()[-1].replace(",", "")))
        assert not (shop / store).exists() and min(encoded) > 0
        main([*words_of(shop, store), "--part", f"1/{count}"])
        assert "feature 'text': 0 texts encoded, " in capsys.readouterr().out
        main(words_of(shop, store))
        assert f"feature 'text': 0 texts encoded, {sum(encoded):,} were kept" in capsys.readouterr().out
        assert store_contents(shop / store) == expected


def test_parts_at_once_that_are_killed(shop: Path, undisturbed: Store) -> None:
    """Two parts as processes; one is killed twice, at random instants, and started again."""
    folder = shop / "killed.build"
    generator = np.random.default_rng()
    with start(shop, "killed", "--part", "2/2") as other:
        for _ in range(2):
            with start(shop, "killed", "--part", "1/2") as process:
                began = time.monotonic()
                while not list(folder.glob("encodings/*/recipe.json")) and time.monotonic() - began < 60:
                    time.sleep(0.01)
                time.sleep(float(generator.random()))
                process.kill()
        with start(shop, "killed", "--part", "1/2") as process:
            assert process.wait() == 0
        assert other.wait() == 0
    with start(shop, "killed") as process:
        stdout, _ = process.communicate()
    assert process.returncode == 0 and "feature 'text': 0 texts encoded" in stdout
    assert Store.open(shop / "killed").manifest.sha256 == undisturbed.manifest.sha256
    assert store_contents(shop / "killed") == store_contents(undisturbed.path)


def test_several_stores_may_share_a_build_folder(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--store.build_dir", str(shop / "scratch")]
    main([*words_of(shop, "first"), *shared])
    capsys.readouterr()
    main([*words_of(shop, "second"), *shared])
    assert "feature 'text': 0 texts encoded, " in capsys.readouterr().out
    assert store_contents(shop / "first") == store_contents(shop / "second")
    assert not (shop / "first.build").exists() and not (shop / "second.build").exists()


def test_a_part_of_a_store_that_is_there(shop: Path, capsys: pytest.CaptureFixture[str], undisturbed: Store) -> None:
    """``--keep``: there is nothing to encode."""
    run_here(main, [*words_of(shop, "undisturbed"), "--keep", "--part", "1/2"])
    assert capsys.readouterr().out.startswith(f"kept {undisturbed.location}: ")


def test_nothing_to_share_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_values(tmp_path / "raw", tmp_path / "store")))
    main(["--config", str(tmp_path / "config.yaml"), "--part", "1/2"])
    assert "part 1/2: no feature's encoding can be shared out" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "raw"]


def test_mistakes(shop: Path) -> None:
    assert "'3/2' is not a part; expected I/N" in refusal(main, *words_of(shop, "x"), "--part", "3/2")
    assert "is a URL; build into a folder" in refusal(
        main, "--config", shop / "shop.yaml", "--store.path", "https://example.org/x", "--part", "1/2"
    )
