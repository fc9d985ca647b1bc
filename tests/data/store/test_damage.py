"""Bytes that changed while the manifest did not: read as what they were, or refused in one line by their hashes.

Never another exception, a hang, or data that nobody wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fmrl_dist import train
from fmrl_dist.base.errors import EXIT_USER_ERROR
from tests.fixtures.commands import run_main
from tests.fixtures.damaged_stores import hash_read, is_refused_by_verify, outcome, write_files
from tests.fixtures.training import refusal

DAMAGED = 250

pytestmark = [pytest.mark.filterwarnings("error::ResourceWarning"), pytest.mark.usefixtures("no_flush")]


def damage(files: dict[str, bytes], generator: np.random.Generator) -> tuple[str, dict[str, bytes]]:
    """One file changed, and what was done to it."""
    name = str(generator.choice(sorted(files)))
    data = bytearray(files[name])
    place = int(generator.integers(len(data)))
    kind = str(
        generator.choice(["flip", "flip", "flip", "cut", "empty", "delete", "swap", "append", "zeros", "double"])
    )
    changed = dict(files)
    if kind == "flip":
        data[place] ^= 1 << int(generator.integers(8))
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "append":
        data += generator.bytes(700)
    elif kind == "zeros":
        data[place : place + 600] = bytes(len(data[place : place + 600]))
    elif kind == "double":
        data *= 2
    elif kind == "swap":
        other = str(generator.choice(sorted(set(files) - {name})))
        changed[other], data = files[name], bytearray(files[other])
    changed[name] = bytes(data)
    if kind == "delete":
        del changed[name]
    return f"{kind} {name} at byte {place}", changed


def test_damaged_files(shop: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    expected, refused = hash_read(shop.parent / "store"), 0
    for seed in range(DAMAGED):
        what, changed = damage(files, np.random.default_rng(seed))
        folder = write_files(tmp_path / "store", changed)
        found = outcome(folder)
        assert found == expected or found.startswith("refused: "), f"seed {seed}: {what}: read as something else"
        refused += found != expected
        if any(changed.get(name) != data for name, data in files.items() if name.endswith(".tar")):
            assert is_refused_by_verify(folder), f"seed {seed}: {what}"
    assert refused > DAMAGED / 3


@pytest.mark.parametrize("seed", range(6))
def test_the_training_command_refuses_damage(seed: int, shop: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """Whatever part that training reads is damaged: exit code 2, one line, and no run that looks finished."""
    generator = np.random.default_rng(seed)
    name = str(generator.choice([name for name in sorted(files) if name.endswith(".tar")]))
    folder = write_files(tmp_path / "store", files | {name: files[name][: len(files[name]) // 3]})
    words = ["--config", shop, "--store.path", folder, "--run.dir", tmp_path / "run", "--train.epochs", 1]
    assert name in refusal(train.main, *words)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    verified = run_main("shards.verify", folder)
    assert verified.code == EXIT_USER_ERROR and verified.stderr.startswith(f"error: store {folder} has ")
