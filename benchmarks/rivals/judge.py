"""Ranks the whole catalogue by the scores of rivals, by the rules of our evaluation, and prints the figures.

U users, V items, D factors. Ties count half; figures are among all items, and with the user's whole earlier history
masked except the target. Runs in our own environment.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import describe_setting
from benchmarks.rivals.histories import SPLITS, Histories, read_histories, readable, targets
from benchmarks.rivals.scores import Scores, read_scores
from fmrl_dist.base.errors import run_command
from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.distributed.signals import StopRequest
from fmrl_dist.evaluation.catalogue import EmbeddedCatalogue
from fmrl_dist.evaluation.metrics import histogram_of, metrics_from_histogram
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN, TargetRanks, guessed_scores, seen_items

METRICS = ("ndcg@10", "recall@10")
CUTOFF = 10
USERS_AT_ONCE = 1024


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rivals.judge", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("scores", type=Path, nargs="+", help="files that a rival's runner wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder with sequences.parquet and items.parquet")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    histories, num_items = read_histories(arguments.data)
    for name, value in describe_setting().items():
        print(f"{name:<10} {value}")
    heads = [f"{split} {metric}, {mask}" for split in SPLITS for metric in METRICS for mask in ("all", "masked")]
    head = ["rival", "factors", "minutes", "wall s", "processor s", "epochs", *heads]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for path in arguments.scores:
        scores, record = read_scores(path, len(histories), num_items)
        print(f"| {' | '.join(row_of(scores, record, histories))} |", flush=True)


def row_of(scores: Scores, record: dict[str, Any], histories: Histories) -> list[str]:
    training = [
        f"{record['minutes']:g}",
        f"{record['wall_s']:.0f}",
        f"{record['cpu_s']:.0f}",
        f"{record['epochs']:.2f}",
    ]
    figures = [judge(scores, histories, split) for split in SPLITS]
    values = [f"{of_split[which][m]:.4f}" for of_split in figures for m in METRICS for which in (ALL, UNSEEN)]
    return [record["rival"], str(scores.items.shape[1]), *training, *values]


def judge(scores: Scores, histories: Histories, split: str) -> list[dict[str, float]]:
    """Metrics of a split: among all items (ALL), and among those that the user has not seen (UNSEEN)."""
    # A bias is one more factor, of which every user has 1.
    outputs = torch.from_numpy(np.pad(scores.users[split], ((0, 0), (0, 1)), constant_values=1))
    items = torch.from_numpy(np.column_stack((scores.items, scores.bias)))
    catalogue = EmbeddedCatalogue(items)
    counts = torch.zeros(2, 2 * CUTOFF + 1, dtype=torch.int64)
    for first in range(0, len(histories), USERS_AT_ONCE):
        users = slice(first, first + USERS_AT_ONCE)
        ranks = target_ranks(outputs[users], catalogue, block_of(histories[users], split))
        counts += histogram_of(ranks, CUTOFF)
    return [metrics_from_histogram(counts[which], METRICS) for which in (ALL, UNSEEN)]


def block_of(histories: Histories, split: str) -> EvaluationBlock:
    """Users as the evaluation takes them, with all that they may have seen."""
    seen = readable(histories, split)
    events = torch.from_numpy(np.concatenate(seen))
    starts = torch.tensor([0, *np.cumsum([len(history) for history in seen])])
    return EvaluationBlock(
        users=torch.arange(len(seen)),
        items=events,
        starts=starts,
        from_start=torch.zeros(len(seen), dtype=torch.bool),
        targets=torch.from_numpy(targets(histories, split)),
        seen=events,
        seen_starts=starts,
    )


def target_ranks(outputs: Tensor, catalogue: EmbeddedCatalogue, block: EvaluationBlock) -> Tensor:
    """Ranks [2, U] of the targets of users with outputs [U, D]."""
    sizes = (outputs.shape[1],)
    (target_items,) = catalogue.target_items([block])
    guesses = guessed_scores(outputs, target_items, sizes, normalize=False)
    ranks = TargetRanks(outputs, block.targets, seen_items(block), guesses, sizes)
    catalogue.compare([ranks], StopRequest())
    return ranks.result()[:, 0]


if __name__ == "__main__":
    run_command(main)
