"""``launch.submit`` without SLURM: what it would submit, what it refuses, and the whole chain on this machine."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmrl_dist.base.errors import UserError
from launch.local.processes import is_alive
from launch.slurm.follow import fail
from launch.slurm.jobs import script_options
from launch.submit import main
from tests.fixtures.demo_runs import NUM_STEPS, SIZES, demo_arguments, ignoring, paused, trainers
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import contents, evaluation, records, refusal, run_module

GOLDEN = Path(__file__).parent / "golden"  # written by hand after a review; no test writes them


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


def test_a_store_in_parts_is_an_array_and_the_job_that_builds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--config", "configs/demo.yaml", "--run.dir", str(tmp_path / "demo"), "--stages", "shards"]
    main([*words, "--encode-parts", "4", "--sbatch", "encode:gpus-per-node=1", "--dry-run"])
    encode, shards = capsys.readouterr().out.split("### shards, 1 job\n")
    assert encode.startswith("### encode, 4 jobs\n### bash launch/shards.slurm configs/demo.yaml --run.dir ")
    assert "#SBATCH --array=0-3%4\n" in encode and "#SBATCH --gpus-per-node=1\n" in encode
    assert "#SBATCH --dependency=afterok:ENCODE_JOB\n" in shards and "--array" not in shards


def test_options_of_the_scripts_are_the_golden_ones() -> None:
    found = {path.name: script_options(path) for path in sorted(Path("launch").glob("*.slurm"))}
    assert found == json.loads((GOLDEN / "script_options.json").read_text())


@pytest.mark.parametrize("line", ["#SBATCH -p gpu", "#SBATCH --time=5  # minutes", "#SBATCH --time 5", "#SBATCH"])
def test_a_line_of_a_script_in_another_form(line: str, tmp_path: Path) -> None:
    (tmp_path / "own.slurm").write_text(f"#!/bin/bash\n#SBATCH --nodes=2\n\n{line}\n")
    with pytest.raises(UserError, match=r"own\.slurm, line 4: cannot read '#SBATCH.*'; expected #SBATCH --name"):
        script_options(tmp_path / "own.slurm")


def test_blank_lines_and_comments_may_separate_options_and_a_command_ends_them(tmp_path: Path) -> None:
    lines = ["#!/bin/bash", "", "#SBATCH --nodes=2", " ", "# Why.", "#SBATCH --exclusive ", "true", "#SBATCH -p gpu"]
    (tmp_path / "own.slurm").write_text("\n".join(lines))
    assert script_options(tmp_path / "own.slurm") == {"nodes": "2", "exclusive": ""}


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
        (["--train.epoch", "3"], "unknown config key 'train.epoch'; did you mean 'train.epochs'?"),
        (["--stages", "train,shards"], "--stages is 'train,shards'; expected some of shards,train,evaluate,export"),
        (["--stages", ""], "--stages is ''; expected some of shards,train,evaluate,export, in this order"),
        (["--stages", "evaluate"], "run has no checkpoints; start with train"),
        (["--sizes", "8,12"], "--sizes [12] are not trained; choose from [8, 16, 32, 64, 128]"),
        (["--sizes", "all"], "--sizes is 'all'; expected numbers such as 8,64"),
        (["--parts", "0"], "--parts is 0; expected at least 1"),
        (["--encode-parts", "0"], "--encode-parts is 0; expected a number from 1 to 10000"),
        (["--encode-parts", "9" * 30], "9; expected a number from 1 to 10000"),
        (["--cluster", "local", "--encode-parts", "2"], "--encode-parts needs SLURM"),
        (["--sbatch", "tarin:time=3"], "--sbatch tarin:time=3: expected [STAGE:]OPTION[=VALUE]"),
        (["--cluster", "local", "--sbatch", "time=3"], "--sbatch needs SLURM"),
        (["--cluster", "local", "--cancel"], "--cancel needs SLURM"),
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
    monkeypatch.setitem(sys.modules, "submitit", None)  # how Python marks a module that is missing
    expected = "error: submitit is not installed; install it with pip install -e '.[slurm]'"
    assert refusal(main, "--dry-run") == refusal(main) == expected


def test_only_at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(main, "--dry-run") == f"error: {tmp_path} is not the repository's root; submit from there"


def test_a_local_failure_ends_the_chain_with_the_end_of_its_log(tmp_path: Path) -> None:
    arguments = [*demo_arguments(tmp_path, "run"), "--data.items.id", "number"]
    result = run_module("launch.submit", *arguments, "--cluster", "local")
    assert (result.returncode, result.stderr) == (1, "")
    log = tmp_path / "run.jobs" / "run-shards_0_log.out"
    assert f"shards failed: exit code 2: {sys.executable} -m shards.build" in result.stdout
    assert f"its log is {log} and ends with" in result.stdout
    assert "has no column 'number'" in result.stdout
    assert [path.name for path in (tmp_path / "run.jobs").iterdir()] == [log.name]
    assert not (tmp_path / "run").exists()


def test_the_cause_of_a_failure_is_shown_before_the_traceback_of_a_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("start\nerror: block 3 is damaged\nTraceback\n" + "".join(f"line {n}\n" for n in range(25)))
    with pytest.raises(SystemExit) as ended:
        fail("train", "job 7 is FAILED", log)
    assert ended.value.code == 1
    first, *shown = capsys.readouterr().out.splitlines()
    assert first == f"train failed: job 7 is FAILED; its log is {log} and ends with"
    assert shown == ["    error: block 3 is damaged", "    …", *(f"    line {n}" for n in range(5, 25))]
    log.write_text("error: no store\n")
    for path, end in ((log, "error: no store"), (tmp_path / "none", "(no log: the job has not started)")):
        with pytest.raises(SystemExit):
            fail("train", "job 7 is FAILED", path)
        assert capsys.readouterr().out.splitlines()[1:] == [f"    {end}"]


def test_an_argument_of_several_lines_stays_a_comment(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", "--stages", "train", "--data.text_separator", "a\nintruder\nb"])
    found = [line for line in capsys.readouterr().out.splitlines() if "intruder" in line]
    assert found and all(line.startswith("### ") for line in found)


def test_two_chains_of_one_run_are_not_started_at_once(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from fmrl_dist.base.locks import only_writer\n"
    script += "with only_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run.jobs"],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        complaint = refusal(main, *demo_arguments(tmp_path, "run"), "--cluster", "local")
        assert f"process {other.pid} of " in complaint and f"is writing {tmp_path}/run.jobs" in complaint
        other.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_chain_does_not_go_on_after_a_training_that_was_stopped(tmp_path: Path) -> None:
    """A trainer that gets TERM saves and exits with 0."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch.submit", *demo_arguments(tmp_path, "run"), "--cluster", "local"]
    with subprocess.Popen(
        [*command, "--sizes", "8"],
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        with paused(run, 20):
            for trainer in trainers(run):
                trainer.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"train failed: it was stopped before {run} was finished; run this again" in output
    assert "evaluate" not in output
    assert not (run / "evaluation.json").exists() and not (run / "export-8").exists()


@pytest.mark.slow
def test_an_interrupted_chain_on_this_machine_resumes(tmp_path: Path) -> None:
    """Started with INT ignored, as in the background of a shell, it ends by INT with all its processes, after saving.

    The second time the store is kept, training resumes, and the evaluation's figures are training's own, byte for byte.
    """
    arguments, run = [*demo_arguments(tmp_path, "run"), "--cluster", "local"], tmp_path / "run"
    command = [*ignoring(signal.SIGINT), sys.executable, "-m", "launch.submit", *arguments]
    process = subprocess.Popen(
        [*command, "--stages", "shards,train"],
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with paused(run, 20):
            training = trainers(run)
            process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output.splitlines()[-1]) == (130, "train     interrupted")
    assert training and [trainer for trainer in training if is_alive(trainer)] == []
    assert "stopped by a signal" in (tmp_path / "run.jobs" / "run-train_0_log.out").read_text()
    saved, store = records(run)[-1]["step"], contents(tmp_path / "store")
    assert 20 <= saved < NUM_STEPS

    result = run_module("launch.submit", *arguments, "--stages", "shards,train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"from step {saved} to at most {NUM_STEPS}" in (tmp_path / "run.jobs" / "run-train_0_log.out").read_text()
    by_training = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    result = run_module("launch.submit", *arguments, "--stages", "evaluate,export", "--sizes", "8,32")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done in") == 3
    assert contents(tmp_path / "store") == store
    assert (run / "evaluation.json").read_bytes() == by_training
    assert sorted(path.name for path in run.glob("export-*")) == ["export-32", "export-8"]
    assert tuple(map(int, evaluation(run)["sizes"])) == SIZES
