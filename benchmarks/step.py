"""One training step (forward, backward, AdamW) against the authors' model, on the same batches and the same weights.

Batches of Beauty histories; random features of 1,024 + 1,024; sizes 8 … 1024, two blocks, dropout 0. Both sides get a
row 0 of zero features, since the authors' softmax counts their padding row, and AdamW with a learning rate of 0, so
that all batches have the same weights: the arithmetic is the same. With bf16 our products' inputs are bfloat16, theirs
stay float32. Nothing is reported if the losses (fp32: 1e-5, bf16: 2e-3) or the gradients (fp32: 1e-4) differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import describe_setting
from benchmarks.measuring.timing import forget_peak, in_child, interleave, peak_resident_bytes, spread
from benchmarks.parity import (
    Case,
    build_ours,
    build_reference,
    describe_reference,
    gradient,
    in_our_layout,
    load_reference,
    reference_loss,
    relative_errors,
)
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.data.batches import Packed
from fmrl_dist.data.windows import WindowRule, ragged_rows, target_windows
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import build_optimizer

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
FEATURE_DIM = 1024
FEATURE_NORM = 8.0  # so that scores differ by more than rounding
LOSS_BOUND = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_BOUND = 1e-4
REFERENCE_BATCH = 32
Step = Callable[[list[list[int]]], float]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of github.com/yueqirex/fMRLRec")
    parser.add_argument("--sequences", type=Path, required=True, help="Beauty's sequences.parquet (column item_ids)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=10, help="batches")
    parser.add_argument("--large-batch", type=int, default=256, help="histories of our batch of choice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=("theirs", "ours"), help="only run this side, print its peak memory")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    module = load_reference(arguments.reference)
    histories, num_items = read_histories(arguments.sequences)
    if arguments.memory_of is not None:
        step = Sides(module, num_items, arguments.precision, only=arguments.memory_of).step(arguments.memory_of)
        forget_peak()
        for number in range(2):
            step(draw(histories, number, REFERENCE_BATCH))
        print(peak_resident_bytes())
        return

    sides = Sides(module, num_items, arguments.precision)
    check(sides, draw(histories, 0, REFERENCE_BATCH), arguments.precision)
    losses: dict[str, list[float]] = {"theirs": [], "ours": []}

    def timed(name: str) -> Callable[[int], None]:
        step = sides.step(name)
        return lambda number: losses[name].append(step(draw(histories, number, REFERENCE_BATCH)))

    times = interleave({name: timed(name) for name in losses}, arguments.rounds)
    worst = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    refuse(worst <= LOSS_BOUND[arguments.precision], f"losses differ by {worst:.1e}")
    ours = sides.step("ours")
    (large,) = interleave(
        {"ours": lambda number: ours(draw(histories, number, arguments.large_batch))}, arguments.rounds
    ).values()

    rates = [arguments.large_batch / seconds for seconds in large.seconds]
    reference_rate = REFERENCE_BATCH / times["theirs"].median
    common = [str(arguments.reference), "--sequences", str(arguments.sequences), "--precision", arguments.precision]
    memory = {
        name: int(in_child("benchmarks.step", "--reference", *common, "--memory-of", name)) / 2**30 for name in losses
    }
    setting = {"reference": describe_reference(arguments.reference)} | describe_setting()
    for name, value in setting.items():
        print(f"{name:<10} {value}")
    targets = np.median([sum(len(h[-50:]) for h in draw(histories, n, 32)) for n in range(arguments.rounds)])
    print(f"work       V = {num_items:,}, {arguments.rounds} batches of 32 histories (median {targets:.0f} targets)")
    print(f"losses     equal to {worst:.1e}")
    print(f"theirs     {times['theirs']}, float32, peak memory {memory['theirs']:.2f} GiB")
    print(f"ours       {times['ours']}, {arguments.precision}, peak memory {memory['ours']:.2f} GiB")
    print(f"speed-up   {times['theirs'].over(times['ours'])}")
    print(
        f"rate       {spread(rates, ' histories/s')} at {arguments.large_batch} a batch, "
        f"{rates and np.median(rates) / reference_rate:.1f} times theirs at 32"
    )


def read_histories(path: Path) -> tuple[list[list[int]], int]:
    """Training slices (all but the last two events) with at least one event, 1-based; and the number of items."""
    require(path.is_file(), f"--sequences {path} does not exist; expected a Parquet file with a column item_ids")
    column = pq.read_table(path, columns=["item_ids"])["item_ids"].to_pylist()
    return [items[:-2] for items in column if len(items) > 2], max(max(items) for items in column)


def draw(histories: list[list[int]], number: int, count: int) -> list[list[int]]:
    """Batch ``number``, seeded by it."""
    rows = np.random.default_rng(number).choice(len(histories), count, replace=False)
    return [histories[row] for row in rows]


class Sides:
    """Both models with the same weights, and their steps; ``only`` one of them where its memory is measured."""

    def __init__(self, module: ModuleType, num_items: int, precision: str, only: str | None = None) -> None:
        torch.manual_seed(0)
        case = Case(0, SIZES, 2, (), num_items=num_items, feature_dim=FEATURE_DIM, moved=False)
        features = FEATURE_NORM * F.normalize(torch.randn(2, num_items, FEATURE_DIM), dim=2)
        if only != "ours":
            self.theirs = build_reference(module, case, features)
            trained = [parameter for parameter in self.theirs.parameters() if parameter.requires_grad]
            self._their_optimizer = torch.optim.AdamW(trained, lr=0.0)
        if only != "theirs":
            names = {"language": FEATURE_DIM, "image": FEATURE_DIM}
            model = FMRLRec(SIZES, 2, names) if only else build_ours(case, self.theirs)
            self.ours = training_module(model, features, precision)
            self._our_optimizer = build_optimizer(model, 0.0, (0.9, 0.999), 1e-8, 0.01)

    def step(self, name: str) -> Step:
        return self._their_step if name == "theirs" else self._our_step

    def their_loss(self, histories: list[list[int]]) -> Tensor:
        return reference_loss(self.theirs, histories, SIZES)

    def our_loss(self, histories: list[list[int]]) -> Tensor:
        batch = pack(histories)
        loss: Tensor = self.ours(batch).mean() / len(batch.targets)
        return loss

    def _their_step(self, histories: list[list[int]]) -> float:
        return one_step(self.their_loss(histories), self._their_optimizer)

    def _our_step(self, histories: list[list[int]]) -> float:
        return one_step(self.our_loss(histories), self._our_optimizer)


def training_module(model: FMRLRec, features: Tensor, precision: str, impl: str = "tiled") -> TrainingModule:
    """Our side over features [2, V, F], before them a row 0 of zeros."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    for part in model.modules():
        if hasattr(part, "matmul_dtype"):
            setattr(part, "matmul_dtype", dtype)  # noqa: B010 (typed as a submodule otherwise)
    rows = F.pad(torch.cat((features[0], features[1]), 1), (0, 0, 1, 0))
    columns = model.encoder.columns(rows, torch.ones(len(rows), 2, dtype=torch.bool)).to(dtype or torch.float32)
    return TrainingModule(model, columns, LossSettings(model.sizes, impl=impl, dtype=dtype))


