"""The id table in training: a step's rows against a whole table with AdamW, their traffic, id dropout, cold items."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmrl_dist.config.train_section import TrainConfig
from fmrl_dist.data.batches import SampledBatch
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.distributed.processes import Runtime, start_runtime
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.engine import DataParallelEngine
from fmrl_dist.training.id_table.owned import OwnedIdTable
from fmrl_dist.training.id_table.replicated import ReplicatedIdTable
from fmrl_dist.training.id_table.rows import IdDropout, SeparateIdTable
from fmrl_dist.training.item_columns import TableColumns, slice_bounds
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import build_optimizer
from tests.fixtures.item_encoders import projection_of
from tests.fixtures.processes import run_processes

SIZES = (4, 8, 12)
NUM_ITEMS, WIDTH = 53, 8
STEPS, MICRO_BATCHES = 5, 2
NOT_FINITE = 3  # a step whose gradient is not
CLIPPED = 0.37
COLD = [3, 17, 40]
TRAIN = TrainConfig(id_lr_factor=0.5, id_lr_power=0.7, id_weight_decay=0.2, beta2=0.95)


def make_model() -> FMRLRec:
    torch.manual_seed(3)
    model = FMRLRec(SIZES, 1, {"text": 3}, NUM_ITEMS, id_width=WIDTH).double()
    assert model.encoder.id_table is not None
    model.encoder.id_table.detach()[COLD] = 0.0
    return model


def batch_ids(step: int, rank: int, part: int) -> Tensor:
    """Distinct items of a micro-batch, sorted; those of rank 1 overlap with rank 0's, and one batch is empty."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + part)
    count = 0 if (step, rank, part) == (1, 0, 1) else 12
    return torch.randperm(NUM_ITEMS, generator=generator)[:count].sort().values


def loss_of(rows: Tensor, ids: Tensor, step: int) -> Tensor:
    """A function of rows, not the same for any two items."""
    factor = torch.inf if step == NOT_FINITE else 1.0
    return ((rows - ids[:, None] / 50) ** 2).sum() * factor


def cold_mask() -> Tensor:
    return torch.zeros(NUM_ITEMS, dtype=torch.bool).index_fill(0, torch.tensor(COLD), True)


def train_table(table: SeparateIdTable, runtime: Runtime, full: bool) -> list[float]:
    """Some steps on this rank's batches; with ``full``, every rank's own items have a gradient, too. Norms."""
    norms = []
    for step in range(STEPS):
        table.begin_step(step)
        for part in range(MICRO_BATCHES):
            ids = batch_ids(step, runtime.rank, part)
            loss = loss_of(table.of_batch(ids), ids, step)
            if full:
                bounds = slice_bounds(NUM_ITEMS, runtime.world_size)
                ids = torch.arange(*bounds[runtime.rank : runtime.rank + 2])
                loss = loss + loss_of(table.of_scored(), ids, step)
            (loss * runtime.world_size).backward()
        norm = table.gradient_norm()
        norms.append(norm.item())
        table.set_learning_rate(0.1 / (step + 1))
        table.step(torch.tensor(CLIPPED, dtype=torch.float64), norm.isfinite())
    return norms


def on_each_rank(full: bool) -> dict[str, Any]:
    runtime = start_runtime(1, lanes=4)
    dropout = IdDropout(0.3, seed=7)
    bounds = slice_bounds(NUM_ITEMS, runtime.world_size)
    table: SeparateIdTable
    if full:
        table = OwnedIdTable(make_model(), bounds, TRAIN, dropout, cold_mask(), runtime)
    else:
        table = ReplicatedIdTable(make_model(), TRAIN, dropout, cold_mask(), runtime)
    norms = train_table(table, runtime, full)
    num_held = len(table.of_scored()) if full else NUM_ITEMS
    weights, moments = table.weights(), table.moments()
    held = {} if weights is None else {"weights": weights.tolist()} | {k: v.tolist() for k, v in moments.items()}
    return {"norms": norms, "num_weights": table.num_weights, "num_held": num_held} | held


