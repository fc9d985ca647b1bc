"""``python -m fmrl_dist.plan --items V --gpus W``: what a training step costs each rank, by loss, and which to take.

    whole    full softmax; every rank scores all items for its own positions      loss.softmax: full
    split    full softmax; every rank scores a slice of them for all positions    the same, loss.catalogue: split
    sampled  every rank scores its lanes' negatives                               loss.softmax: sampled

Bytes and floating-point operations are counted from the operators' shapes, in the terms below. Three constants are
measured, on a CPU: what a block keeps of each position and channel for its backward pass, the copies that the parts of
a step hold at once, and the share of the machine's matmul rate that a step reaches. Tests compare the predicted memory
with the measured peak of small steps on a CPU. Memory excludes the process itself (about half a GiB on a CPU; the
context on a GPU) and a memory-mapped item table. All micro-batches count as large as the largest of them.

On a GPU the loss runs as Triton tiles (``loss.impl: auto``), and a step reaches another share of the matmul rate:
``GPU_RATE_SHARE``, from one H100 (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import compress

import torch

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.config.command_line import command_parser, parse_command
from fmrl_dist.config.sections import Config
from fmrl_dist.evaluation.split_catalogue import is_shared
from fmrl_dist.losses.item_tiles import back_projected
from fmrl_dist.losses.split_catalogue import exchanged_bytes
from fmrl_dist.losses.tiled_log_sum_exp import tile_limits
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.nested import chunks
from fmrl_dist.training.item_columns import RESIDENT_BYTES, RESIDENT_SHARE

LOSSES = ("whole", "split", "sampled")
SETTINGS = {
    "whole": "loss.softmax: full",
    "split": "loss.softmax: full, loss.catalogue: split",
    "sampled": "loss.softmax: sampled",
}
FLOAT = 4  # bytes
ADAM_COPIES = 4  # of each parameter: itself, its gradient, two moments
TABLE_COPIES = 3  # of an id table of which a step updates some rows: no gradient of all
EXPERT_COPIES = (
    1.5  # of what each expert makes of an item, kept for the backward pass while the loss is at work; measured
)
ROW_COPIES = 3  # of these rows, measured: exchanged, added up, their moments before and after
BLOCK_FLOATS = 14  # of each position and channel, that a block keeps for its backward pass; measured
DROPOUT_FLOATS = 3.5  # the same, more with dropout
PASSING_FLOATS = 16  # the same, of the one block that is at work
BLOCK_PRODUCTS = 7 * 2 / 3  # D² multiplications of a position in a block: B and C complex, three in the FFN; nested: ⅔
RATE_SHARE = 0.6  # of a CPU's matmul rate; measured: 0.53 … 0.67 (docs/performance.md)
GPU_RATE_SHARE = {2: 0.2, 4: 0.8}  # of a GPU's, by the products' itemsize; measured: 0.17 … 0.23 and 0.8
FIT_SHARE = 0.9  # of a rank's memory that a plan may fill


@dataclass(frozen=True)
class Step:
    """What the cost of a training step depends on."""

    sizes: tuple[int, ...]
    depth: int
    num_features: int  # F, dims of all features together
    num_items: int  # V
    id_width: int  # w of the id table; 0 for none
    id_dropout: bool
    dropout: bool
    num_ranks: int
    positions: int  # of one rank, in one of its micro-batches
    negatives: int  # that a position is scored against, with sampled softmax
    drawn: int  # rows of items that a rank embeds for its negatives
    itemsize: int  # bytes of the products' inputs
    on_gpu: bool
    memory_bytes: int  # of one rank
    micro_batches: int = 1  # one after the other, their gradients added
    distilled: bool = False  # whether smaller sizes learn from the largest one
    experts: int = 0  # of UniSRec's item encoder, for a sampled softmax; 0: the paper's projection
    inline: bool = False  # whether features ride with the histories, for a sampled softmax: no columns are held

    @property
    def width(self) -> int:
        return self.sizes[-1]


@dataclass(frozen=True)
class Cost:
    """What one rank spends on a step."""

    memory: dict[str, int]  # bytes, by what they hold
    operations: float  # of the products; a multiplication and an addition are two
    sent_bytes: int  # for the loss, beside the gradients
    read_bytes: int  # of the item table where it lies, since its columns do not fit
    validation_bytes: int = 0  # in all, while it validates

    @property
    def num_bytes(self) -> int:
        return max(sum(self.memory.values()), self.validation_bytes)


def predict(step: Step, loss: str) -> Cost:
    """Cost of a step under one of ``LOSSES``."""
    with torch.device("meta"):
        kind = "unisrec" if step.experts else "projection"
        dims = {"features": step.num_features}
        model = FMRLRec(step.sizes, step.depth, dims, item_encoder=kind, experts=step.experts)
    num_columns, full = model.encoder.num_columns, loss != "sampled"
    assert not (full and (step.experts or step.inline)), "not predicted"
    copies = ADAM_COPIES + (step.num_ranks > 1)  # data parallelism reduces gradients in buckets
    ids = _ids(step, loss, copies)
    weights = FLOAT * copies * sum(p.numel() for p in model.parameters()) + ids
    loss_cost = (_full if full else _sampled)(step, num_columns, loss == "split")
    own_items = step.num_items if loss != "split" else -(-step.num_items // step.num_ranks)
    columns = own_items * num_columns * step.itemsize
    resident = columns <= (RESIDENT_SHARE * step.memory_bytes if step.on_gpu else RESIDENT_BYTES)
    read = 0 if resident or not full else 2 * own_items * step.num_features * 2  # float16, forward and backward
    batch_rows = 2 * step.positions  # inputs and targets, gathered from what is embedded once
    batch = FLOAT * (2 * batch_rows * step.width + batch_rows * (num_columns + step.width))
    projection = FLOAT * 3 * step.width * num_columns  # put together of its parts, padded, and its gradient
    if step.experts:
        projection = int(FLOAT * EXPERT_COPIES * (batch_rows + step.drawn) * step.experts * step.width)
    channels = FLOAT * step.positions * step.width
    kept = int(channels * step.depth * (BLOCK_FLOATS + DROPOUT_FLOATS * step.dropout))
    # The loss is at work while no block is, and has nothing left when they are.
    at_work = max(loss_cost.num_bytes, PASSING_FLOATS * channels)
    memory = {
        "weights, gradients, moments": weights,
        "item columns": columns if resident and not step.inline else 0,
        "kept of blocks and batch": kept + batch + projection,
        "loss": at_work,
    }
    model_operations = 6 * step.positions * step.depth * BLOCK_PRODUCTS * step.width**2
    batch_operations = 4 * batch_rows * step.width * num_columns * max(step.experts, 1)  # frozen: no features' gradient
    shared = is_shared(step.num_items, step.width, step.num_ranks, loss == "split")
    ranked = -(-step.num_items // step.num_ranks) if shared else step.num_items
    ids_again = ranked * step.id_width * (loss == "split")  # by whole tiles, as they are ranked
    validation = weights + memory["item columns"] + FLOAT * (ranked * step.width + ids_again)
    operations = model_operations + batch_operations + loss_cost.operations
    times = step.micro_batches
    return Cost(memory, times * operations, times * loss_cost.sent_bytes, times * read, validation)


def _ids(step: Step, loss: str, copies: int) -> int:
    """Bytes of the id table, its gradient and moments."""
    if loss == "sampled":
        batch_rows = step.num_ranks * (step.drawn + 2 * step.positions)
        return FLOAT * step.id_width * (TABLE_COPIES * step.num_items + ROW_COPIES * min(batch_rows, step.num_items))
    rows = step.num_items if loss == "whole" else -(-step.num_items // step.num_ranks)
    # Two gradients are added, of the batch's items and of the scored ones; dropout makes a copy.
    return FLOAT * step.id_width * rows * ((copies if loss == "whole" else ADAM_COPIES) + 1 + step.id_dropout)


def _full(step: Step, num_columns: int, split: bool) -> Cost:
    positions = step.positions * (step.num_ranks if split else 1)
    num_items = -(-step.num_items // step.num_ranks) if split else step.num_items
    back = back_projected(step.sizes, positions, num_columns)
    if step.id_width or step.on_gpu:
        back = (False,) * len(back)
    widths = [high - low for low, high in chunks(step.sizes)]
    embedded = sum(compress(widths, [not b for b in back]))
    rows = sum(back) * positions + embedded  # that meet the columns: positions projected back, channels of items
    tiles = _tiles(step, positions, num_items, rows)
    memory = tiles.num_bytes
    memory += FLOAT * (2 * rows * num_columns + 4 * positions * step.width)  # projector; z by chunks, their gradients
    memory += FLOAT * 4 * positions * step.width * split  # repeated, everyone's, and the way back
    operations = num_items * (
        2 * rows * num_columns * (tiles.projections + 1)  # all factors of the columns, and their gradient
        + 2 * positions * embedded * (tiles.scores + 2)
    )
    everything = exchanged_bytes(positions, step.num_ranks, step.width, len(step.sizes), distilled=step.distilled)
    return Cost({"loss": memory}, operations, everything // step.num_ranks if split else 0, 0)


def _sampled(step: Step, num_columns: int, split: bool) -> Cost:
    assert not split, "negatives are each rank's own"
    tiles = _tiles(step, step.positions, step.negatives, step.width)
    memory = tiles.num_bytes + FLOAT * (step.drawn * (num_columns + 3 * step.width) + 4 * step.positions * step.width)
    embedding = 4 * step.drawn * step.width * num_columns * max(step.experts, 1)
    operations = embedding + 2 * step.positions * step.negatives * step.width * (tiles.scores + 2)
    return Cost({"loss": memory}, operations, 0, 0)


@dataclass(frozen=True)
class _Tiles:
    """Memory of the loss's tiles, and what is computed again in the backward pass."""

    num_bytes: int  # held at once, with what is kept
    projections: float  # how often each item is projected, forward and backward
    scores: float  # how often each score is computed, likewise


