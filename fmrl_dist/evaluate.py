"""``python -m fmrl_dist.evaluate --checkpoint RUN``: rank the whole catalogue for every user, at every trained size.

``--part I/N`` ranks for a share of the users, and ``--join`` writes what all parts together amount to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.checkpoint.export_folder import export_sha256, is_export, read_export
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.run_folder import run_of_best
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.config.sections import StoreConfig
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime, start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.histograms import count_together
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.parts import WHOLE, Evaluated, Means, Part, join_parts, parts_folder, write_part
from fmrl_dist.evaluation.ranker import Ranker, build_ranker, ranker
from fmrl_dist.evaluation.report import size_table, write_report


@dataclass(frozen=True)
class Subject:
    """What is evaluated, before its catalogue is read."""

    build: Callable[[Runtime], Ranker]
    sha256: Callable[[], str]  # tells it from another checkpoint or export
    sizes: list[int]
    store: Store  # of its users
    folder: Path  # of its report


def evaluate(
    ranker: Ranker, store: Store, runtime: Runtime, split: str, mask_seen: bool, stop: StopRequest
) -> dict[str, Any]:
    """Metrics of every size, as ``evaluation.json`` holds them; each rank takes its share of the user blocks.

    Raises:
        Stopped: a signal came amid it.
    """
    histograms = count_ranks(ranker, store, runtime, split, mask_seen, WHOLE, stop)
    return figures(histograms, ranker.model.sizes, store, split, mask_seen)


def count_ranks(
    ranker: Ranker,
    store: Store,
    runtime: Runtime,
    split: str,
    mask_seen: bool,
    part: Part,
    stop: StopRequest | None = None,
) -> Tensor:
    """Histograms of 2·rank over the users of one part, int64 [S, 2·CUTOFF + 1]; the ranks share its blocks."""
    model, catalogue, numbers = ranker.model, ranker.catalogue, part.share(len(store.manifest.splits[split]))
    mine = [numbers[place] for place in runtime.my_share(len(numbers))]
    blocks = evaluation_blocks(store, split, ranker.max_length, mine, inline_dims=catalogue.inline_dims)
    return count_together(runtime, model, catalogue, blocks, mask_seen, ranker.normalize, stop)


def figures(histograms: Tensor, sizes: Sequence[int], store: Store, split: str, mask_seen: bool) -> dict[str, Any]:
    """What ``evaluation.json`` holds; ``users_lost`` is there only where damaged blocks were left out."""
    num_users = int(histograms[0].sum())
    num_lost = num_users_in(store, split) - num_users
    return {
        "split": split,
        "users": num_users,
        **({"users_lost": num_lost} if num_lost else {}),
        "mask_seen": mask_seen,
        "sizes": {str(size): metrics_from_histogram(row) for size, row in zip(sizes, histograms, strict=True)},
    }


def num_users_in(store: Store, split: str) -> int:
    return sum(block.count for block in store.manifest.splits[split])


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the table, write JSON and picture, and say where they are."""
    json_path, picture_path = write_report(folder, result)
    lost = f" ({result['users_lost']:,} more in damaged blocks)" if "users_lost" in result else ""
    print(f"{result['split']}, {result['users']:,} users{lost}, whole catalogue ranked:\n{size_table(result['sizes'])}")
    print(f"written: {json_path}\npicture: {picture_path}", flush=True)


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run (its best), a checkpoint or an export")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--mask-seen", action="store_true", help="leave out items of a user's history")
    parser.add_argument("--store", help="shard store, a folder or URL (default: the recorded one)")
    parser.add_argument("--threads", type=int, default=0, help="threads per process (default: cores / processes)")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--part", type=Part.parse, help="rank for part I/N of the users only, to be joined")
    share.add_argument("--join", action="store_true", help="join all parts that were evaluated with the same options")
    arguments = parser.parse_args(argv)
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")

    open_subject = open_export if is_export(arguments.checkpoint) else open_checkpoint
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    split, mask_seen, part = arguments.split, arguments.mask_seen, arguments.part
    subject = open_subject(arguments.checkpoint, arguments.store, split)
    if arguments.join:
        if runtime.is_main:
            join(subject, split, mask_seen)
    else:
        histograms = count_ranks(subject.build(runtime), subject.store, runtime, split, mask_seen, part or WHOLE)
        if runtime.is_main and part:
            means = Means(torch.get_num_threads(), runtime.device.type)
            leave_part(subject, split, mask_seen, part, means, histograms)
        elif runtime.is_main:
            report(figures(histograms, subject.sizes, subject.store, split, mask_seen), subject.folder)
    runtime.leave()


def leave_part(subject: Subject, split: str, mask_seen: bool, part: Part, means: Means, histograms: Tensor) -> None:
    """Write one part, and say where it is."""
    evaluated = evaluated_of(subject, split, mask_seen)
    path = write_part(parts_folder(subject.folder, evaluated), part, evaluated, means, histograms)
    print(f"{split}, part {part}: {int(histograms[0].sum()):,} users\nwritten: {path}", flush=True)


def join(subject: Subject, split: str, mask_seen: bool) -> None:
    """Report what all parts together amount to, and remove them."""
    evaluated = evaluated_of(subject, split, mask_seen)
    folder = parts_folder(subject.folder, evaluated)
    report(figures(join_parts(folder, evaluated), subject.sizes, subject.store, split, mask_seen), subject.folder)
    shutil.rmtree(folder)


def evaluated_of(subject: Subject, split: str, mask_seen: bool) -> Evaluated:
    store = subject.store
    num_users = num_users_in(store, split)
    return Evaluated(subject.sha256(), store.manifest.sha256, split, mask_seen, subject.sizes, num_users)


def open_checkpoint(path: Path, store_path: str | None, split: str) -> Subject:
    """A run or one of its checkpoints, with the catalogue of the store."""
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint.config)
    store = open_store(store_path or config.store.path, split, config.store)
    return Subject(
        build=partial(build_ranker, checkpoint, config, store),
        sha256=lambda: checkpoint.sha256,
        sizes=list(config.model.sizes),
        store=store,
        folder=run_of_best(checkpoint) or checkpoint.path,
    )


def open_export(path: Path, store_path: str | None, split: str) -> Subject:
    """An export, with its own item embeddings."""
    recommender = read_export(path)
    store = open_store(store_path or recommender.origin.store, split)
    num_items = store.manifest.num_items
    require(
        len(recommender.items) == num_items,
        f"export {path} ranks {len(recommender.items)} items; store {store.location} has {num_items}",
    )
    return Subject(
        build=lambda runtime: ranker(recommender.to(runtime.device)),
        sha256=partial(export_sha256, path),
        sizes=list(recommender.model.sizes),
        store=store,
        folder=path,
    )


def open_store(path: str, split: str, access: StoreConfig | None = None) -> Store:
    """The store at ``path``, which must have users in ``split``."""
    store = Store.open(path, access)
    if not store.manifest.splits[split]:
        raise UserError(f"store {store.location} has no {split} users (all histories are shorter than 3 events)")
    return store


if __name__ == "__main__":
    run_command(main)
