"""Trains UniSRec of RecTools on our split and our precomputed text features, in RecTools' environment.

Settings are the library's defaults, but for sequences of 50 events: 2 blocks, 1 head, 256 factors, dropout 0.1,
features projected by PCA and two layers, full softmax, batches of 128, AdamW whose rates for the projection, the layers
and the encoder are multiples of 1e-4. Its early stopping, which validates on training data, is not used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import rectools
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LambdaCallback
from rectools.fast_transformers import UniSRecModel

from benchmarks.rivals.histories import SPLITS, Histories, left_padded, read_histories, readable
from benchmarks.rivals.marks import Marks
from benchmarks.rivals.options import MAX_LENGTH, prepare_torch, runner_parser
from benchmarks.rivals.scores import Scores
from fmrl_dist.base.errors import run_command

SCORED_USERS = 512  # at once
PADDING = 0  # item i of ours is number i + 1


class MarkedUniSRec(UniSRecModel):
    """UniSRec with a callback in its trainer, for which the model has no argument."""

    callback: LambdaCallback

    def _make_trainer(self, max_epochs: int, val_dl: Any = None) -> Trainer:
        trainer = super()._make_trainer(max_epochs, val_dl)
        trainer.callbacks.append(self.callback)
        return trainer


def main(argv: list[str]) -> None:
    parser = runner_parser("benchmarks.rivals.train_unisrec", __doc__, factors=256, dropout=0.1)
    parser.add_argument("--features", default="text_minilm_384.npy", help="in the data's folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    prepare_torch(arguments)
    histories, num_items = read_histories(arguments.data)
    features = torch.zeros(num_items + 1, 1, np.load(arguments.data / arguments.features, mmap_mode="r").shape[1])
    features[1:, 0] = torch.from_numpy(np.load(arguments.data / arguments.features).astype(np.float32))
    settings = {"n_factors": arguments.factors, "dropout": arguments.dropout, "session_max_len": MAX_LENGTH}
    record = {"rival": f"RecTools {rectools.__version__} unisrec", "settings": settings}

    model = MarkedUniSRec(features, **settings, epochs=10**9)
    marks = Marks(arguments.minutes, arguments.out, record)
    model.callback = LambdaCallback(**marks.lightning_hooks(lambda module: scores_of(module.net, features, histories)))
    train = readable(histories, "train")
    lengths = torch.tensor([len(history) for history in train])
    model.fit(
        torch.arange(len(train)).repeat_interleave(lengths),
        torch.from_numpy(np.concatenate(train)) + 1,
        torch.cat([torch.arange(length) for length in lengths.tolist()]),
    )


@torch.no_grad()
def scores_of(net: Any, features: torch.Tensor, histories: Histories) -> Scores:
    """Scores of a network that has the training items' features alone: it is lent those of all items."""
    of_training, net.frozen_emb = net.frozen_emb, features
    users = {}
    for split in SPLITS:
        numbers = [history + 1 for history in readable(histories, split)]
        rows = torch.from_numpy(left_padded(numbers, MAX_LENGTH, PADDING))
        users[split] = torch.cat([net.encode_last(part) for part in rows.split(SCORED_USERS)]).numpy()
    items = net.project_all()[1:].numpy()
    net.frozen_emb = of_training
    return Scores(users, items, np.zeros(len(items)))


if __name__ == "__main__":
    run_command(main)