def specification(num_ranks: int, full: bool) -> dict[str, Any]:
    """One process with the whole table as a parameter, torch's AdamW, and rows without a gradient put back."""
    table = make_model().encoder.id_table
    assert isinstance(table, nn.Parameter)
    optimizer = torch.optim.AdamW(
        [table], betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps, weight_decay=TRAIN.id_weight_decay
    )
    dropout, everyone, norms = IdDropout(0.3, seed=7), torch.arange(NUM_ITEMS), []
    for step in range(STEPS):
        dropout.begin_step(step)
        optimizer.zero_grad()
        touched = torch.zeros(NUM_ITEMS, dtype=torch.bool)
        for part in range(MICRO_BATCHES):
            for rank in range(num_ranks):
                ids = batch_ids(step, rank, part)
                loss_of(dropout(table[ids], ids), ids, step).backward()
                touched[ids] = True
            if full:
                loss_of(dropout(table, everyone), everyone, step).backward()
                touched[:] = True
        assert table.grad is not None
        table.grad[COLD] = 0.0
        norms.append(table.grad.norm().item())
        if step == NOT_FINITE:
            continue
        table.grad *= CLIPPED
        state = optimizer.state[table]
        kept = [tensor.clone() for tensor in (table.detach(), *(state[name] for name in state if name != "step"))]
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1) * TRAIN.id_lr_factor
        optimizer.step()
        if not full:  # an update is proportional to the rate of its channel
            growth = torch.tensor([(12 / 8) ** 0.7] * 4 + [1.0] * 4)
            table.detach().copy_(kept[0] + (table.detach() - kept[0]) * growth)
        kept += [torch.zeros_like(table)] * (3 - len(kept))
        for tensor, old in zip((table.detach(), state["exp_avg"], state["exp_avg_sq"]), kept, strict=True):
            tensor[~touched] = old[~touched]
    moments = {name: tensor.tolist() for name, tensor in optimizer.state[table].items()}
    return {"norms": norms, "weights": table.tolist()} | moments


@pytest.mark.multiproc
@pytest.mark.parametrize(("num_ranks", "full"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_steps_are_those_of_a_whole_table(num_ranks: int, full: bool) -> None:
    """Just the rows of a batch, or each rank's own items with a gradient in every step."""
    expected, ranks = specification(num_ranks, full), run_processes(num_ranks, on_each_rank, full)
    for key, values in expected.items():
        torch.testing.assert_close(torch.tensor(ranks[0][key]), torch.tensor(values), equal_nan=True)
    assert expected["step"] == STEPS - 1
    for rank in ranks:
        assert rank["norms"][:NOT_FINITE] == ranks[0]["norms"][:NOT_FINITE] and rank["num_weights"] == NUM_ITEMS * WIDTH
        assert ("weights" in rank) == (rank is ranks[0])
    assert [rank["num_held"] for rank in ranks] == (
        torch.tensor(slice_bounds(NUM_ITEMS, num_ranks)).diff().tolist() if full else [NUM_ITEMS] * num_ranks
    )
    assert all(not any(ranks[0][key][item]) for item in COLD for key in ("weights", "exp_avg", "exp_avg_sq"))


BATCH, NEGATIVES = 16, 64


def make_engine(runtime: Runtime, num_items: int) -> DataParallelEngine:
    torch.manual_seed(0)
    values, present = torch.ones(1, 4).half().expand(num_items, -1), torch.ones(1, 1, dtype=torch.bool)
    table = ItemTable({"text": 4}, values, present.expand(num_items, -1))
    model = FMRLRec((4, 8), 1, {"text": 4}, num_items, id_width=8)
    cold = torch.zeros(num_items, dtype=torch.bool)
    ids = ReplicatedIdTable(model, TRAIN, IdDropout(0.1, 0), cold, runtime)
    columns = TableColumns(model.encoder, table, torch.float32)
    module = TrainingModule(model, columns, LossSettings((4, 8)), id_rows=ids)
    assert not any("id_table" in name for name in module.state_dict()), "or data parallelism would average all rows"
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.999), 1e-8, 0.01)
    return DataParallelEngine(runtime, module, optimizer, 5.0, ids)


def make_batch(rank: int) -> SampledBatch:
    """One item each for some users, of the first thousand."""
    generator = torch.Generator().manual_seed(rank)
    items, targets, negatives = (
        torch.randint(1000, (count,), generator=generator) for count in (BATCH, BATCH, NEGATIVES)
    )
    return SampledBatch(
        users=torch.arange(BATCH),
        items=items,
        starts=torch.arange(BATCH + 1),
        from_start=torch.zeros(BATCH, dtype=torch.bool),
        targets=targets,
        position_starts=torch.tensor([0, BATCH]),
        negatives=negatives,
        log_expected=torch.zeros(NEGATIVES),
        negative_starts=torch.tensor([0, NEGATIVES]),
    )


class SentBytes:
    """Counts what this rank sends by ``all_to_all``."""

    def __init__(self) -> None:
        self.total, self._send = 0, dist.all_to_all_single
        dist.all_to_all_single = self._count  # type: ignore[assignment]

    def _count(self, output: Tensor, rows: Tensor, *counts: Any) -> None:
        self.total += rows.numel() * rows.element_size()
        self._send(output, rows, *counts)