def _tiles(step: Step, positions: int, num_items: int, rows: int) -> _Tiles:
    """Tiles of PyTorch's operators, or of Triton kernels on a GPU.

    ``rows`` of each item are held once forward and once for the gradients: its channels, positions projected back.
    """
    impl, num_sizes = ("triton" if step.on_gpu else "tiled"), len(step.sizes)
    limits = tile_limits(impl, step.on_gpu)
    items, tile_positions = min(limits.items, num_items), min(limits.positions, positions)
    rows_bytes = FLOAT * items * (2 * rows + step.num_features)
    if impl == "triton":  # keeps embeddings alone; subtracts each chunk from the scores after its gradient
        all_bytes = FLOAT * num_items * step.width
        kept = min(limits.kept_bytes / max(all_bytes, 1), 1.0)
        kept_bytes = int(kept * step.itemsize * num_items * step.width)
        gradients = step.itemsize * num_sizes * tile_positions * items
        return _Tiles(kept_bytes + gradients + rows_bytes, projections=2 - kept, scores=3)
    all_bytes = FLOAT * num_items * (num_sizes * positions + step.width)
    kept_bytes = min(limits.kept_bytes, all_bytes)
    scores = num_sizes * tile_positions * (kept_bytes < all_bytes)  # otherwise all of them are kept
    passes = 2 - kept_bytes / max(all_bytes, 1)
    return _Tiles(kept_bytes + rows_bytes + FLOAT * items * scores, projections=passes, scores=passes)


