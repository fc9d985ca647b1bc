"""The planner: its memory against the measured peak of small steps, its counts against the profiler's, its advice."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measuring.timing import forget_peak, peak_resident_bytes
from fmrl_dist import plan
from fmrl_dist.config.loading import load_config
from fmrl_dist.config.train_section import TrainConfig
from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.plan import Cost, Step, predict, recommend
from fmrl_dist.training.id_table.owned import OwnedIdTable
from fmrl_dist.training.id_table.replicated import ReplicatedIdTable
from fmrl_dist.training.id_table.rows import IdDropout, IdRows, ModelIdTable
from fmrl_dist.training.item_columns import TableColumns, catalogue_columns, catalogue_slice, slice_bounds
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import build_optimizer
from tests.fixtures.processes import run_processes
from tests.fixtures.training import refusal

LENGTH = 9  # inputs of a history; ten positions
MEMORY_ERROR = 0.25
BASE = Step(
    sizes=(32, 64, 128, 256),
    depth=1,
    num_features=256,
    num_items=30_000,
    id_width=0,
    id_dropout=False,
    dropout=False,
    num_ranks=1,
    positions=1000,
    negatives=0,
    drawn=0,
    itemsize=4,
    on_gpu=False,
    memory_bytes=2**34,
)
MEASURED = {
    "whole": (BASE, "whole"),
    "whole, ids": (replace(BASE, id_width=256), "whole"),
    "whole, wide and deep, bfloat16": (
        replace(BASE, sizes=(64, 512), depth=3, num_items=20_000, positions=2000, itemsize=2),
        "whole",
    ),
    "whole, four micro-batches": (replace(BASE, positions=500, micro_batches=4), "whole"),
    "sampled": (replace(BASE, negatives=4096, drawn=4096), "sampled"),
    "sampled, ids": (replace(BASE, id_width=256, negatives=4096, drawn=4096), "sampled"),
    "sampled, eight experts": (replace(BASE, id_width=256, negatives=4096, drawn=4096, experts=8), "sampled"),
    "whole, narrow ids with dropout": (replace(BASE, num_items=100_000, id_width=64, id_dropout=True), "whole"),
}
MEASURED_BY_TWO = {
    "whole by two": (replace(BASE, num_ranks=2), "whole"),
    "split": (replace(BASE, num_ranks=2), "split"),
    "split, ids": (replace(BASE, num_ranks=2, num_items=100_000, id_width=256), "split"),
    "split, narrow ids with dropout": (
        replace(BASE, num_ranks=2, num_items=100_000, id_width=64, id_dropout=True),
        "split",
    ),
    "sampled, ids, by two": (
        replace(BASE, num_ranks=2, num_items=100_000, id_width=256, id_dropout=True, negatives=4096, drawn=4096),
        "sampled",
    ),
}


def make_module(step: Step, loss: str) -> TrainingModule:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(step.num_items, step.num_features, generator=generator).half()
    table = ItemTable({"features": step.num_features}, values, torch.ones(len(values), 1, dtype=torch.bool))
    products = torch.bfloat16 if step.itemsize == 2 else None
    num_rows = step.num_items if step.id_width else 0
    model = FMRLRec(
        step.sizes,
        step.depth,
        table.dims,
        num_rows,
        matmul_dtype=products,
        id_width=step.id_width,
        item_encoder="unisrec" if step.experts else "projection",
        experts=step.experts,
    )
    dtype, settings = products or torch.float32, LossSettings(step.sizes, dtype=products)
    ids = make_ids(model, step, loss) if step.id_width else None
    if loss != "split":
        columns = catalogue_columns(model.encoder, table, dtype)
        return TrainingModule(model, columns, settings, id_rows=ids)
    part = catalogue_slice(model.encoder, table, dtype, dist.get_rank(), step.num_ranks)
    return TrainingModule(model, TableColumns(model.encoder, table, dtype), settings, part=part, id_rows=ids)


def make_ids(model: FMRLRec, step: Step, loss: str) -> IdRows:
    dropout, cold = IdDropout(0.1 * step.id_dropout, 0), torch.zeros(step.num_items, dtype=torch.bool)
    if loss == "whole":
        return ModelIdTable(model.encoder, dropout)
    runtime, train = start_runtime(1, lanes=None), TrainConfig(id_lr_power=0.5)
    if loss == "sampled":
        return ReplicatedIdTable(model, train, dropout, cold, runtime)
    return OwnedIdTable(model, slice_bounds(step.num_items, step.num_ranks), train, dropout, cold, runtime)


def make_batch(step: Step, loss: str) -> Packed:
    num_histories = step.positions // (LENGTH + 1)
    events = torch.randint(step.num_items, (num_histories, LENGTH + 1))
    whole = Packed(
        users=torch.arange(num_histories),
        items=events[:, :-1].flatten(),
        starts=torch.arange(num_histories + 1) * LENGTH,
        from_start=torch.ones(num_histories, dtype=torch.bool),
        targets=events.flatten(),
    )
    if loss != "sampled":
        return whole
    return SampledBatch(
        **vars(whole),
        position_starts=torch.tensor([0, len(whole.targets)]),
        negatives=torch.randint(step.num_items, (step.negatives,)),
        log_expected=torch.zeros(step.negatives),
        negative_starts=torch.tensor([0, step.negatives]),
    )


def run_steps(step: Step, loss: str) -> None:
    module = make_module(step, loss)
    optimizer = build_optimizer(module.model, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    wrapped = DistributedDataParallel(module) if step.num_ranks > 1 else module
    for _ in range(2):
        for _ in range(step.micro_batches):
            wrapped(make_batch(step, loss)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(module.id_rows, (ReplicatedIdTable, OwnedIdTable)):
            norm = module.id_rows.gradient_norm()
            module.id_rows.step(torch.ones_like(norm), norm.isfinite())


def peak_of(fields: dict[str, Any], loss: str) -> int:
    """Peak resident bytes of three steps, beside the process with everything loaded and the table."""
    step = Step(**fields | {"sizes": tuple(fields["sizes"])})
    run_steps(replace(step, num_items=100, positions=10, negatives=10), loss)
    ctypes.CDLL(None).malloc_trim(0)  # what it has freed, but would use again
    forget_peak()
    before = peak_resident_bytes() + 2 * step.num_items * step.num_features
    run_steps(step, loss)
    return peak_resident_bytes() - before


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEASURED, *MEASURED_BY_TWO])
def test_memory_is_as_measured(name: str) -> None:
    step, loss = (MEASURED | MEASURED_BY_TWO)[name]
    peaks = run_processes(step.num_ranks, peak_of, asdict(step), loss)
    cost = predict(step, loss)
    print(f"{name}: measured {max(peaks) / 2**20:.0f} MiB, predicted {cost.num_bytes / 2**20:.0f}: {cost.memory}")
    assert cost.num_bytes == pytest.approx(max(peaks), rel=MEMORY_ERROR)


def counted_operations(step: Step, loss: str) -> int:
    """Two for each multiplication in the matrix products of one step."""
    module, batch = make_module(step, loss), make_batch(step, loss)
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(step.micro_batches):
            module(batch).mean().backward()
    operations = 0
    for event in profile.events() or ():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (n, k), (_, m) = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            operations += 2 * n * k * m
    return operations


@pytest.mark.parametrize(
    ("step", "loss"),
    [
        (replace(BASE, num_items=5000, positions=200), "whole"),
        (replace(BASE, num_items=5000, positions=20), "whole"),  # projected back
        (replace(BASE, num_items=30_000, positions=400), "whole"),  # some tiles are not kept
        (replace(BASE, num_items=5000, positions=200, id_width=256), "whole"),
        (replace(BASE, num_items=20_000, positions=500, negatives=3000, drawn=3000), "sampled"),
        (replace(BASE, num_items=20_000, positions=500, negatives=3000, drawn=3000, experts=4), "sampled"),
        (replace(BASE, num_items=5000, positions=100, micro_batches=2), "whole"),
    ],
    ids=["kept", "back", "again", "ids", "sampled", "experts", "micro-batches"],
)
def test_operations_are_as_counted(step: Step, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if step.num_items == 30_000:
        monkeypatch.setattr("fmrl_dist.losses.tiled_log_sum_exp.KEPT_BYTES", 64 * 2**20)
        assert step.num_items * (4 * step.positions + 256) * 4 > 64 * 2**20
    assert predict(step, loss).operations == pytest.approx(counted_operations(step, loss), rel=0.1)


# Of whole steps on an H100 (benchmarks/results/h100-2026-11-26): positions, features, items, itemsize, seconds, GiB
# beyond weights, moments and columns.
ON_AN_H100 = [
    (4096, 768, 1_000_000, 2, 0.287, 1.26),
    (4096, 768, 10_000_000, 2, 2.67, 1.26),
    (25_600, 2048, 100_000, 2, 0.209, 3.68),
    (25_600, 2048, 100_000, 4, 0.675, 4.74),
]
H100_RATE = {2: 771e12, 4: 51.1e12}


@pytest.mark.parametrize(("positions", "num_features", "num_items", "itemsize", "seconds", "gib"), ON_AN_H100)
def test_a_gpu_takes_the_predicted_time_and_no_more_memory(
    positions: int, num_features: int, num_items: int, itemsize: int, seconds: float, gib: float
) -> None:
    sizes = (8, 16, 32, 64, 128, 256, 512, 1024)
    step = replace(BASE, sizes=sizes, depth=2, positions=positions, num_features=num_features, num_items=num_items)
    step = replace(step, itemsize=itemsize, on_gpu=True, memory_bytes=80 * 2**30)
    cost = predict(step, "whole")
    assert cost.operations / (plan.rate_share(step) * H100_RATE[itemsize]) == pytest.approx(seconds, rel=0.2)
    gradients = cost.memory["weights, gradients, moments"] / 4
    found = (cost.memory["kept of blocks and batch"] + cost.memory["loss"] + gradients) / 2**30
    assert gib <= found <= 1.5 * gib


def test_split_divides_projection_and_columns() -> None:
    step = replace(BASE, num_ranks=8, num_items=10_000_000, memory_bytes=80 * 2**30, on_gpu=True)
    whole, split = predict(step, "whole"), predict(step, "split")
    assert split.operations < whole.operations
    assert split.memory["item columns"] == whole.memory["item columns"] / 8
    assert split.sent_bytes > 0 == whole.sent_bytes


def test_what_does_not_fit_the_device_is_read_from_the_table() -> None:
    step = replace(BASE, num_ranks=8, num_items=10_000_000, memory_bytes=16 * 2**30, on_gpu=True)
    whole, split = predict(step, "whole"), predict(step, "split")
    assert (whole.memory["item columns"], whole.read_bytes) == (0, 2 * 10_000_000 * 256 * 2)
    assert split.read_bytes == 0 < split.memory["item columns"]


def test_validation_holds_the_ranked_embeddings() -> None:
    step = replace(BASE, num_ranks=8, num_items=10_000_000, memory_bytes=80 * 2**30, on_gpu=True)
    for loss in ("whole", "split", "sampled"):  # with so many items, ranks share the ranking at any loss
        cost = predict(step, loss)
        resting = cost.memory["weights, gradients, moments"] + cost.memory["item columns"]
        assert cost.validation_bytes == resting + 4 * 10_000_000 * 256 / 8
    alone = predict(replace(step, num_ranks=1), "sampled")
    assert alone.num_bytes == alone.validation_bytes > 4 * 10_000_000 * 256


def cost(num_bytes: int, operations: float) -> Cost:
    return Cost({"all": num_bytes}, operations, 0, 0)


@pytest.mark.parametrize(
    ("costs", "max_step_s", "chosen"),
    [
        ({"whole": cost(10, 5.0), "split": cost(10, 4.0), "sampled": cost(1, 1.0)}, 9.0, "split"),
        ({"whole": cost(10, 5.0), "split": cost(10, 5.0), "sampled": cost(1, 1.0)}, 9.0, "whole"),
        ({"whole": cost(10, 5.0), "split": cost(95, 4.0), "sampled": cost(1, 1.0)}, 9.0, "whole"),
        ({"whole": cost(95, 5.0), "split": cost(95, 4.0), "sampled": cost(1, 1.0)}, 9.0, "sampled"),
        ({"whole": cost(10, 5.0), "split": cost(10, 4.0), "sampled": cost(1, 1.0)}, 3.0, "sampled"),
        ({"whole": cost(10, 5.0), "split": cost(10, 4.0), "sampled": cost(95, 1.0)}, 3.0, "split"),
    ],
)
def test_recommendation(costs: dict[str, Cost], max_step_s: float, chosen: str) -> None:
    assert recommend(costs, 100, lambda cost: cost.operations, max_step_s)[0] == chosen


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--items", "10000000", "--gpus", "8", "--positions", "4096", "--teraflops", "300"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "8 rank(s), 10,000,000 items of 384 features, sizes [8, 16, 32, 64, 128], 2 block(s), 512 "
    )
    assert [line.split()[1] for line in lines if line.startswith("| ")] == ["loss", "whole", "split", "sampled"]
    assert lines[-1].startswith("recommended: loss.softmax: full, loss.catalogue: split (exact, and it fits")


def test_an_inline_store_has_no_ids(capsys: pytest.CaptureFixture[str]) -> None:
    """What is "auto" is planned as it would be trained."""
    words = ["--items", "10000000", "--gpus", "8", "--positions", "4096", "--store.feature_mode", "inline"]
    words += ["--loss.softmax", "sampled"]
    planned = []
    for ids in ("auto", "false", "true"):
        plan.main([*words, "--model.id_table", ids])
        planned.append(capsys.readouterr().out)
    assert planned[0] == planned[1] != planned[2]


def test_an_inline_store_has_the_sampled_softmax_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """And no columns of items: their features come with the histories."""
    words = ["--config", "configs/demo-inline.yaml", "--items", "10000", "--cpus", "2"]
    plan.main(words)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| loss", "| sampled"]
    assert rows[0][3] == "item columns" and float(rows[1][3]) == 0
    assert "which needs a table of items" in refusal(plan.main, *words, "--loss.softmax", "full")


def test_micro_batches_save_memory_and_cost_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 16 lanes, each of 8 ranks has two: it cannot divide them further."""
    words = ["--items", "10000000", "--gpus", "8", "--positions", "4096"]
    once, twice, more = (
        plan.step_of(
            load_config(None, ["--train.micro_batches", str(n)]).resolved(10**7, 1, 1, True),
            10**7,
            8,
            384,
            4096,
            True,
            2**36,
        )
        for n in (1, 2, 4)
    )
    assert (once.positions, twice.positions, twice.micro_batches) == (512, 256, 2) and more == twice
    costs = [predict(step, "whole") for step in (once, twice)]
    assert costs[0].memory["kept of blocks and batch"] > costs[1].memory["kept of blocks and batch"]
    assert costs[0].operations < costs[1].operations < 2 * costs[0].operations
    plan.main([*words, "--train.micro_batches", "2"])
    assert ", 256 positions of each rank in each of 2 micro-batches, " in capsys.readouterr().out


