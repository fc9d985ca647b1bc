"""DeepSpeed ZeRO: the same run as without it, under the real launcher and its variables; refused configurations."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fmrl_dist import evaluate, train
from fmrl_dist.distributed.deepspeed import checked_plugin
from fmrl_dist.distributed.processes import start_runtime
from tests.fixtures.engines import DDP, LAUNCHERS, train_under, zero
from tests.fixtures.processes import REPOSITORY, launch, run_processes
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    contents,
    evaluation,
    make_shop,
    records,
    refusal,
    train_here,
)

pytestmark = pytest.mark.multiproc

ZERO2 = LAUNCHERS / "zero2-cpu-2.yaml"
ZERO2_FILE = REPOSITORY / "launch" / "deepspeed" / "zero2.json"
CLIP_NORM = 0.7
WORDS = ["--model.dropout", "0", "--model.lru_dropout", "0", "--train.clip_norm", str(CLIP_NORM)]
FIGURES = ("loss", "loss@4", "loss@8", "grad_norm", "lr")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def one(shop: Path) -> Path:
    """The run of one process: three epochs, and so 24 steps."""
    return train_here(shop, shop.parent / "one", *WORDS)


@pytest.fixture(scope="module")
def launched_zero(shop: Path) -> tuple[Path, str]:
    """The same run with ZeRO 2 in two launched processes, without a compiler: its folder and output."""
    run, extensions = shop.parent / "zero", shop.parent / "extensions"
    extensions.mkdir()
    environment = {"PATH": "/nonexistent", "TORCH_EXTENSIONS_DIR": str(extensions)}
    result = launch(2, training(shop, run, *WORDS), environment, config_file=ZERO2)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert list(extensions.iterdir()) == [], "DeepSpeed has built something"
    return run, result.stdout


def training(shop: Path, run: Path, *words: object) -> list[str]:
    """The command for the launcher."""
    return ["-m", "fmrl_dist.train", "--config", str(shop), "--run.dir", str(run), *map(str, words)]


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Same losses, norms and rates at every step, same checkpoint, same evaluation, up to rounding."""
    for record, other in zip(records(found), records(expected), strict=True):
        assert record["step"] == other["step"]
        for key in FIGURES:
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)
    for file, tolerance in (("model", 1e-5), ("optimizer", 1e-4)):
        left, right = (load_file(run / "checkpoints" / "latest" / f"{file}.safetensors") for run in (found, expected))
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype and left[name].shape == tensor.shape
            if tensor.numel():
                error = (left[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-12)
                assert error < tolerance, (file, name, error)
    assert evaluation(found) == evaluation(expected)
    ends = [
        record for record in records(found, "valid") if record["step"] % STEPS_PER_EPOCH == 0
    ]  # not where a run stopped
    assert ends == [record for record in records(expected, "valid") if record["step"] % STEPS_PER_EPOCH == 0]


@pytest.mark.slow
def test_zero_2_trains_as_one_process(launched_zero: tuple[Path, str], one: Path) -> None:
    norms = [record["grad_norm"] for record in records(one)]
    assert len(norms) >= 20 and min(norms) < CLIP_NORM < max(norms), "some steps are clipped, some are not"
    assert_equal_runs(launched_zero[0], one)


@pytest.mark.slow
def test_ddp_trains_as_one_process_and_as_zero_2(shop: Path, one: Path, launched_zero: tuple[Path, str]) -> None:
    train_under(DDP, shop, shop.parent / "ddp", *WORDS)
    assert_equal_runs(shop.parent / "ddp", one)
    assert_equal_runs(shop.parent / "ddp", launched_zero[0])


@pytest.mark.slow
def test_the_start_line_names_the_engine(launched_zero: tuple[Path, str]) -> None:
    said = launched_zero[1]
    assert "2 process(es), engine deepspeed ZeRO 2, device cpu, 1 thread(s) each, precision fp32" in said
    assert said.count("whole catalogue ranked") == 1, "only one rank prints"


def test_a_run_resumes_from_zero_2_in_one_process_and_back(shop: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_under(zero(2), shop, run, *WORDS, "--train.max_steps", STEPS_PER_EPOCH)
    train_here(shop, run, *WORDS, "--train.max_steps", 2 * STEPS_PER_EPOCH, "--resume", "auto")
    train_under(zero(2), shop, run, *WORDS, "--resume", "auto")
    assert_equal_runs(run, one)


def test_zero_1_with_a_projection_of_no_features(shop: Path, tmp_path: Path) -> None:
    """Ids alone: the projection has no elements; DeepSpeed leaves it out, a checkpoint includes it."""
    words = [*WORDS, "--model.features", "[]", "--model.id_table", "true", "--train.max_steps", 5]
    file = write_config(tmp_path, {"zero_optimization": {"stage": 1}})
    said, _ = train_under(zero(1, file), shop, tmp_path / "zero", *words)
    assert "engine deepspeed ZeRO 1" in said
    assert_equal_runs(tmp_path / "zero", train_here(shop, tmp_path / "one", *words))


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_1_and_3_train_as_one_process(stage: int, shop: Path, one: Path, tmp_path: Path) -> None:
    """In two halves: the second resumes from the first one's checkpoint and divides each batch into three."""
    weights = load_file(one / "checkpoints" / "latest" / "optimizer.safetensors")
    num_parameters = sum(moment.numel() for name, moment in weights.items() if name.startswith("exp_avg/"))
    for words in (["--train.max_steps", 11], ["--resume", "auto", "--train.micro_batches", 3]):
        said, silent = train_under(zero(stage), shop, tmp_path / "run", *WORDS, *words)
        assert f"engine deepspeed ZeRO {stage}" in said and silent == ""
        assert f" {num_parameters:,} parameters," in said  # of the whole model, also where it is divided
    assert len(records(tmp_path / "run")) == len(records(one))
    assert_equal_runs(tmp_path / "run", one)


def test_a_run_resumes_under_all_engines(shop: Path, one: Path, tmp_path: Path) -> None:
    """ZeRO 2 in two processes, one process, ZeRO 1 in two, ZeRO 3 in two, DDP in two."""
    run = tmp_path / "run"
    train_under(zero(2), shop, run, *WORDS, "--train.max_steps", 5)
    train_here(shop, run, *WORDS, "--train.max_steps", 10, "--resume", "auto")
    for stage, steps in ((1, 15), (3, 20)):
        train_under(zero(stage), shop, run, *WORDS, "--train.max_steps", steps, "--resume", "auto")
    train_under(DDP, shop, run, *WORDS, "--resume", "auto")
    assert_equal_runs(run, one)


@pytest.mark.slow
def test_four_processes_train_as_one(shop: Path, one: Path, tmp_path: Path) -> None:
    """ZeRO 2, then ZeRO 1, then 3: most shares of the moments end in the middle of a parameter, the last in padding."""
    for stage, words in ((2, ["--train.max_steps", 9]), (1, ["--train.max_steps", 17]), (3, [])):
        words = [*WORDS, *words, "--resume", "auto"]
        said = train_under(zero(stage), shop, tmp_path / "run", *words, num_processes=4)
        assert f"4 process(es), engine deepspeed ZeRO {stage}" in said[0]
    assert_equal_runs(tmp_path / "run", one)


@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload"])
def test_offload_configs_are_accepted(name: str, launched: pytest.MonkeyPatch) -> None:
    """Parsed and checked; offloading is for GPUs and is not measured."""
    file = REPOSITORY / "launch" / "deepspeed" / f"{name}.json"
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    plugin = checked_plugin(os.environ)
    assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_bf16_of_the_launcher_is_ours(shop: Path, tmp_path: Path) -> None:
    """Products in bfloat16; parameters, moments and gradients' sums stay float32."""
    words = [*WORDS, "--train.max_steps", 1]
    said, _ = train_under(zero(2) | {"ACCELERATE_MIXED_PRECISION": "bf16"}, shop, tmp_path / "zero", *words)
    assert "engine deepspeed ZeRO 2, device cpu, 1 thread(s) each, precision bf16" in said
    for file in ("model", "optimizer"):
        tensors = load_file(tmp_path / "zero" / "checkpoints" / "latest" / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    train_here(shop, tmp_path / "bf16", *words, "--train.precision", "bf16")
    train_here(shop, tmp_path / "fp32", *words)
    found, half, single = (records(tmp_path / run)[0]["loss"] for run in ("zero", "bf16", "fp32"))
    assert found == pytest.approx(half, rel=1e-6)
    assert found != pytest.approx(single, rel=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks(shop: Path, tmp_path: Path) -> None:
    """After a first step that ruins the weights; the saved checkpoint precedes it."""
    words = ["--train.lr", 1e30, "--train.checkpoint_every_steps", 1]
    result = launch(2, training(shop, tmp_path / "run", *words), config_file=ZERO2)
    assert result.returncode != 0
    for rank in (0, 1):
        assert f"error: step 2, rank {rank}: " in result.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-00000001"


def test_deepspeed_bf16_is_refused_with_the_reason(shop: Path, tmp_path: Path) -> None:
    """Through the launcher; the other refusals are tested on the command alone, below."""
    file = write_config(tmp_path, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}})
    options = ["--deepspeed_config_file", str(file)]
    result = launch(2, [*options, *training(shop, tmp_path / "run")], config_file=ZERO2)
    assert result.returncode != 0
    lines = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert lines == {
        f"error: DeepSpeed config {file} turns on bf16, which casts parameters (in bf16, θ is off by up to 0.025 rad "
        "per event); remove it and use --train.precision bf16"
    }
    assert not (tmp_path / "run").exists()


def write_config(folder: Path, config: object) -> Path:
    file = folder / "deepspeed.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return file


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a rank started by the launcher with DeepSpeed."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ZERO2_FILE))
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    return monkeypatch


def refused(shop: Path, tmp_path: Path) -> str:
    """The line that refuses to train, before anything is written."""
    before = contents(tmp_path)
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run")
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()
    return line


ZERO = {"stage": 2}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"zero_optimization": ZERO, "fp16": {"enabled": True}}, "turns on fp16, which casts parameters"),
        ({"zero_optimization": ZERO, "torch_autocast": {"enabled": True}}, "turns on torch_autocast, which casts"),
        ({"zero_optimization": ZERO, "amp": {"enabled": "true"}}, "turns on amp, which casts"),
        (
            {"zero_optimization": ZERO, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps 2; expected 1: train.",
        ),
        ({"zero_optimization": ZERO, "gradient_clipping": 1.0}, "gradient_clipping 1.0; remove it: train.clip_norm"),
        ({"zero_optimization": ZERO, "train_batch_size": 64}, "train_batch_size 64; remove it: train.batch_size"),
        ({"zero_optimization": ZERO, "optimizer": {"type": "Adam"}}, "has optimizer {'type': 'Adam'}; remove it"),
        ({"zero_optimization": ZERO, "scheduler": {"type": "WarmupLR"}}, "remove it: train.warmup_steps"),
        ({"zero_optimization": {"stage": 0}}, "asks for ZeRO 0; expected 1, 2 or 3 (0 is accelerate launch --multi"),
        ({"zero_optimization": {"stage": 4}}, "asks for ZeRO 4; expected 1, 2 or 3"),
        ({}, "is not valid: Please specify the ZeRO optimization config"),
        ({"zero_optimization": 2}, "has zero_optimization 2; expected an object"),
        ([], "holds a list; expected an object"),
        ("{", "is not JSON (Expecting property name"),
    ],
)
def test_deepspeed_config_that_is_refused(
    config: object, complaint: str, shop: Path, tmp_path: Path, launched: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, config)
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    line = refused(shop, tmp_path)
    assert f"DeepSpeed config {file} " in line and complaint in line


