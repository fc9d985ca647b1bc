"""``launch/shards.slurm`` as an array on two nodes: a task that is killed is tried again; a join builds the store."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist.data.store.reader import Store
from shards.encoders.text_feature import UNIT_TEXTS
from tests.fixtures.demo_runs import VENV, wait_for
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.slurm_cluster import SlurmCluster
from tests.fixtures.stores import store_contents, write_histories
from tests.fixtures.text_model import random_texts, write_text_model

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.multiproc, pytest.mark.timeout(600)]

SCRIPT = "launch/shards.slurm"
ONE_THREAD = VENV | {"OMP_NUM_THREADS": "1"}
PARTS = 4
NUM_ITEMS = PARTS * UNIT_TEXTS + 1000  # so that no part is without work


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    """A catalogue whose texts a small model encodes."""
    root = folder / "texts"
    write_text_model(root / "model")
    titles = random_texts(NUM_ITEMS, longest=12)
    pq.write_table(pa.table({"item_id": range(NUM_ITEMS), "title": titles}), root / "items.parquet")
    write_histories(root / "sequences.parquet", {"u": [1, 2, 3]})
    text = {"source": "transformers", "model": str(root / "model"), "text": ["{title}"], "max_tokens": 40}
    values = {"data": {"root": str(root), "features": {"text": text}}, "store": {"path": str(folder / "texts-store")}}
    (root / "texts.yaml").write_text(yaml.safe_dump(values))
    return root / "texts.yaml"


def submit(slurm: SlurmCluster, folder: Path, *words: object) -> int:
    return slurm.submit(f"--output={folder}/slurm-%x-%A_%a.out", *words, environment=ONE_THREAD)


def encoders_of(part: str) -> list[psutil.Process]:
    """The Python processes that encode a part, on any node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "shards.build" in words and part in words and Path(words[0]).name.startswith("python"):
            found.append(process)
    return found


def test_an_array_whose_task_is_killed(slurm: SlurmCluster, config: Path, folder: Path) -> None:
    """With KILL, in the middle of its work; the store is that of a build in one piece."""
    command = [sys.executable, "-m", "shards.build", "--config", str(config), "--store.path", str(folder / "whole")]
    environment = clean_environment() | ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=240)
    array = submit(slurm, folder, "--array=4-7", "--exclusive", SCRIPT, config)
    ids = range(4, 4 + PARTS)
    encodings = folder / "texts-store.build" / "encodings"
    wait_for("a part at work", lambda: encodings.is_dir() and len(encoders_of("2/4")) == 1)
    os.kill(encoders_of("2/4")[0].pid, signal.SIGKILL)
    tasks = [slurm.wait(f"{array}_{task}") for task in ids]
    assert [task.state for task in tasks] == ["COMPLETED"] * PARTS, tasks
    assert [slurm.restarts(f"{array}_{task}") for task in ids] == [0, 1, 0, 0]
    assert f"part 2/4 ended with exit code 137; job {array}_5 is requeued" in tasks[1].log
    assert {slurm.facts(f"{array}_{task}")["NodeList"] for task in ids} <= {"node1", "node2"}
    for number, task in enumerate(tasks, 1):
        assert f"part {number}/4: encoded its share of text" in task.log
    (join_id,) = set(re.findall(r"^job (\d+) joins the parts", tasks[0].log, re.MULTILINE))
    join = slurm.wait(int(join_id))
    assert join.state == "COMPLETED" and "feature 'text': 0 texts encoded, " in join.log, join.log
    assert Store.open(folder / "texts-store").manifest.sha256 == Store.open(folder / "whole").manifest.sha256
    assert store_contents(folder / "texts-store") == store_contents(folder / "whole")

    again = submit(slurm, folder, SCRIPT, config)
    assert slurm.wait(again).log.startswith(f"kept {folder / 'texts-store'}: ")


def test_mistakes(slurm: SlurmCluster, config: Path, folder: Path) -> None:
    """One line, exit code 2, and no second try."""
    gaps = submit(slurm, folder, "--array=0,2", SCRIPT, config)
    words = ["--array=0-1", SCRIPT, config, "--store.path", folder / "x", "--data.items.path", "none.parquet"]
    wrong = submit(slurm, folder, *words)
    for task, complaint in {
        f"{gaps}_0": "error: the array's ids are not consecutive; submit it as --array=0-1",
        f"{wrong}_1": "none.parquet does not exist",
    }.items():
        job = slurm.wait(task)
        assert (job.state, job.exit_code, slurm.restarts(task)) == ("FAILED", "2:0", 0)
        assert complaint in job.log
    assert not (folder / "x").exists()
