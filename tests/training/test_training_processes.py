"""Training and evaluation in two gloo processes, and through the real launcher."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from fmrl_dist import evaluate
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.run_folder import locked
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.order import Order
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.training.steps import loop
from fmrl_dist.training.steps.agreement import StepResult, agree, stop_if_not_finite
from fmrl_dist.training.steps.learning import seed_dropout
from tests.fixtures.checkpoints import reseal
from tests.fixtures.engines import LAUNCHERS, refused_on_each_rank
from tests.fixtures.processes import REPOSITORY, clean_environment, launch, run_processes
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    contents,
    evaluation,
    figures,
    make_shop,
    records,
    run_here,
    run_module,
    train_here,
)

pytestmark = pytest.mark.multiproc

NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0"]
STOP = STEPS_PER_EPOCH + 5
TWO_HALVES = ["--eval.every_steps", str(STOP), "--train.epochs", "2"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("processes"))


HOPS = (STEPS_PER_EPOCH - 3, 2 * STEPS_PER_EPOCH - 1)  # steps at which the number of processes changes


def train_until(config: str, folder: str, max_steps: int) -> None:
    """Train part of a run without dropout, up to ``max_steps``; 0: to the end."""
    words = ["--resume", "auto", "--train.max_steps", max_steps]
    train_here(Path(config), Path(folder), *NO_DROPOUT, *words)


def train_on_each_rank(config: str, folder: str) -> dict[str, Any]:
    """Several runs, one after the other, in one process group; returns each rank's errors from those that fail."""
    root = Path(folder)
    said: dict[str, Any] = {"drawn": draw(dist.get_rank())}
    train_here(Path(config), root / "plain", *NO_DROPOUT)
    train_here(Path(config), root / "begun-by-one", *NO_DROPOUT, "--resume", "auto")
    train_here(Path(config), root / "whole", *TWO_HALVES)
    train_here(Path(config), root / "halved", *TWO_HALVES, "--train.max_steps", STOP)
    train_here(Path(config), root / "halved", *TWO_HALVES, "--resume", "auto")
    run_here(evaluate.main, ["--checkpoint", root / "plain", "--split", "valid", "--threads", 1])
    train_here(Path(config), root / "broken", "--train.max_steps", 2)
    dist.barrier()
    if dist.get_rank() == 0:
        file = root / "broken" / "checkpoints" / "latest" / "model.safetensors"
        save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
        reseal(file.parent)
        said["before"] = digest(root / "broken")
    dist.barrier()
    try:
        train_here(Path(config), root / "broken", "--resume", "auto")
    except UserError as error:
        said["broken"] = str(error)
    dist.barrier()
    said["after"] = digest(root / "broken")
    try:
        train_here(Path(config), root / "lanes", "--train.lanes", 1)
    except UserError as error:
        said["lanes"] = str(error)
    try:
        stop_where_one_loss_is_infinite()
    except UserError as error:
        said["infinite"] = str(error)
    return said


def stop_where_one_loss_is_infinite() -> None:
    """Rank 1's loss is infinite in step 5, while every gradient is finite."""
    runtime = start_runtime(1, lanes=2)
    empty = torch.empty(0, dtype=torch.int64)
    batch = Packed(torch.tensor([7, 9]), empty, torch.tensor([0]), torch.empty(0, dtype=torch.bool), empty)
    for step, loss in ((4, 2.0), (5, math.inf if runtime.rank == 1 else 2.0)):
        result = StepResult(torch.tensor([1.0, loss]), torch.tensor(1.0), 0.1, [batch])
        agreed = agree(runtime, [batch], [], False, StopRequest(), result)
        stop_if_not_finite(runtime, step, result, agreed.num_not_finite)


def digest(run: Path) -> list[str]:
    """Names and sizes of a run's checkpoint and log files."""
    kept = [path for path in contents(run) if path.startswith(("checkpoints", "metrics"))]
    return sorted(f"{path} {(run / path).stat().st_size}" for path in kept)


