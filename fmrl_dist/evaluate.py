"""``python -m fmrl_dist.evaluate --checkpoint RUN``: rank the whole catalogue for every user, at every trained size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmrl_dist.assembly import load_catalogue_table, normalize_catalogue, restore_model
from fmrl_dist.checkpoint import Checkpoint, load_checkpoint
from fmrl_dist.config import CommandParser, Config, config_from_dict
from fmrl_dist.data.histories import evaluation_blocks
from fmrl_dist.data.store import Store
from fmrl_dist.errors import UserError, require, run_command
from fmrl_dist.evaluation import rank_histograms
from fmrl_dist.metrics import metrics_from_histogram
from fmrl_dist.report import size_table, write_report
from fmrl_dist.runtime import Runtime, start_runtime


def evaluate_checkpoint(
    checkpoint: Checkpoint, config: Config, store: Store, runtime: Runtime, split: str, mask_seen: bool
) -> dict[str, Any]:
    """Metrics of every size, as ``evaluation.json`` holds them; each rank takes its share of the user blocks."""
    table = load_catalogue_table(store, checkpoint)
    model = restore_model(config.model, checkpoint).to(runtime.device).eval()
    catalogue = normalize_catalogue(model, table, runtime.device)
    numbers = runtime.my_share(len(store.manifest.splits[split]))
    items = model.encoder(catalogue.features, catalogue.present).detach()
    blocks = evaluation_blocks(store, split, config.data.max_length, numbers)
    histograms = runtime.sum(rank_histograms(model, items, blocks, mask_seen))
    return {
        "split": split,
        "users": int(histograms[0].sum()),
        "mask_seen": mask_seen,
        "sizes": {str(size): metrics_from_histogram(row) for size, row in zip(model.sizes, histograms, strict=True)},
    }


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the table, write JSON and picture, and say where they are."""
    json_path, picture_path = write_report(folder, result)
    print(f"{result['split']}, {result['users']:,} users, whole catalogue ranked:\n{size_table(result['sizes'])}")
    print(f"written: {json_path}\npicture: {picture_path}", flush=True)


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run folder (its best) or a checkpoint")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--mask-seen", action="store_true", help="leave out items of a user's history")
    parser.add_argument("--store", help="shard store (default: the recorded one)")
    parser.add_argument("--threads", type=int, default=0, help="threads per process (default: cores / processes)")
    arguments = parser.parse_args(argv)
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")

    checkpoint = load_checkpoint(arguments.checkpoint)
    config = config_from_dict(checkpoint.config)
    store = Store.open(arguments.store or config.store.path)
    if not store.manifest.splits[arguments.split]:
        raise UserError(f"store {store.path} has no {arguments.split} users (all histories are shorter than 3 events)")
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    result = evaluate_checkpoint(checkpoint, config, store, runtime, arguments.split, arguments.mask_seen)
    if runtime.is_main:
        report(result, report_folder(checkpoint))
    runtime.leave()


def report_folder(checkpoint: Checkpoint) -> Path:
    """The run, where this is its best checkpoint; else the checkpoint: a run's figures are those of its best."""
    run = checkpoint.path.parent.parent
    return run if (run / "checkpoints" / "best").resolve() == checkpoint.path else checkpoint.path


if __name__ == "__main__":
    run_command(main)
