"""Trains SASRec of RePlay on our split, in RePlay's environment.

Settings are those of the library's example (examples/09_sasrec_example.ipynb): 64 factors, 2 blocks, 2 heads, dropout
0.3, sequences of 50 events, batches of 32 histories, full softmax, Adam at 1e-3. Its defaults of 192 factors and 4
heads are --factors 192 --heads 4. As in the example, the catalogue is that of all interactions.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from replay.data import FeatureHint, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms

from benchmarks.rivals.histories import SPLITS, Histories, left_padded, read_histories, readable
from benchmarks.rivals.marks import Marks
from benchmarks.rivals.options import MAX_LENGTH, prepare_torch, runner_parser
from benchmarks.rivals.scores import Scores
from fmrl_dist.base.errors import run_command

SCORED_USERS = 512  # at once
BATCH = 32


def main(argv: list[str]) -> None:
    parser = runner_parser("benchmarks.rivals.train_replay", __doc__, factors=64, dropout=0.3)
    parser.add_argument("--heads", type=int, default=2)
    arguments = parser.parse_args(argv)
    prepare_torch(arguments)
    histories, num_items = read_histories(arguments.data)
    settings = {
        "embedding_dim": arguments.factors,
        "num_heads": arguments.heads,
        "num_blocks": 2,
        "max_sequence_length": MAX_LENGTH,
        "dropout": arguments.dropout,
    }
    schema = schema_of(num_items, arguments.factors)
    record = {"rival": f"RePlay {version('replay-rec')} sasrec", "settings": settings | {"batch_size": BATCH}}
    marks = Marks(arguments.minutes, arguments.out, record)
    hooks = marks.lightning_hooks(lambda module: scores_of(module.model, histories, num_items))
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[LambdaCallback(**hooks)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train.parquet"
        pq.write_table(pa.table({"item_id": readable(histories, "train")}), train)
        module = LightningModule(SasRec.from_params(schema, **settings))
        trainer.fit(module, datamodule=data_module(train, schema, num_items))


def schema_of(num_items: int, factors: int) -> TensorSchema:
    """One feature, the item; the number after the last item is padding."""
    return TensorSchema(
        [
            TensorFeatureInfo(
                name="item_id",
                is_seq=True,
                padding_value=num_items,
                cardinality=num_items,
                embedding_dim=factors,
                feature_type=FeatureType.CATEGORICAL,
                feature_hint=FeatureHint.ITEM_ID,
            )
        ]
    )


def data_module(train: Path, schema: TensorSchema, padding: int) -> ParquetModule:
    return ParquetModule(
        train_path=str(train),
        batch_size=BATCH,
        metadata={"train": {"item_id": {"shape": MAX_LENGTH + 1, "padding": padding}}},  # and one to predict
        transforms=make_default_sasrec_transforms(schema),
    )


@torch.no_grad()
def scores_of(net: Any, histories: Histories, padding: int) -> Scores:
    users = {}
    for split in SPLITS:
        rows = torch.from_numpy(left_padded(readable(histories, split), MAX_LENGTH, padding))
        outputs = [net.body({"item_id": part}, part != padding)[:, -1] for part in rows.split(SCORED_USERS)]
        users[split] = torch.cat(outputs).numpy()
    items = net.body.embedder.get_item_weights().numpy()
    return Scores(users, items, np.zeros(len(items)))


if __name__ == "__main__":
    run_command(main)