@pytest.fixture(scope="module")
def two(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The runs of two ranks: their folder, and each rank's errors."""
    folder = tmp_path_factory.mktemp("two")
    train_here(shop, folder / "begun-by-one", *NO_DROPOUT, "--train.max_steps", 2 * STEPS_PER_EPOCH)
    return folder, run_processes(2, train_on_each_rank, str(shop), str(folder), timeout_s=200)


@pytest.fixture(scope="module")
def one(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without dropout."""
    return train_here(shop, tmp_path_factory.mktemp("one") / "plain", *NO_DROPOUT)


def test_one_rank_is_empty_in_the_last_step(shop: Path) -> None:
    """The tests below rely on this: the ranks' shares differ, and at an epoch's end one rank has no users."""
    order = Order([b.count for b in Store.open(shop.parent / "store").manifest.splits["train"]], 16, 16, 0)
    assert order.steps_per_epoch == STEPS_PER_EPOCH
    users = [sum(len(order.batch(0, STEPS_PER_EPOCH - 1, lane)) for lane in range(rank, 16, 2)) for rank in (0, 1)]
    assert users == [0, 1]


@pytest.mark.parametrize("run", ["plain", "begun-by-one"])
def test_two_processes_train_as_one(run: str, one: Path, two: tuple[Path, list[dict[str, Any]]]) -> None:
    alone, together = records(one), records(two[0] / run)
    assert len(alone) == 24
    for expected, found in zip(alone, together, strict=True):
        for key in ("step", "epoch", "lr"):
            assert found[key] == expected[key]
        for key in ("loss", "loss@4", "loss@8", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (found["step"], key)
    assert evaluation(two[0] / run) == evaluation(one)
    assert records(two[0] / run, "valid") == records(one, "valid")


def test_four_processes_train_as_one(shop: Path, one: Path, tmp_path: Path) -> None:
    run_processes(4, train_until, str(shop), str(tmp_path / "four"), 0)
    for expected, found in zip(records(one), records(tmp_path / "four"), strict=True):
        for key in ("loss", "loss@4", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (found["step"], key)
    assert evaluation(tmp_path / "four") == evaluation(one)


def test_two_then_one_then_two_processes(shop: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "hopping"
    run_processes(2, train_until, str(shop), str(run), HOPS[0])
    train_until(str(shop), str(run), HOPS[1])
    run_processes(2, train_until, str(shop), str(run), 0)
    for expected, found in zip(records(one), records(run), strict=True):
        assert found["step"] == expected["step"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), found["step"]
    assert evaluation(run)["sizes"] == evaluation(one)["sizes"]


SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "mixed", "--loss.num_negatives", 7]


def test_micro_batches_without_lanes_have_no_negatives(shop: Path, tmp_path: Path) -> None:
    """More micro-batches than lanes of a rank, each lane with its own negatives."""
    words = [*NO_DROPOUT, *map(str, SAMPLED), "--train.epochs", 1]
    one = train_here(shop, tmp_path / "one", *words)
    run_processes(3, train_in_pieces, str(shop), str(tmp_path / "three"), [*words, "--train.micro_batches", 7])
    for expected, found in zip(records(one), records(tmp_path / "three"), strict=True):
        for key in ("loss", "loss@4", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (found["step"], key)


@pytest.mark.parametrize("pieces", [3, 16])
def test_micro_batches_train_as_the_whole_batch(pieces: int, shop: Path, one: Path, tmp_path: Path) -> None:
    """Micro-batches by lanes, some empty; in one process and in two, whose gradients are averaged once per step."""
    words = [*NO_DROPOUT, "--train.micro_batches", pieces]
    run_processes(2, train_in_pieces, str(shop), str(tmp_path / "two"), words)
    train_here(shop, tmp_path / "one", *words)
    for run in ("one", "two"):
        for expected, found in zip(records(one), records(tmp_path / run), strict=True):
            for key in ("loss", "loss@4", "grad_norm"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), (run, found["step"], key)
        assert evaluation(tmp_path / run) == evaluation(one)


def train_in_pieces(config: str, folder: str, words: list[str]) -> None:
    train_here(Path(config), Path(folder), *words)


def test_two_processes_evaluate_as_one(two: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same checkpoint, digit for digit."""
    run = two[0] / "plain"
    together = (run / "evaluation-valid.json").read_bytes(), (run / "evaluation.json").read_bytes()
    run_here(evaluate.main, ["--checkpoint", run, "--split", "valid", "--threads", 1])
    run_here(evaluate.main, ["--checkpoint", run, "--split", "test", "--threads", 1])
    assert ((run / "evaluation-valid.json").read_bytes(), (run / "evaluation.json").read_bytes()) == together


def test_two_processes_resume_bit_for_bit(two: tuple[Path, list[dict[str, Any]]]) -> None:
    halved, whole = two[0] / "halved", two[0] / "whole"
    assert figures(halved) == figures(whole)
    assert len(records(whole)) == 16
    assert evaluation(halved) == evaluation(whole)
    for file in ("model", "optimizer"):
        left, right = (load_file(run / "checkpoints" / "latest" / f"{file}.safetensors") for run in (halved, whole))
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_each_rank_and_step_draws_its_own_dropout(two: tuple[Path, list[dict[str, Any]]]) -> None:
    drawn = {value for said in two[1] for value in said["drawn"]}
    assert len(drawn) == 2 * 3 * 2


def draw(rank: int) -> list[float]:
    """The first number that dropout would draw, for several seeds and steps."""
    drawn = []
    for seed, step in itertools.product((0, 1, 2), (0, 1)):
        seed_dropout(seed, step, rank)
        drawn.append(torch.rand(()).item())
    return drawn


def test_all_ranks_stop_at_a_loss_that_is_not_finite(two: tuple[Path, list[dict[str, Any]]]) -> None:
    said = two[1]
    for rank in (0, 1):
        assert said[rank]["broken"].startswith(f"step 3, rank {rank}: loss is not finite; users of the batch: [")
    assert said[0]["after"] == said[0]["before"]
    assert {line["step"] for line in figures(two[0] / "broken")} == {1, 2}


def test_more_processes_than_lanes(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for said in two[1]:
        assert said["lanes"].startswith("2 processes share 1 lanes; raise train.lanes")
    assert not (two[0] / "lanes").exists()


def test_infinite_loss_on_one_rank_stops_the_other(two: tuple[Path, list[dict[str, Any]]]) -> None:
    said = [rank["infinite"] for rank in two[1]]
    assert said[0].startswith("step 5, rank 0: another rank's loss is not finite. ")
    assert said[1].startswith("step 5, rank 1: loss is not finite; users of the batch: [7, 9]")


def test_a_second_run_in_the_same_folder_is_refused(shop: Path, tmp_path: Path) -> None:
    """While the first one trains, undisturbed; once it is killed, a new one may start although its workers live on."""
    run = tmp_path / "run"
    words = ["--resume", "auto", "--train.epochs", "200"]
    command = [sys.executable, "-m", "fmrl_dist.train", "--config", str(shop), "--run.dir", str(run), *words]
    with subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stdout=subprocess.DEVNULL) as first:
        try:
            wait_for_a_checkpoint(run, first)
            before = (run / "config.yaml").stat().st_mtime_ns
            said = run_processes(2, refused_on_each_rank, str(shop), str(run), words)
            assert f"error: process {first.pid} of {socket.gethostname()} is training into {run}; wait" in said[0]
            assert "error: another run is training into" in said[1]
            assert first.poll() is None and (run / "config.yaml").stat().st_mtime_ns == before
        finally:
            first.kill()
    train_here(shop, run, *words, "--train.max_steps", records(run)[-1]["step"] + 1)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_another_one_overtook_is_refused(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """It has looked for a checkpoint when another process trains in its folder, to the end: its steps would be lost."""
    run, words = tmp_path / "run", ["--resume", "auto", "--train.epochs", "2", "--train.max_steps"]
    if begun:
        train_here(shop, run, *words, 2)
    prepare = loop.prepare_learner

    def overtaken(*arguments: Any) -> Any:
        done = run_module("fmrl_dist.train", "--config", shop, "--run.dir", run, *words, 4)
        assert done.returncode == 0, done.stderr
        before.update(contents(run))
        return prepare(*arguments)

    before: dict[str, Any] = {}
    monkeypatch.setattr(loop, "prepare_learner", overtaken)
    with pytest.raises(UserError, match="another run has trained into .* while this one started; go on from there"):
        train_here(shop, run, *words, 6)
    assert before and contents(run) == before


def test_a_stale_link_to_the_latest_checkpoint_is_no_other_run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system may show one for a minute, to a checkpoint that is gone."""
    run, words = tmp_path / "run", ["--resume", "auto", "--train.epochs", "2", "--train.max_steps"]
    train_here(shop, run, *words, 2)
    latest = run / "checkpoints" / "latest"
    target, prepare = latest.readlink(), loop.prepare_learner

    def seen_at_last(*arguments: Any) -> Any:
        latest.unlink()
        latest.symlink_to(target)
        return prepare(*arguments)

    latest.unlink()
    latest.symlink_to("gone")
    monkeypatch.setattr(loop, "prepare_learner", seen_at_last)
    train_here(shop, run, *words, 4)
    assert [record["step"] for record in records(run)][-1] == 4


def test_a_restarted_job_goes_on_where_its_earlier_life_has_ended(shop: Path, tmp_path: Path) -> None:
    """Which still trains when SLURM restarts the job elsewhere, and saves as it is ended."""
    run = tmp_path / "run"
    words = ["--config", str(shop), "--run.dir", str(run), "--resume", "auto", "--train.epochs", "2000"]
    command = [sys.executable, "-m", "fmrl_dist.train", *words]
    options: dict[str, Any] = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=clean_environment(), **options) as first:
        wait_for_a_checkpoint(run, first)
        environment = clean_environment() | {"SLURM_RESTART_COUNT": "1"}
        with subprocess.Popen(command, env=environment, **options) as second:
            try:
                time.sleep(8)  # by now it waits
                assert second.poll() is None
                first.terminate()
                assert "stopped by a signal" in first.communicate()[0]
                saved = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["state"]["step"]
                assert second.stdout is not None
                (began,) = itertools.islice((line for line in second.stdout if "from step" in line), 1)
                assert f"from step {saved} to at most" in began
            finally:
                first.kill()
                second.kill()


def test_a_file_system_without_locks_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Lustre without -o flock; and a lock that a dead machine still holds."""
    answers = [OSError(errno.ENOSYS, "Function not implemented")]

    def lockf(*_: object) -> None:
        if answers:
            raise answers.pop(0)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        assert "cannot be locked (Function not implemented): nothing prevents a second run" in capsys.readouterr().out
    answers += [BlockingIOError(errno.EAGAIN, "taken"), PermissionError(errno.EACCES, "taken")]
    with pytest.raises(UserError, match="another process is training into"), locked(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers += [BlockingIOError(errno.EAGAIN, "taken")]
    with locked(tmp_path):
        assert answers == [] and capsys.readouterr().out == ""


def wait_for_a_checkpoint(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_launcher_with_two_processes(shop: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["-m", "fmrl_dist.train", "--config", str(shop), "--run.dir", str(run), *NO_DROPOUT]
    result = launch(2, words, config_file=LAUNCHERS / "cpu-2.yaml")
    assert result.returncode == 0, result.stderr
    assert "2 process(es), engine multi_cpu, device cpu" in result.stdout
    assert result.stdout.count("whole catalogue ranked") == 1, "only one rank prints"
    for found, expected in zip(records(run), records(one), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert evaluation(run) == evaluation(one)


def test_launcher_with_one_process_and_its_precision(shop: Path, tmp_path: Path) -> None:
    words = ["-m", "fmrl_dist.train", "--config", str(shop), "--train.max_steps", "3", "--run.dir"]
    result = launch(1, ["--mixed_precision", "bf16", *words, tmp_path / "launched"])
    assert result.returncode == 0, result.stderr
    assert "1 process(es), engine no, device cpu, 1 thread(s) each, precision bf16" in result.stdout
    here = train_here(shop, tmp_path / "here", "--train.max_steps", 3, "--train.precision", "bf16")
    assert figures(tmp_path / "launched") == figures(here)
    assert evaluation(tmp_path / "launched") == evaluation(here)


def test_launcher_that_starts_one_process_instead_of_two(shop: Path, tmp_path: Path) -> None:
    words = ["-m", "fmrl_dist.train", "--config", str(shop), "--run.dir", str(tmp_path / "run")]
    result = launch(1, ["--cpu", "--num_processes", "2", *words])
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "several processes were requested but one was started (accelerate launch --cpu does that silently)" in line
    assert not (tmp_path / "run").exists()
