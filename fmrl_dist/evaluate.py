"""``python -m fmrl_dist.evaluate --checkpoint RUN``: rank the whole catalogue for every user, at every trained size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmrl_dist.assembly import Ranker, build_ranker, ranker
from fmrl_dist.checkpoint import load_checkpoint
from fmrl_dist.config import CommandParser, StoreConfig, config_from_dict
from fmrl_dist.data.histories import evaluation_blocks
from fmrl_dist.data.store import Store
from fmrl_dist.errors import UserError, require, run_command
from fmrl_dist.evaluation import rank_histograms
from fmrl_dist.export_folder import is_export, read_export
from fmrl_dist.metrics import metrics_from_histogram
from fmrl_dist.report import size_table, write_report
from fmrl_dist.run_folder import run_of_best
from fmrl_dist.runtime import Runtime, start_runtime

Subject = tuple[Ranker, Store, Path]  # what ranks, the store of its users, the folder of its report


def evaluate(ranker: Ranker, store: Store, runtime: Runtime, split: str, mask_seen: bool) -> dict[str, Any]:
    """Metrics of every size, as ``evaluation.json`` holds them; each rank takes its share of the user blocks.

    ``users_lost`` is there only where damaged blocks were left out.
    """
    split_blocks = store.manifest.splits[split]
    model, catalogue, share = ranker.model, ranker.catalogue, runtime.my_share(len(split_blocks))
    blocks = evaluation_blocks(store, split, ranker.max_length, share, inline_dims=catalogue.inline_dims)
    histograms = runtime.sum(rank_histograms(model, catalogue, blocks, mask_seen, ranker.normalize))
    num_users = int(histograms[0].sum())
    num_lost = sum(block.count for block in split_blocks) - num_users
    return {
        "split": split,
        "users": num_users,
        **({"users_lost": num_lost} if num_lost else {}),
        "mask_seen": mask_seen,
        "sizes": {str(size): metrics_from_histogram(row) for size, row in zip(model.sizes, histograms, strict=True)},
    }


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
    arguments = parser.parse_args(argv)
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")

    open_subject = open_export if is_export(arguments.checkpoint) else open_checkpoint
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    subject, store, folder = open_subject(arguments.checkpoint, arguments.store, arguments.split, runtime.device)
    result = evaluate(subject, store, runtime, arguments.split, arguments.mask_seen)
    if runtime.is_main:
        report(result, folder)
    runtime.leave()


def open_checkpoint(path: Path, store_path: str | None, split: str, device: torch.device) -> Subject:
    """A run or one of its checkpoints, with the catalogue of the store."""
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint.config)
    store = open_store(store_path or config.store.path, split, config.store)
    folder = run_of_best(checkpoint) or checkpoint.path
    return build_ranker(checkpoint, config, store, device), store, folder


def open_export(path: Path, store_path: str | None, split: str, device: torch.device) -> Subject:
    """An export, with its own item embeddings."""
    recommender = read_export(path)
    store = open_store(store_path or recommender.origin.store, split)
    num_items = store.manifest.num_items
    require(
        len(recommender.items) == num_items,
        f"export {path} ranks {len(recommender.items)} items; store {store.location} has {num_items}",
    )
    return ranker(recommender.to(device)), store, path


def open_store(path: str, split: str, access: StoreConfig | None = None) -> Store:
    """The store at ``path``, which must have users in ``split``."""
    store = Store.open(path, access)
    if not store.manifest.splits[split]:
        raise UserError(f"store {store.location} has no {split} users (all histories are shorter than 3 events)")
    return store


if __name__ == "__main__":
    run_command(main)