def one_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def pack(histories: list[list[int]]) -> Packed:
    """The windows that training takes."""
    lengths = np.array([len(history) for history in histories])
    begins = np.cumsum(lengths) - lengths
    events = np.concatenate([np.asarray(history) for history in histories])
    owner, first, last = target_windows(lengths, WindowRule(50, "last", True))
    from_start = first == 0
    input_first = np.maximum(first - 1, 0)
    num_inputs = last - 1 - input_first
    return Packed(
        users=torch.from_numpy(owner),
        items=torch.from_numpy(events[ragged_rows(begins[owner] + input_first, num_inputs)]),
        starts=torch.from_numpy(np.concatenate(([0], np.cumsum(num_inputs)))),
        from_start=torch.from_numpy(from_start),
        targets=torch.from_numpy(events[ragged_rows(begins[owner] + first, last - first)]),
    )


def check(sides: Sides, histories: list[list[int]], precision: str) -> None:
    """Losses of both sides and, in float32, every gradient."""
    theirs, ours = sides.their_loss(histories), sides.our_loss(histories)
    error = abs(theirs.item() - ours.item()) / theirs.item()
    refuse(error <= LOSS_BOUND[precision], f"losses differ by {error:.1e}: {theirs.item()} and {ours.item()}")
    theirs.backward()
    ours.backward()
    if precision == "fp32":
        expected = in_our_layout(sides.theirs, SIZES, gradient)
        for name, parameter in sides.ours.model.named_parameters():
            norm_error = relative_errors(gradient(parameter), expected.get(name, torch.zeros_like(parameter)))[0]
            refuse(norm_error <= GRADIENT_BOUND, f"gradients of {name} differ by {norm_error:.1e}")
    for model in (sides.theirs, sides.ours):
        assert isinstance(model, nn.Module)
        model.zero_grad()


def refuse(equal: bool, problem: str) -> None:
    """End without figures unless the two sides are equal."""
    if not equal:
        print(f"NOT EQUAL: {problem}; nothing is reported", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