def rate_share(step: Step) -> float:
    """Share of the machine's matmul rate that a step reaches."""
    return GPU_RATE_SHARE[step.itemsize] if step.on_gpu else RATE_SHARE


def fitting(costs: dict[str, Cost], memory_bytes: int) -> list[str]:
    """The losses whose memory a rank has."""
    return [loss for loss, cost in costs.items() if cost.num_bytes <= FIT_SHARE * memory_bytes]


def recommend(
    costs: dict[str, Cost], memory_bytes: int, seconds: Callable[[Cost], float] | None, max_step_s: float
) -> tuple[str, str]:
    """A loss and the reason: the exact one where it fits and is fast enough, of two exact ones the cheaper.

    Args:
        costs: of ``LOSSES``.
        memory_bytes: of one rank.
        seconds: predicted of a step; None where the machine's rate is not known.
        max_step_s: longest step that is taken for an exact loss.

    Raises:
        UserError: none of them fits.
    """
    fits = fitting(costs, memory_bytes)
    least = min(costs.values(), key=lambda cost: cost.num_bytes).num_bytes
    require(
        bool(fits),
        f"no loss fits: a step needs at least {least / 2**30:.1f} GiB of a rank's {memory_bytes / 2**30:.1f}; take "
        "fewer positions at once (train.micro_batches, train.batch_size), a narrower id table or none (model.id_width, "
        "model.id_table), or add ranks",
    )
    exact = sorted((loss for loss in fits if loss != "sampled"), key=lambda loss: costs[loss].operations)
    if not exact:
        return "sampled", "no full softmax fits the memory" if len(costs) > 1 else "the only one that is predicted"
    first = exact[0]
    if seconds is not None and seconds(costs[first]) > max_step_s and "sampled" in fits:
        return "sampled", f"a step of the full softmax takes {seconds(costs[first]):.1f} s, more than {max_step_s:g}"
    less = "; it costs no more than the other exact one" if len(exact) > 1 else ""
    return first, f"exact, and it fits{less}"


