"""The full softmax with the catalogue split over one-thread ranks, against one rank and against plain products.

W processes meet over gloo on this machine. In a round, rank 0 first works alone, over the whole catalogue and the whole
batch, while the others wait; then all work together, the catalogue split, the same batch dealt out. What one process
could gain at best from sharing this machine is measured by a plain product [N, D] · [D, V], alone and in W parts.

    loss      outputs → losses → gradients of outputs and projection, with the exchange, without the model
    step      forward, backward, reduction of the gradients, AdamW
    product   the plain product

Strong scaling: the same catalogue. Weak: W times the catalogue, so that each rank has as many items as one alone had.
Nothing is reported if the losses of both ways differ by more than 1e-5. Bytes: those that the ranks sent each other for
the loss, as counted at the calls, as predicted by formula, and as the loopback device carried (other traffic included).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import describe_setting
from benchmarks.measuring.timing import in_child, spread
from benchmarks.step import one_step
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.nested_cross_entropy import catalogue_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.split_catalogue import CatalogueSlice, exchanged_bytes
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.projection import ProjectionEncoder
from fmrl_dist.training.item_columns import TableColumns, catalogue_columns, catalogue_slice
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import build_optimizer

SIZES = (8, 16, 32, 64, 128, 256, 512)
FEATURE_DIM = 384
LENGTH = 8  # items of a history; nine positions
LOSS_BOUND = 1e-5
WORKS = ("loss", "step", "product")
SCALINGS = ("strong", "weak")
LOOPBACK = Path("/sys/class/net/lo/statistics/rx_bytes")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=200_000, help="of the catalogue that one rank scores alone")
    parser.add_argument("--histories", type=int, default=128, help="of the whole batch, nine positions each")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="how many, of one thread each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=SCALINGS, help="only measure this one, as one of the ranks")
    arguments = parser.parse_args(argv)
    require(min(arguments.ranks) > 1, f"--ranks is {arguments.ranks}; expected at least 2")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if arguments.case:
        measure(arguments.items, arguments.histories, arguments.rounds, arguments.case)
        return
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    positions = arguments.histories * (LENGTH + 1)
    print(f"work       {positions:,} positions, {FEATURE_DIM} features, sizes {list(SIZES)}, {arguments.rounds} rounds")
    for scaling in SCALINGS:
        print(f"\n{scaling} scaling: {arguments.items:,} items {'in all' if scaling == 'strong' else 'of each rank'}\n")
        print(
            f"| ranks | {' | '.join(f'{work}, alone and together' for work in WORKS)} | MB sent: counted, formula, lo "
            "| loss over product |"
        )
        print(f"|---|{'---|' * len(WORKS)}---|---|", flush=True)
        for num_ranks in arguments.ranks:
            print(row(num_ranks, arguments, scaling), flush=True)


def row(num_ranks: int, arguments: argparse.Namespace, scaling: str) -> str:
    """One line of a table, measured by ``num_ranks`` new processes."""
    given = [f"--{key}={getattr(arguments, key)}" for key in ("items", "histories", "rounds")]
    words = ["--standalone", f"--nproc-per-node={num_ranks}", "-m", "benchmarks.scaling", *given, "--case", scaling]
    found = json.loads(in_child("torch.distributed.run", *words).splitlines()[-1])
    cells = [describe(**found[work]) for work in WORKS]
    megabytes = ", ".join(f"{found[key] / 1e6:.2f}" for key in ("counted", "predicted", "carried"))
    ours, products = (median_ratio(**found[work]) for work in ("loss", "product"))
    return f"| {num_ranks} | {' | '.join(cells)} | {megabytes} | {ours / products:.2f} |"


def median_ratio(alone: list[float], together: list[float]) -> float:
    return statistics.median(ours / one for ours, one in zip(together, alone, strict=True))


def describe(alone: list[float], together: list[float]) -> str:
    """Medians, and the median and range of the rounds' ratios."""
    ratios = [ours / one for ours, one in zip(together, alone, strict=True)]
    return f"{statistics.median(alone):.3g} s, {statistics.median(together):.3g} s: {spread(ratios, '')}"


