"""Robustness to a missing modality: a run's test figures where a feature is taken from a share of all items.

The features of a random share of the items are marked absent before the catalogue is embedded, for histories and
candidates alike; the model puts its stand-in there, as it does for items that never had the feature. Shares are nested:
what is taken at 10 % is also taken at 50 %. Each line: all sizes, seen items masked.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import describe_setting
from fmrl_dist.base.errors import require, run_command
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import load_catalogue_table, match_id_table, restore_model
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import start_runtime
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.cut_vectors import count_deployments
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.metrics import metrics_from_histogram
from fmrl_dist.evaluation.ranker import build_ranker
from fmrl_dist.evaluation.target_ranks import UNSEEN

METRIC = "ndcg@10"
SHARES = (0.0, 0.1, 0.3, 0.5, 1.0)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper.missing_features", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, nargs="+", help="folders of runs")
    parser.add_argument("--store", required=True, help="their store")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the items")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    require(
        all(0 <= share <= 1 for share in arguments.shares),
        f"--shares are {arguments.shares}; expected numbers from 0 to 1",
    )
    for name, value in describe_setting().items():
        print(f"{name:<12} {value}")
    runtime = start_runtime(arguments.threads, lanes=None)
    store = Store.open(arguments.store)
    for folder in arguments.run:
        checkpoint = load_checkpoint(folder, with_optimizer=False)
        config = config_from_dict(checkpoint.config)
        config = replace(config, eval=replace(config.eval, cut_vectors=False, per_user=False))
        model = restore_model(config.model, checkpoint).eval()
        match_id_table(model, checkpoint, store)
        table = load_catalogue_table(store, checkpoint)
        require(len(table.dims) > 0, f"{folder} is a run of ids alone: there is no feature to take")
        print(f"\n{folder.name}: NDCG@10, seen items masked\n")
        print(f"| taken | of items | {' | '.join(map(str, model.sizes))} |")
        print(f"|---|---:|{'---:|' * len(model.sizes)}")
        for name in table.dims:
            for share in arguments.shares:
                ranker = build_ranker(model, config, store, without(table, name, share), runtime)
                protocol = EvaluationProtocol.of_report(store, "test", mask_seen=False, config=config.eval)
                counts = count_deployments(ranker, protocol, runtime, StopRequest())
                figures = [metrics_from_histogram(rows, [METRIC])[METRIC] for rows in counts.all_users[UNSEEN]]
                print(f"| {name} | {share:.0%} | {' | '.join(f'{figure:.4f}' for figure in figures)} |", flush=True)


def without(table: ItemTable, name: str, share: float) -> ItemTable:
    """The table with a feature marked absent for a random share of the items."""
    column = list(table.dims).index(name)
    drawn = torch.rand(len(table.present), generator=torch.Generator().manual_seed(0))
    present = table.present.clone()
    present[:, column] &= drawn >= share
    return ItemTable(table.dims, table.values, present)


if __name__ == "__main__":
    run_command(main)