def test_deepspeed_config_that_is_missing(shop: Path, tmp_path: Path, launched: pytest.MonkeyPatch) -> None:
    """A path in a launcher's file is relative to the folder in which the launcher is started."""
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "launch/deepspeed/zero2.json")
    launched.chdir(tmp_path)
    line = refused(shop, tmp_path)
    assert f"launch/deepspeed/zero2.json does not exist in {tmp_path}; start in the repository's root" in line
    assert "--deepspeed_config_file PATH" in line


def test_options_of_the_launcher_are_checked_too(shop: Path, tmp_path: Path, launched: pytest.MonkeyPatch) -> None:
    launched.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    assert "DeepSpeed config of the launcher asks for ZeRO 0" in refused(shop, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("ACCELERATE_USE_CPU", "true", "ACCELERATE_USE_CPU or --cpu, which silently turns it off; remove that"),
        ("LOCAL_RANK", None, "this process has no LOCAL_RANK; start it with accelerate launch --use_deepspeed"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "the launcher requests mixed precision 'fp16'; expected no or bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "requests 4 gradient accumulation steps"),
    ],
)
def test_environment_that_is_refused(
    name: str, value: str | None, complaint: str, shop: Path, tmp_path: Path, launched: pytest.MonkeyPatch
) -> None:
    if value is None:  # a process that no launcher has started
        for variable in ("WORLD_SIZE", "RANK", name, "MASTER_ADDR", "MASTER_PORT"):
            launched.delenv(variable)
    else:
        launched.setenv(name, value)
    assert complaint in refused(shop, tmp_path)


