"""Trains SASRec or eSASRec of RecTools on our split, in RecTools' environment.

Settings, all with sequences of 50 events, batches of 128 histories, Adam at 1e-3 and its (0.9, 0.98):

    sasrec           the library's defaults: 2 blocks, 4 heads, dropout 0.2, full softmax
    sasrec-sampled   the eSASRec paper's on Beauty and Sports: 1 block, 1 head, dropout 0.2, sampled softmax with 256
                     negatives
    esasrec          the paper's eSASRec: the same with LiGR layers and a mask of padding; --ff 4 on Beauty, 2 on Sports

The paper (arXiv 2508.06450; its settings: github.com/blondered/transformer_benchmark) lists 64 factors in a table and
256 in configurations; 256 is the library's default. The library's early stopping is not used.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pandas as pd
import rectools
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LambdaCallback
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers

from benchmarks.rivals.histories import SPLITS, Histories, left_padded, read_histories, readable
from benchmarks.rivals.marks import Marks
from benchmarks.rivals.options import MAX_LENGTH, prepare_torch, runner_parser
from benchmarks.rivals.scores import Scores
from fmrl_dist.base.errors import run_command

SCORED_USERS = 512  # at once
PADDING = 0  # the library's own number of it; items follow

FULL_SOFTMAX = {"n_blocks": 2, "n_heads": 4, "loss": "softmax"}
SAMPLED_SOFTMAX = {"n_blocks": 1, "n_heads": 1, "loss": "sampled_softmax", "n_negatives": 256}


def main(argv: list[str]) -> None:
    parser = runner_parser("benchmarks.rivals.train_rectools", __doc__, factors=64, dropout=0.2)
    parser.add_argument("model", choices=("sasrec", "sasrec-sampled", "esasrec"))
    parser.add_argument("--ff", type=int, default=4, help="width of eSASRec's feed-forward layers, times factors")
    arguments = parser.parse_args(argv)
    prepare_torch(arguments)
    histories, num_items = read_histories(arguments.data)
    settings = settings_of(arguments)
    rival = f"RecTools {rectools.__version__} {arguments.model}"
    marks = Marks(
        arguments.minutes, arguments.out, {"rival": rival, "settings": {k: str(v) for k, v in settings.items()}}
    )

    def get_trainer() -> Trainer:
        return Trainer(
            max_epochs=-1,
            accelerator="cpu",
            callbacks=[LambdaCallback(**marks.lightning_hooks(score))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def score(module: Any) -> Scores:
        return scores_of(module.torch_model, model.data_preparator.get_known_item_ids(), histories, num_items)

    model = SASRecModel(**settings, get_trainer_func=get_trainer)
    model.fit(Dataset.construct(interactions_of(readable(histories, "train"))))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of SASRecModel."""
    settings: dict[str, Any] = {
        "n_factors": arguments.factors,
        "dropout_rate": arguments.dropout,
        "session_max_len": MAX_LENGTH,
        "batch_size": 128,
        "lr": 1e-3,
    }
    settings |= FULL_SOFTMAX if arguments.model == "sasrec" else SAMPLED_SOFTMAX
    if arguments.model == "esasrec":
        settings["transformer_layers_type"] = LiGRLayers
        settings["transformer_layers_kwargs"] = {"ff_factors_multiplier": arguments.ff}
        settings["use_key_padding_mask"] = True
    return settings


def interactions_of(histories: Histories) -> pd.DataFrame:
    """The library's table of interactions; their times are their positions, which keeps the order of ties."""
    lengths = [len(history) for history in histories]
    positions = np.concatenate([np.arange(length) for length in lengths])
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(histories)), lengths),
            Columns.Item: np.concatenate(histories),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(positions, unit="s"),
        }
    )


@torch.no_grad()
def scores_of(net: Any, known: np.ndarray, histories: Histories, num_items: int) -> Scores:
    """Scores of a network that knows some items, numbered after the padding; it reads and ranks no others."""
    number = np.full(num_items, PADDING)
    number[known.astype(np.int64)] = np.arange(len(known)) + PADDING + 1
    embeddings = net.item_model.get_all_embeddings()
    users = {}
    for split in SPLITS:
        numbers = [number[history] for history in readable(histories, split)]
        rows = torch.from_numpy(left_padded([row[row != PADDING] for row in numbers], MAX_LENGTH, PADDING))
        outputs = [net.encode_sessions({"x": part}, embeddings)[:, -1] for part in rows.split(SCORED_USERS)]
        users[split] = torch.cat(outputs).numpy()
    bias = np.where(number == PADDING, -np.inf, 0)
    return Scores(users, embeddings.numpy()[number], bias)


if __name__ == "__main__":
    run_command(main)
