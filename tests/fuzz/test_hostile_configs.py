"""Hostile values in any key, and hostile YAML: valid or one line, within seconds and bounded memory; nothing touched.

All cases of a command run in one process, to which everything but their folder is read-only.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml

from fmrl_dist.base.errors import EXIT_USER_ERROR, run_command
from tests.fuzz.commands import BY_NAME
from tests.fuzz.hostile import hostile_config, key_paths
from tests.fuzz.mounts import can_mount, nothing_else_writable
from tests.fuzz.running import start
from tests.fuzz.seeds import seeds
from tests.fuzz.world import prepare

CPU_S = 2.0
MEMORY_BYTES = 2 << 30  # more than the process has when it starts
CONFIG_ONLY = ("--config", "FOLDER/shop.yaml")
READERS = {
    "train --print-config": ("fmrl_dist.train", (*CONFIG_ONLY, "--print-config")),
    "plan": ("fmrl_dist.plan", (*CONFIG_ONLY, "--items", "1000", "--cpus", "1")),
    "build": ("shards.build", CONFIG_ONLY),
    "submit --dry-run": ("launch.submit", (*CONFIG_ONLY, "--dry-run")),
    "submit local --dry-run": ("launch.submit", (*CONFIG_ONLY, "--cluster", "local", "--dry-run")),
    "sweep --dry-run": ("launch.sweep", ("FOLDER/space.yaml", "--folder", "FOLDER/sweep", "--dry-run")),
}


class TooSlowError(BaseException):
    """A case took more than ``CPU_S``."""


def _too_slow(number: int, frame: object) -> None:
    raise TooSlowError


def try_configs(module: str, words: list[str], folder: Path, first: int, last: int) -> list[str]:
    """What goes wrong in the cases ``first`` … ``last - 1``; runs in a process of its own."""
    import numpy as np

    main, wrong = importlib.import_module(module).main, []
    base = yaml.safe_load((folder / "shop.yaml").read_text())
    before = set(os.listdir(folder))
    signal.signal(signal.SIGVTALRM, _too_slow)
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for seed in range(first, last):
        what, text = hostile_config(base, np.random.default_rng(seed))
        for name in ("shop.yaml", "base.yaml"):
            (folder / name).write_bytes(text)
        sys.argv = [module, *words]
        stdout, stderr, code = io.StringIO(), io.StringIO(), 0
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                run_command(main)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            wrong.append(f"seed {seed}: {what}: {traceback.format_exc()[-1500:]}")
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        complaint = stderr.getvalue()
        if code not in (0, EXIT_USER_ERROR) or complaint.count("\n") != (code != 0) or len(complaint) > 2000:
            wrong.append(f"seed {seed}: {what}: exit code {code}: {complaint[:3000]}")
        for name in set(os.listdir(folder)) - before:
            if code != 0:
                wrong.append(f"seed {seed}: {what}: {name} is left: {complaint}")
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return wrong


@contextmanager
def instead(cases: tuple[str, list[str], int, int], folder: Path) -> Iterator[None]:
    """Run the cases, and end the process: its command never starts."""
    module, words, first, last = cases
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with nothing_else_writable(folder) if can_mount() else contextlib.nullcontext():
        (folder / "wrong.json").write_text(json.dumps(try_configs(module, words, folder, first, last)))
        os._exit(0)
        yield


@pytest.mark.parametrize("reader", READERS)
def test_hostile_configs(reader: str, world: Path, tmp_path: Path) -> None:
    module, words = READERS[reader]
    folder = prepare(world, tmp_path / "case", "raw")
    write_relative_config(folder)
    (folder / "launch").symlink_to(Path(__file__).resolve().parents[2] / "launch")
    (folder / "wrong.json").write_text("")
    cases = seeds(25)
    argv = [word.replace("FOLDER", str(folder)) for word in words]
    setup = partial(instead, (module, argv, cases[0], cases[-1] + 1))
    start(BY_NAME["inspect"], folder, tmp_path / "logs", setup).wait()
    text = (folder / "wrong.json").read_text()
    assert text, (tmp_path / "logs" / "err").read_text()[-3000:]
    wrong = json.loads(text)
    assert not wrong, f"{len(wrong)} of {len(cases)} (FMRL_FUZZ_SEED repeats one):\n" + "\n\n".join(wrong[:20])


def write_relative_config(folder: Path) -> None:
    """The shop's config, with paths below the working folder."""
    values = yaml.safe_load((folder / "shop.yaml").read_text())
    values["data"]["root"], values["store"]["path"], values["run"]["dir"] = "raw", "store", "run"
    (folder / "shop.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def test_keys_are_those_of_the_config() -> None:
    found = {".".join(path) for path, _ in key_paths()}
    assert {"train.lr", "data.sequences.times", "data.demo.users", "data.features.fuzzed.max_tokens"} <= found