def test_a_batch_of_auto_is_the_largest_that_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Of histories as long as data.max_length, 50."""
    plan.main(["--items", "10000000", "--gpus", "8"])
    assert ", 800 positions of each rank" in capsys.readouterr().out


def test_command_of_one_rank_names_no_split(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--items", "10000", "--cpus", "1"])
    out = capsys.readouterr().out
    assert "| split |" not in out
    assert "recommended: loss.softmax: full (" in out
    assert "time is not weighed" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--items", "0", "--gpus", "8"], "--items is 0; expected at least 1"),
        (["--items", "5", "--gpus", "0"], "--gpus or --cpus is 0; expected at least 1"),
        (["--items", "5", "--gpus", "17"], "17 ranks share 16 lanes; raise --train.lanes"),
        (["--items", "5"], "one of the arguments --gpus --cpus is required; see --help"),
        (["--items", "5", "--gpus", "2", "--teraflops", "0"], "--teraflops is 0.0; expected a number of more"),
        (["--items", "5", "--gpus", "2", "--memory-gib", "inf"], "--memory-gib is inf; expected a number of more"),
        (["--items", "5", "--gpus", "2", "--max-step-s", "nan"], "--max-step-s is nan; expected a number of more"),
        (
            [
                *("--items", "5", "--gpus", "2", "--loss.normalize", "true", "--loss.distillation", "0"),
                *("--loss.temperatures", "[1, 1, 1, 1, 1]"),
            ],
            "loss.normalize is on, whose cost is not predicted",
        ),
        (
            ["--items", "5", "--gpus", "2", "--model.mixer", "filter"],
            "model.mixer is filter, whose cost is not predicted",
        ),
        (["--items", "1000000000", "--gpus", "8", "--model.id_table", "true"], "no loss fits: a step needs at least "),
    ],
)
def test_refusals(words: list[str], line: str) -> None:
    assert refusal(plan.main, *words).startswith(f"error: {line}")