def test_accumulation_is_refused_without_deepspeed_too(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert "requests 2 gradient accumulation steps" in refused(shop, tmp_path)


def test_deepspeed_that_is_not_installed(shop: Path, one: Path, tmp_path: Path, launched: pytest.MonkeyPatch) -> None:
    launched.setitem(sys.modules, "deepspeed", None)  # how Python marks a module that cannot be imported
    line = refused(shop, tmp_path)
    assert line == "error: DeepSpeed was requested but is not installed; pip install -e '.[deepspeed]'"
    assert line == refusal(evaluate.main, "--checkpoint", one)


def leave() -> list[object]:
    """The start line of this rank, and whether a process group is initialised before and after leaving it."""
    runtime = start_runtime(1, lanes=None)
    before = dist.is_initialized()
    runtime.leave()
    return [runtime.describe(), before, dist.is_initialized()]


@pytest.mark.parametrize(("engine", "name"), [(DDP, "multi_cpu"), (zero(2), "deepspeed ZeRO 2")])
def test_process_group_ends_before_the_process_does(engine: dict[str, str], name: str) -> None:
    for said, before, after in run_processes(2, leave, environment=engine):
        assert said.startswith(f"2 process(es), engine {name}, ")
        assert (before, after) == (True, False)


SAY_LAUNCH = """
import json, os
names = ("USE_DEEPSPEED", "DEEPSPEED_CONFIG_FILE", "MIXED_PRECISION")
names = ("RANK", "WORLD_SIZE", *(f"ACCELERATE_{name}" for name in names))
os.write(1, (json.dumps({name: os.environ[name] for name in names if name in os.environ}) + "\\n").encode())
"""
OTHER_OPTIONS = ("--deepspeed_config_file", "launch/deepspeed/zero1.json", "--mixed_precision", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "num_processes", "engine"),
    [
        ("single", (), 1, DDP),
        ("gpu-8", (), 8, DDP),
        ("cpu-2", (), 2, DDP),
        ("zero2-cpu-2", (), 2, zero(2)),
        ("zero2-cpu-2", OTHER_OPTIONS, 2, zero(1) | {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("zero2-gpu-8", (), 8, zero(2)),
    ],
    ids=["single", "gpu-8", "cpu-2", "zero2-cpu-2", "zero2-cpu-2 with options", "zero2-gpu-8"],
)
def test_launcher_config_starts_what_its_name_says(
    name: str, options: tuple[str, ...], num_processes: int, engine: dict[str, str], tmp_path: Path
) -> None:
    """The same variables select the engines of the tests above."""
    script = tmp_path / "say.py"
    script.write_text(SAY_LAUNCH)
    result = launch(None, [*options, script], config_file=LAUNCHERS / f"{name}.yaml")
    assert result.returncode == 0, result.stderr
    said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    if num_processes == 1:
        assert said == [engine]
    else:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": str(num_processes)} for rank in range(num_processes)]
        assert sorted(said, key=lambda line: int(line["RANK"])) == [rank | engine for rank in ranks]


def test_every_launcher_config_is_tested_and_finds_its_file() -> None:
    assert {path.stem for path in LAUNCHERS.iterdir()} == {"single", "gpu-8", "cpu-2", "zero2-cpu-2", "zero2-gpu-8"}
    for path in LAUNCHERS.glob("zero2-*.yaml"):
        assert f"deepspeed_config_file: {ZERO2_FILE.relative_to(REPOSITORY)}\n" in path.read_text()
