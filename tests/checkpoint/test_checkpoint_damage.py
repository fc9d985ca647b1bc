"""Checkpoints: complete whenever a process is killed, refused in one line when damaged, never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.folder import (
    Checkpoint,
    TrainState,
    load_checkpoint,
)
from tests.fixtures.checkpoints import (
    assert_same_bits,
    flip,
    make_training,
    names_in,
    reseal,
    save_step_3,
    save_training,
    train,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a run whose only checkpoint is of step 3."""
    return save_step_3(tmp_path / "run" / "checkpoints")


def change_record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage that applies ``change`` to the record in state.json."""

    def damage(path: Path) -> None:
        record = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(change(record)))
        reseal(path)

    return damage


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    """Damage that keeps the first (or, negative, all but the last) bytes of a file."""

    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:keep])

    return damage


def replace_by_folder(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {name: value for name, value in record.items() if name != key}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "model missing": lambda path: (path / "model.safetensors").unlink(),
    "optimizer missing": lambda path: (path / "optimizer.safetensors").unlink(),
    "model empty": truncate("model.safetensors", 0),
    "model bit flipped": lambda path: flip(path / "model.safetensors", -9),
    "optimizer bit flipped": lambda path: flip(path / "optimizer.safetensors", -9),
    "record digit changed": lambda path: flip(
        path / "state.json", (path / "state.json").read_bytes().index(b'"step": 3') + 8
    ),
    "model header cut": truncate("model.safetensors", 50),
    "model end cut": truncate("model.safetensors", -1),
    "optimizer end cut": truncate("optimizer.safetensors", -100),
    "model is not safetensors": lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 4096),
    "model is a folder": replace_by_folder("model.safetensors"),
    "record empty": truncate("state.json", 0),
    "record cut": truncate("state.json", 60),
    "record not UTF-8": lambda path: (path / "state.json").write_bytes(b'{"\xff": 1}'),
    "record is a list": change_record(lambda record: [record]),
    "record is a number": change_record(lambda record: 3),
    "record has no version": change_record(without("checkpoint_version")),
    "record has no state": change_record(without("state")),
    "record has a null state": change_record(lambda record: record | {"state": None}),
    "record has half a state": change_record(lambda record: record | {"state": {"step": 3}}),
    "record has no config": change_record(without("config")),
    "record has no manifest hash": change_record(without("manifest_sha256")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_clear_line(saved: Path, damage: Callable[[Path], object]) -> None:
    damage(saved)
    with pytest.raises(UserError) as caught:
        load_checkpoint(saved)
    assert re.fullmatch(rf"checkpoint {re.escape(str(saved))} is damaged \(.+\); use another, .*", str(caught.value))


def test_another_version_names_both(saved: Path) -> None:
    change_record(lambda record: record | {"checkpoint_version": 9})(saved)
    with pytest.raises(UserError, match="has version 9; expected 3$"):
        load_checkpoint(saved)


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("writer", ["pickle", "torch.save"])
def test_nothing_is_unpickled(saved: Path, tmp_path: Path, name: str, writer: str) -> None:
    bomb = Bomb(tmp_path / "exploded")
    if writer == "pickle":
        (saved / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"state": bomb}, saved / name)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(saved)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists()  # the bomb works


def test_unknown_tensors_do_not_pass_for_a_model(saved: Path) -> None:
    """Loading reads all tensors; the model refuses those that are not its own."""
    save_file({"another": torch.zeros(2)}, saved / "model.safetensors")
    reseal(saved)
    with pytest.raises(RuntimeError, match="another"):
        make_training()[0].load_state_dict(load_checkpoint(saved).model)


# A process is killed with SIGKILL while saving: a forked child, which need not import torch.


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory if available: SIGKILL loses nothing that is in the page cache, so no disk is needed."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def fork(child: Callable[[], None]) -> int:
    """Run ``child`` in a forked process; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def die_at_change(number: int) -> None:
    """Kill this process just before its ``number``-th change of the file system."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def check_run(folder: Path, steps: set[int]) -> Checkpoint:
    """Both links point to complete checkpoints: latest to one of ``steps``, best to the best known or a later one."""
    best, latest = load_checkpoint(folder / "best"), load_checkpoint(folder / "latest")
    assert latest.state.step in steps, (latest.state, steps)
    assert best.state.step == best.state.best_step >= latest.state.best_step
    return latest


@pytest.mark.parametrize("state", [TrainState(2, 0.5, 2), TrainState(1, 0.2, 1, 1)], ids=["new best", "same step"])
def test_a_save_killed_at_any_change_leaves_a_whole_run(memory: Path, state: TrainState) -> None:
    """Killed before its first, second, … change of the file system, until it succeeds."""
    model, optimizer = make_training()
    train(model, optimizer, 0, 1)
    before = memory / "before"
    save_training(before, TrainState(1, 0.1, 1), model, optimizer)
    for number in range(1, 100):
        run = memory / str(number)
        shutil.copytree(before, run, symlinks=True)

        def save(number: int = number, run: Path = run) -> None:
            die_at_change(number)
            save_training(run, state, model, optimizer)

        status = os.waitpid(fork(save), 0)[1]
        check_run(run, {1, state.step})
        for new in set(run.glob("step-*")) - {run / "step-00000001"}:
            assert load_checkpoint(new).state == state  # complete or absent, linked or not
        save_training(run, state, model, optimizer)  # the run continues, and leaves nothing behind
        assert check_run(run, {state.step}).state == state
        assert len(names_in(run)) == 3, names_in(run)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert 10 < number < 99, number


def test_saves_killed_at_any_time_leave_a_whole_run(memory: Path) -> None:
    """A process that saves without pause, killed ten times; the next one continues from what it left."""
    model, optimizer = make_training()
    train(model, optimizer, 0, 1)
    save_training(memory, TrainState(1, 0.0, 1), model, optimizer)

    def save_forever() -> None:
        state = load_checkpoint(memory / "latest").state
        while True:
            state.step += 1
            if state.step % 3 == 0:
                state.best_value, state.best_step = float(state.step), state.step
            save_training(memory, state, model, optimizer)

    for round_number in range(10):
        step = load_checkpoint(memory / "latest").state.step
        pid = fork(save_forever)
        while int((memory / "latest").resolve().name.split("-")[1]) < step + 2:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the saving process has ended"
            time.sleep(0.001)
        time.sleep(0.003 * round_number)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        latest = check_run(memory, set(range(step + 2, 100_000)))
        assert_same_bits(latest.model, model.state_dict())
