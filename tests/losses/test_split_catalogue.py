"""The full softmax with the catalogue split over gloo ranks: loss and every gradient are those of one process.

The reference is the plain loss over all scores, in one process, in float64. The ranks do what training does: each sums
its own positions' losses, multiplies by their number and goes backward; parameters' gradients are averaged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fmrl_dist.losses.nested_cross_entropy import catalogue_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.split_catalogue import CatalogueSlice, exchanged_bytes
from fmrl_dist.losses.tiled_log_sum_exp import TILE_ITEMS
from tests.fixtures.normalizers import DISTILLED
from tests.fixtures.numerics import assert_relatively_close
from tests.fixtures.processes import run_processes

pytestmark = pytest.mark.multiproc

SIZES = (4, 9, 16, 35)
TEMPERATURES = (0.5, 1.0, 2.0, 1.3)
FEATURES = 23
TRAINED = ("inputs", "mixer", "projection", "table")


@dataclass(frozen=True)
class Case:
    """How positions and items are dealt out, and what varies besides."""

    positions: tuple[int, ...]  # of each rank
    items: tuple[int, ...]  # of each rank
    with_table: bool = False
    sizes: tuple[int, ...] = SIZES
    impl: str = "tiled"
    distilled: str = "alone"
    seed: int = 0


CASES_OF_RANKS = {
    2: {
        "even": Case((13, 13), (150, 150)),
        "uneven": Case((5, 40), (307, 90), with_table=True),
        "several tiles": Case((60, 600), (TILE_ITEMS + 3, 2 * TILE_ITEMS + 1), with_table=True),
        "a rank without positions": Case((0, 21), (60, 61), with_table=True),
        "distilled": Case((5, 40), (307, 90), with_table=True, distilled="distilled"),
        "softer, a rank without items": Case((9, 14), (0, 101), distilled="softer"),
        "no positions": Case((0, 0), (60, 61), with_table=True),
        "a rank without items": Case((9, 14), (0, 101), with_table=True),
        "one size": Case((9, 14), (50, 51), sizes=SIZES[-1:]),
        "plain": Case((5, 40), (307, 90), with_table=True, impl="plain"),
        "plain, a rank without items": Case((5, 40), (120, 0), impl="plain"),
    },
    4: {
        "uneven": Case((7, 0, 31, 2), (100, 3, 57, 1), with_table=True),
        "more ranks than sizes": Case((7, 6, 5, 8), (25, 26, 25, 26), with_table=True, sizes=(9, 35)),
        "distilled": Case((7, 0, 31, 2), (100, 3, 57, 1), with_table=True, distilled="softer"),
        "more ranks than items": Case((7, 0, 31, 2), (1, 0, 1, 1), with_table=True),
        "one rank has all": Case((0, 0, 17, 0), (0, 77, 0, 0)),
    },
}


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Everything of all ranks. The outputs are ``inputs`` times the parameter ``mixer``, so z has a gradient."""
    generator = torch.Generator().manual_seed(case.seed)
    num_positions, num_items = sum(case.positions), sum(case.items)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "inputs": draw(num_positions, 6),
        "mixer": draw(6, SIZES[-1]),
        "projection": draw(SIZES[-1], FEATURES) / FEATURES**0.5,
        "table": draw(num_items, SIZES[-1]),
        "columns": draw(num_items, FEATURES),
        "targets": torch.randint(num_items, (num_positions,), generator=generator),
        "size_weights": draw(len(case.sizes)),
    }


def loss_sums(tensors: dict[str, Tensor], catalogue: Tensor | CatalogueSlice, case: Case, impl: str) -> Tensor:
    """Loss of each size, [S], as the training module asks for it."""
    projection, table = tensors["projection"], tensors["table"] if case.with_table else None
    targets = tensors["targets"]
    items = tensors["columns"][targets] @ projection.T
    items = items if table is None else items + table[targets]
    settings = LossSettings(case.sizes, TEMPERATURES[: len(case.sizes)], impl, **DISTILLED[case.distilled])
    z = tensors["inputs"] @ tensors["mixer"]
    if table is not None and isinstance(catalogue, CatalogueSlice):
        table = table[catalogue.begin : catalogue.begin + len(catalogue.columns[:])]
    return catalogue_cross_entropy(z, items, catalogue, projection, table, settings)


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: tensors[name] for name in TRAINED if tensors[name].requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(trained.items(), found, strict=True)
    }


def alone(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sums and gradients of one process that holds everything."""
    tensors = {name: t.requires_grad_() if name in TRAINED else t for name, t in make_inputs(case).items()}
    sums = loss_sums(tensors, tensors["columns"], case, "plain")
    return sums.detach(), gradients(sums @ tensors["size_weights"], tensors)


def on_each_rank(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases one after the other: this rank's loss sums, its inputs' gradient, and the parameters', averaged."""
    found = []
    for fields in cases:
        case = Case(**fields)
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        whole = make_inputs(case)
        (first, last), (low, high) = ((sum(n[:rank]), sum(n[: rank + 1])) for n in (case.positions, case.items))
        own = whole | {name: whole[name][first:last] for name in ("inputs", "targets")}
        own = {name: t.clone().requires_grad_() if name in TRAINED else t for name, t in own.items()}
        sums = loss_sums(own, CatalogueSlice(whole["columns"][low:high], low), case, case.impl)
        result = gradients(sums @ own["size_weights"] * num_ranks, own)
        for name in TRAINED[1:]:
            dist.all_reduce(result[name])
            result[name] /= num_ranks
        found.append({name: tensor.tolist() for name, tensor in (result | {"sums": sums.detach()}).items()})
    return found


@pytest.mark.parametrize("num_ranks", CASES_OF_RANKS)
def test_loss_and_gradients_are_those_of_one_process(num_ranks: int) -> None:
    cases = CASES_OF_RANKS[num_ranks]
    ranks = run_processes(num_ranks, on_each_rank, [asdict(case) for case in cases.values()])
    for number, (name, case) in enumerate(cases.items()):
        sums, grads = alone(case)
        found = [{key: torch.tensor(v, dtype=torch.float64) for key, v in rank[number].items()} for rank in ranks]
        try:
            assert_relatively_close(torch.stack([rank["sums"] for rank in found]).sum(0), sums, 1e-9)
            # Each rank's inputs are its own: averaging would divide what the loss was multiplied by.
            inputs = torch.cat([rank["inputs"].view(-1, grads["inputs"].shape[1]) for rank in found]) / num_ranks
            assert_relatively_close(inputs, grads["inputs"], 1e-9)
            for parameter in TRAINED[1:]:
                for rank in found:
                    assert_relatively_close(rank[parameter], grads[parameter], 1e-9)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_exchanged_bytes() -> None:
    """Two ranks of three positions each, width 5, two sizes: z and partials there, their gradients back."""
    assert exchanged_bytes(6, 2, 5, 2) == 2 * (3 * 5 + 3 * 5 + 3 * 2 + 3 * 2) * 4
    assert exchanged_bytes(6, 1, 5, 2) == 0
    assert exchanged_bytes(6, 2, 5, 2, distilled=True) == exchanged_bytes(6, 2, 5, 2) + 2 * (3 * 3 + 3 * 3) * 4