def cost_of_a_step(num_items: list[int]) -> list[list[float]]:
    """For each number of items: bytes that this rank sends in one step, and the least seconds of some."""
    runtime, sent, found = start_runtime(1, lanes=2), SentBytes(), []
    for number in num_items:
        engine, batch, before, seconds = make_engine(runtime, number), make_batch(runtime.rank), sent.total, []
        for _ in range(12):
            began = time.perf_counter()
            engine.add_gradients(batch, lambda sums: sums.sum(), last=True)
            engine.clip_and_step()
            seconds.append(time.perf_counter() - began)
        found.append([(sent.total - before) / 12, min(seconds)])
    return found


def bytes_of_owned_rows(num_items: list[int]) -> list[int]:
    """For each number of items: bytes that this rank sends for the rows of its batch and their gradients."""
    runtime, sent, found = start_runtime(1, lanes=2), SentBytes(), []
    for number in num_items:
        model, cold = FMRLRec((4, 8), 1, {"text": 4}, number), torch.zeros(number, dtype=torch.bool)
        table = OwnedIdTable(model, slice_bounds(number, 2), TRAIN, IdDropout(0.0, 0), cold, runtime)
        before = sent.total
        table.of_batch(batch_ids(0, runtime.rank, 0)).sum().backward()
        table.gradient_norm()
        found.append(sent.total - before)
    return found


@pytest.mark.alone
@pytest.mark.multiproc
def test_a_sampled_step_does_not_grow_with_the_catalogue() -> None:
    """Of a thousand and of two million items: updating all their rows would take a hundred times as long."""
    for (few_bytes, few_s), (many_bytes, many_s) in run_processes(2, cost_of_a_step, [1000, 2_000_000]):
        distinct = len(torch.cat([make_batch(0).items, make_batch(0).targets, make_batch(0).negatives]).unique())
        assert 0 < few_bytes == many_bytes < 2 * 2 * distinct * (8 + 4 * 8)
        assert many_s < 4 * few_s


@pytest.mark.multiproc
def test_owned_rows_travel_for_the_batch_alone() -> None:
    """Ids, rows and gradients of 12 items of each rank, and a count for each rank."""
    few, many = torch.tensor(run_processes(2, bytes_of_owned_rows, [NUM_ITEMS, 100_000])).sum(0).tolist()
    assert few == many == 2 * (12 * (8 + 2 * 4 * 8) + 2 * 8)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """The others' and the rows' alike, wherever it is not finite."""
    for broken in ("ids", "weight"):
        engine, batch = make_engine(start_runtime(1, lanes=2), 1000), make_batch(0)
        module, table = engine._module, engine._id_table
        assert table is not None
        engine.set_learning_rate(0.1)
        engine.add_gradients(batch, lambda sums: sums.sum(), last=True)
        assert engine.clip_and_step().isfinite()
        before = state_of(module, table)
        engine.add_gradients(batch, lambda sums: sums.sum(), last=True)
        rows = table._read[0][1] if broken == "ids" else projection_of(module.model).weight  # type: ignore[attr-defined]
        assert rows.grad is not None
        rows.grad[0] = torch.nan
        assert not engine.clip_and_step().isfinite()
        after = state_of(module, table)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        engine.add_gradients(batch, lambda sums: sums.sum(), last=True)
        assert engine.clip_and_step().isfinite()
        assert not torch.equal(state_of(module, table)["weights"], before["weights"])


def state_of(module: TrainingModule, table: SeparateIdTable) -> dict[str, Tensor]:
    weights = table.weights()
    assert weights is not None
    tensors = module.state_dict() | table.moments() | {"weights": weights}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_dropout_is_of_a_share_of_the_items_and_of_others_in_each_step() -> None:
    ids, drawn = torch.arange(100_000), []
    for seed in (0, 1):
        dropout = IdDropout(0.3, seed)
        for step in range(3):
            dropout.begin_step(step)
            drawn.append(dropout.left_out(ids))
            assert torch.equal(dropout.left_out(ids[70:90]), drawn[-1][70:90])
    for number, one in enumerate(drawn):
        assert one.float().mean().item() == pytest.approx(0.3, abs=0.01)
        for other in drawn[:number]:
            assert (one & other).float().mean().item() == pytest.approx(0.09, abs=0.01)
    rows = torch.ones(100_000, 2)
    assert torch.equal(dropout(rows, ids), (~drawn[-1])[:, None].expand(-1, 2).float())
    nothing = IdDropout(0.0, 0)
    assert not nothing.left_out(ids).any() and nothing(rows, ids) is rows