def measure(num_items: int, num_histories: int, rounds: int, scaling: str) -> None:
    """One rank's part; rank 0 prints JSON."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    total = num_items * (num_ranks if scaling == "weak" else 1)
    table = make_table(total)
    batch = make_batch(num_histories, num_items)
    mine = share(batch, rank, num_ranks)
    together = Side(table, True)
    alone = Side(shortened(table, num_items), False) if rank == 0 else None
    same = same_losses(together, table, batch, mine)
    sent, carried = count_bytes(lambda: together.loss(mine))
    result: dict[str, Any] = {
        "counted": sent,
        "carried": carried,
        "predicted": exchanged_bytes(len(batch.targets), num_ranks, SIZES[-1], len(SIZES)),
    }
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "loss": (lambda: alone and alone.loss(batch), lambda: together.loss(mine)),
        "step": (lambda: alone and alone.step(batch), lambda: together.step(mine)),
        "product": (product(len(batch.targets), num_items), product(len(batch.targets), -(-total // num_ranks))),
    }
    for name, (one, all_of_us) in works.items():
        result[name] = timed(one, all_of_us, rounds)
    if rank == 0 and not same:
        print("NOT EQUAL: the losses of one rank and of all differ; nothing is reported", file=sys.stderr)
        sys.exit(1)
    if rank == 0:
        print(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class Side:
    """The training module over a table, on one rank alone or with the catalogue split over all."""

    def __init__(self, table: ItemTable, split: bool) -> None:
        torch.manual_seed(0)
        model = FMRLRec(SIZES, 2, table.dims)
        columns: RowMatrix = TableColumns(model.encoder, table, torch.float32)
        part = None
        if split:
            part = catalogue_slice(model.encoder, table, torch.float32, dist.get_rank(), dist.get_world_size())
        else:
            columns = catalogue_columns(model.encoder, table, torch.float32)
        self.module = TrainingModule(model, columns, LossSettings(SIZES), part=part)
        self._scored: RowMatrix | CatalogueSlice = columns if part is None else part
        self._wrapped = DistributedDataParallel(self.module) if split else self.module
        self._optimizer = build_optimizer(model, 0.0, (0.9, 0.999), 1e-8, 0.01)  # all rounds have the same weights
        assert isinstance(model.encoder, ProjectionEncoder)
        self._projection = model.encoder.projection().detach().requires_grad_()

    def loss(self, batch: Packed) -> Tensor:
        """Losses of random outputs, and their gradients."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(batch.targets), SIZES[-1], generator=generator).requires_grad_()
        own = torch.randn(len(batch.targets), SIZES[-1], generator=generator)
        losses = catalogue_cross_entropy(z, own, self._scored, self._projection, None, LossSettings(SIZES))
        losses.sum().backward()
        return losses

    def step(self, batch: Packed) -> float:
        return one_step(self._wrapped(batch).mean() / len(batch.targets), self._optimizer)


def same_losses(together: Side, table: ItemTable, batch: Packed, mine: Packed) -> bool:
    """Whether the ranks' losses add up to those of one rank over the same catalogue; rank 0 knows."""
    losses = together.module(mine).detach()
    dist.all_reduce(losses)
    same = True
    if dist.get_rank() == 0:
        expected = Side(table, False).module(batch).detach()
        same = bool(((losses - expected).abs() <= LOSS_BOUND * expected.abs()).all())
    dist.barrier()
    return same


def timed(one: Callable[[], object], all_of_us: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, on rank 0: until the last rank is done."""
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for number in range(-1, rounds):
        for name, work in (("alone", one), ("together", all_of_us)):
            dist.barrier()
            began = time.perf_counter()
            if name == "together" or dist.get_rank() == 0:
                work()
            dist.barrier()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def count_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """What all ranks send each other in ``work``: at the calls, and over the loopback device."""
    sent = torch.zeros(1, dtype=torch.int64)
    exchange = dist.all_to_all_single

    def counting(output: Tensor, rows: Tensor, received: list[int], counts: list[int]) -> object:
        sent.add_((sum(counts) - counts[dist.get_rank()]) * rows.shape[1] * rows.element_size())
        return exchange(output, rows, received, counts)

    dist.barrier()
    before = int(LOOPBACK.read_text())
    with mock.patch.object(dist, "all_to_all_single", counting):
        work()
    dist.barrier()
    carried = int(LOOPBACK.read_text()) - before
    dist.all_reduce(sent)
    return int(sent), carried


def product(num_positions: int, num_items: int) -> Callable[[], object]:
    """A plain product of as many positions and items."""
    z, items = torch.randn(num_positions, SIZES[-1]), torch.randn(SIZES[-1], num_items)
    result = torch.empty(num_positions, num_items)
    return lambda: torch.mm(z, items, out=result)


def make_table(num_items: int) -> ItemTable:
    """Random features, the same on all ranks."""
    values = torch.randn(num_items, FEATURE_DIM, generator=torch.Generator().manual_seed(0)) / FEATURE_DIM**0.5
    return ItemTable({"text": FEATURE_DIM}, values.half(), torch.ones(num_items, 1, dtype=torch.bool))


def shortened(table: ItemTable, num_items: int) -> ItemTable:
    return ItemTable(table.dims, table.values[:num_items], table.present[:num_items])


def make_batch(num_histories: int, num_items: int) -> Packed:
    """Histories of ``LENGTH`` items after a start position."""
    events = torch.randint(num_items, (num_histories, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return pack(events)


def share(batch: Packed, rank: int, num_ranks: int) -> Packed:
    """Every ``num_ranks``-th history."""
    return pack(batch.targets.view(-1, LENGTH + 1)[rank::num_ranks])


def pack(events: Tensor) -> Packed:
    return Packed(
        users=torch.arange(len(events)),
        items=events[:, :-1].flatten(),
        starts=torch.arange(len(events) + 1) * LENGTH,
        from_start=torch.ones(len(events), dtype=torch.bool),
        targets=events.flatten(),
    )


if __name__ == "__main__":
    run_command(main)