def table(costs: dict[str, Cost], seconds: Callable[[Cost], float] | None) -> str:
    """Markdown: a row a loss."""
    parts = list(next(iter(costs.values())).memory)
    head = ["loss", "memory, GiB", *parts, "in validation", "TFLOP", "MB sent", "GB read"]
    head += ["seconds"] if seconds else []
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for loss, cost in costs.items():
        numbers = (cost.num_bytes, *cost.memory.values(), cost.validation_bytes)
        gib = [f"{num_bytes / 2**30:.2f}" for num_bytes in numbers]
        end = [f"{cost.operations / 1e12:.3g}", f"{cost.sent_bytes / 1e6:.3g}", f"{cost.read_bytes / 1e9:.3g}"]
        end += [f"{seconds(cost):.3g}"] if seconds else []
        lines.append(f"| {' | '.join((loss, *gib, *end))} |")
    return "\n".join(lines)


def step_of(
    config: Config, num_items: int, num_ranks: int, num_features: int, positions: int, on_gpu: bool, memory_bytes: int
) -> Step:
    """The step of a configuration. ``positions`` are those of the whole batch."""
    loss, lanes = config.loss, config.train.num_lanes
    drawn = 0 if loss.negatives == "in_batch" else loss.num_negatives
    others = -(-positions // lanes) if loss.negatives in ("in_batch", "mixed", "stratified") else 0
    own_lanes = -(-lanes // num_ranks)
    micro_batches = min(config.train.micro_batches, own_lanes)  # others are empty
    lanes_at_once = -(-own_lanes // micro_batches)
    lanes_seen, lanes_embedded = (lanes, lanes) if loss.scope == "batch" else (1, lanes_at_once)
    return Step(
        sizes=config.model.sizes,
        depth=config.model.depth,
        num_features=num_features,
        num_items=num_items,
        id_width=(config.model.id_width or config.model.width) * config.model.has_ids,
        id_dropout=config.model.id_dropout_rate > 0,
        dropout=any(config.model.dropout_rates.values()),
        num_ranks=num_ranks,
        positions=lanes_at_once * -(-positions // lanes),
        negatives=(drawn + others) * lanes_seen,
        drawn=(drawn + others) * lanes_embedded,
        itemsize=2 if config.train.precision == "bf16" else 4,
        on_gpu=on_gpu,
        memory_bytes=memory_bytes,
        micro_batches=micro_batches,
        distilled=loss.alphas(len(config.model.sizes)) is not None,
        experts=config.model.experts * (config.model.item_encoder == "unisrec"),
        inline=config.store.feature_mode == "inline",
    )


def check_is_predicted(config: Config) -> None:
    """Refuse a configuration whose cost the terms above do not count.

    Raises:
        UserError: its scores, item encoder or mixer are of that kind.
    """
    require(
        not config.loss.normalize, "loss.normalize is on, whose cost is not predicted; turn it off to plan without it"
    )
    require(
        config.model.item_encoder != "vqrec",
        "model.item_encoder is vqrec, whose cost is not predicted; choose projection to plan without it",
    )
    require(
        config.model.item_encoder != "unisrec" or config.loss.softmax == "sampled",
        "model.item_encoder is unisrec and loss.softmax full, whose cost is not predicted; choose sampled, or "
        "projection",
    )
    require(
        config.store.feature_mode == "table" or config.loss.softmax == "sampled",
        "store.feature_mode is inline and loss.softmax full, which needs a table of items; choose sampled, or table",
    )
    require(
        config.model.mixer == "lru",
        f"model.mixer is {config.model.mixer}, whose cost is not predicted; plan with lru: its loss costs the same",
    )


def main(argv: list[str]) -> None:
    parser = command_parser("fmrl_dist.plan", "Predict what a training step costs each rank, and recommend a loss.")
    parser.add_argument("--items", type=int, required=True, help="of the catalogue")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--gpus", type=int, help="ranks, each with a GPU")
    ranks.add_argument("--cpus", type=int, help="ranks on processors")
    parser.add_argument("--feature-dims", type=int, default=384, help="of all features together (default: 384)")
    parser.add_argument("--positions", type=int, help="of a batch (default: all histories as long as data.max_length)")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="of a rank (default: 80)")
    parser.add_argument("--teraflops", type=float, help="a second, of large products on a rank: predicts seconds")
    parser.add_argument("--max-step-s", type=float, default=2.0, help="longest step of an exact loss (default: 2)")
    arguments, config = parse_command(parser, argv)
    num_ranks = arguments.gpus if arguments.gpus is not None else arguments.cpus
    teraflops = arguments.teraflops
    lanes = config.train.num_lanes
    require(arguments.items > 0, f"--items is {arguments.items}; expected at least 1")
    config = replace(config, train=replace(config.train, batch_size=config.train.largest_batch_size))
    config = config.resolved(arguments.items, num_users=1, num_events=1, has_features=arguments.feature_dims > 0)
    positions = config.train.histories_per_step * config.data.max_length
    positions = positions if arguments.positions is None else arguments.positions
    require(num_ranks > 0, f"--gpus or --cpus is {num_ranks}; expected at least 1")
    require(
        num_ranks <= lanes,
        f"{num_ranks} ranks share {lanes} lanes; raise --train.lanes (a divisor of train.batch_size) or take fewer",
    )
    require(positions > 0, f"--positions is {positions}; expected at least 1")
    require(arguments.feature_dims >= 0, f"--feature-dims is {arguments.feature_dims}; expected at least 0")
    for name in ("memory_gib", "teraflops", "max_step_s"):
        value = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        require(value is None or 0 < value < math.inf, f"{option} is {value}; expected a number of more than 0")
    check_is_predicted(config)
    memory_bytes = int(arguments.memory_gib * 2**30)
    step = step_of(
        config,
        num_items=arguments.items,
        num_ranks=num_ranks,
        num_features=arguments.feature_dims,
        positions=positions,
        on_gpu=arguments.gpus is not None,
        memory_bytes=memory_bytes,
    )
    possible = ("sampled",) if step.experts or step.inline else LOSSES
    costs = {loss: predict(step, loss) for loss in possible if loss != "split" or num_ranks > 1}

    def seconds(cost: Cost) -> float:
        return cost.operations / (rate_share(step) * teraflops * 1e12)

    at_once = f"in each of {step.micro_batches} micro-batches" if step.micro_batches > 1 else "a step"
    print(
        f"{num_ranks} rank(s), {step.num_items:,} items of {step.num_features:,} features, sizes {list(step.sizes)}, "
        f"{step.depth} block(s), {step.positions:,} positions of each rank {at_once}, {step.drawn:,} negatives\n"
    )
    print(table(costs, seconds if teraflops else None))
    loss, reason = recommend(costs, memory_bytes, seconds if teraflops else None, arguments.max_step_s)
    print(f"\nrecommended: {SETTINGS[loss]} ({reason})")
    if not teraflops:
        print("time is not weighed; give --teraflops, the rate of large products on a rank")


if __name__ == "__main__":
    run_command(main)
