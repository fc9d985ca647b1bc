"""``launch.submit`` without a SLURM: what it would submit, what it refuses, and the whole chain on this machine."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import psutil
import pytest

from fmrl_dist.base.errors import UserError
from launch.slurm.jobs import Script, script_options, submit
from launch.submit import main, parse_sbatch
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import contents, evaluation, refusal, run_module
from tests.launch.slurm.test_launch import demo_words

GOLDEN = Path(__file__).parent / "golden"  # written by hand from what a review has found right; no test writes them


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_dry_run_prints_the_golden_batch_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--config", "configs/demo.yaml", "--train.epochs", "3", "--run.dir", str(tmp_path / "demo")]
    sbatch = ["partition=gpu", "time=60", "train:nodes=4", "train:gpus-per-node=8", "train:time=12:00:00", "exclusive"]
    options = [word for value in sbatch for word in ("--sbatch", value)]
    main([*words, "--parts", "3", "--sizes", "8,64", *options, "--dry-run"])
    text = capsys.readouterr().out.replace(str(tmp_path), "RUNS").replace(shlex.quote(sys.executable), "PYTHON")
    assert text == (GOLDEN / "chain.txt").read_text()
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_scripts_are_the_golden_ones() -> None:
    found = {path.name: script_options(path) for path in sorted(Path("launch").glob("*.slurm"))}
    assert found == json.loads((GOLDEN / "script_options.json").read_text())


@pytest.mark.parametrize("line", ["#SBATCH -p gpu", "#SBATCH --time=5  # minutes", "#SBATCH --time 5", "#SBATCH"])
def test_line_of_a_script_that_is_not_understood(line: str, tmp_path: Path) -> None:
    (tmp_path / "own.slurm").write_text(f"#!/bin/bash\n#SBATCH --nodes=2\n\n{line}\n")
    with pytest.raises(UserError, match=r"own\.slurm, line 4: '#SBATCH.*' is not understood; expected #SBATCH --name"):
        script_options(tmp_path / "own.slurm")


def test_blank_lines_and_comments_stand_between_options_and_a_command_ends_them(tmp_path: Path) -> None:
    lines = ["#!/bin/bash", "", "#SBATCH --nodes=2", " ", "# Why.", "#SBATCH --exclusive ", "true", "#SBATCH -p gpu"]
    (tmp_path / "own.slurm").write_text("\n".join(lines))
    assert script_options(tmp_path / "own.slurm") == {"nodes": "2", "exclusive": ""}


def test_options_of_sbatch_for_all_stages_and_for_one() -> None:
    options = parse_sbatch(["time=60", "requeue", "train:time=1-00:00:00", "join:mem=1G", "comment=a=b"])
    of_all = {"time": "60", "requeue": "", "comment": "a=b"}
    assert options["train"] == of_all | {"time": "1-00:00:00"}
    assert options["join"] == of_all | {"mem": "1G"}
    assert options["shards"] == options["evaluate"] == options["export"] == of_all


def test_local_dry_run_prints_commands(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cluster", "local", "--stages", "train,evaluate,export", "--sizes", "16", "--processes", "2"]
    main([*words, "--config", "configs/demo.yaml", "--train.threads", "2", "--dry-run"])
    python, launcher = f"{sys.executable} -m", Path(sys.executable).with_name("accelerate-launch")
    assert capsys.readouterr().out.splitlines() == [
        f"{launcher} --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no "
        "--multi_gpu --main_process_port 0 "
        "-m fmrl_dist.train --config configs/demo.yaml --train.threads 2 --resume auto",
        f"{python} fmrl_dist.evaluate --checkpoint runs/demo --threads 2",
        f"{python} fmrl_dist.export --checkpoint runs/demo --size 16 --overwrite",
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--train.epoch", "3"], "unknown config key 'train.epoch'; did you mean 'epochs'?"),
        (["--stages", "train,shards"], "--stages is 'train,shards'; expected some of shards,train,evaluate,export"),
        (["--stages", ""], "--stages is ''; expected some of shards,train,evaluate,export, in this order"),
        (["--stages", "evaluate"], "run has no checkpoints; begin with train"),
        (["--sizes", "8,12"], "--sizes [12] are not trained; choose of [8, 16, 32, 64, 128]"),
        (["--sizes", "all"], "--sizes is 'all'; expected numbers such as 8,64"),
        (["--parts", "0"], "--parts is 0; expected at least 1"),
        (["--sbatch=--time=3"], "--sbatch --time=3: expected [STAGE:]OPTION[=VALUE]"),
        (["--sbatch", "tarin:time=3"], "--sbatch tarin:time=3: expected [STAGE:]OPTION[=VALUE]"),
        (["--sbatch", "array=0-3"], "--sbatch array=0-3: the chain sets array itself; leave it out"),
        (["--cluster", "local", "--sbatch", "time=3"], "--sbatch is for SLURM"),
        (["--cluster", "local", "--cancel"], "--cancel is for SLURM"),
        (["--status"], "no jobs were submitted"),
        (["--cancel"], "no jobs were submitted"),
        ([], "no SLURM here: sbatch, scancel, squeue, srun, sacct not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_refused_with_one_line_and_nothing_is_written(
    words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert complaint in refusal(main, "--run.dir", tmp_path / "run", *words)
    assert list(tmp_path.iterdir()) == []


def test_no_submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)  # how Python marks what is not there
    expected = "error: submitit is not installed; install it with pip install -e '.[slurm]'"
    assert refusal(main, "--dry-run") == refusal(main) == expected


def test_only_at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(main, "--dry-run") == f"error: {tmp_path} is not the repository's root; submit from there"


def test_a_local_failure_ends_the_chain_with_the_end_of_its_log(tmp_path: Path) -> None:
    words = [*demo_words(tmp_path, "run"), "--data.items.id", "number"]
    result = run_module("launch.submit", *words, "--cluster", "local")
    assert (result.returncode, result.stderr) == (1, "")
    (log,) = (tmp_path / "run.jobs").glob("*_log.out")
    assert f"shards failed: {sys.executable} -m shards.build" in result.stdout
    assert f"its log is {log} and ends with" in result.stdout
    assert "has no column 'number'" in result.stdout
    assert "train" not in result.stdout.replace("--train.", "").replace("shards.build", "")
    assert not (tmp_path / "run").exists()


def test_a_cancelled_local_job_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    command = ("bash", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    (job,) = submit([Script("", (), command, {})], "local", tmp_path / "jobs", "name", {})
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleeper = psutil.Process(int((tmp_path / "pid").read_text()))
    job.cancel()
    sleeper.wait(30)
    assert not psutil.pid_exists(sleeper.pid)


@pytest.mark.slow
def test_the_chain_on_this_machine_and_once_more(tmp_path: Path) -> None:
    """The second time the store is kept, the run is found finished, and the evaluation is the same, byte for byte."""
    words = [*demo_words(tmp_path, "run"), "--cluster", "local", "--sizes", "8,32"]
    result = run_module("launch.submit", *words, "--stages", "shards,train")
    assert result.returncode == 0, result.stdout + result.stderr
    store, run = contents(tmp_path / "store"), tmp_path / "run"
    by_training = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    result = run_module("launch.submit", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done in") == 5
    assert contents(tmp_path / "store") == store
    assert (run / "evaluation.json").read_bytes() == by_training
    assert sorted(path.name for path in run.glob("export-*")) == ["export-32", "export-8"]
    assert list(evaluation(run)["sizes"]) == ["8", "16", "32", "64", "128"]
