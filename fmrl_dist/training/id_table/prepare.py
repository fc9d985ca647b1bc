"""The id table of a run: cold rows cleared, and held as the loss needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrl_dist.data.item_statistics import trained_items
from fmrl_dist.data.windows import window_rule
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.id_table.owned import OwnedIdTable
from fmrl_dist.training.id_table.replicated import ReplicatedIdTable
from fmrl_dist.training.id_table.rows import IdDropout, IdRows, ModelIdTable, SeparateIdTable
from fmrl_dist.training.item_columns import slice_bounds
from fmrl_dist.training.run import Run


def prepare_id_table(
    model: FMRLRec, run: Run, split: bool, resumed: bool
) -> tuple[IdRows | None, SeparateIdTable | None]:
    """The model's id table as a step reads it, and the same again where it is not a parameter of the model.

    Args:
        model: on the CPU, with the weights to start from.
        run: the run.
        split: whether each rank scores a slice of the catalogue.
        resumed: whether the weights are this run's own.
    """
    table = model.encoder.id_table
    if table is None:
        return None, None
    config, runtime = run.config, run.runtime
    cold = cold_items(run)
    if resumed and run.store.skips_damaged:  # a block that is damaged by now may have been trained on
        cold &= (table.detach() == 0).all(1)
    table.detach()[cold] = 0.0
    dropout = IdDropout(config.model.id_dropout_rate, config.train.seed)
    if split:
        bounds = slice_bounds(len(table), runtime.world_size)
        owned = OwnedIdTable(model, bounds, config.train, dropout, cold, runtime)
        return owned, owned
    if config.loss.softmax == "sampled":
        replicated = ReplicatedIdTable(model, config.train, dropout, cold, runtime)
        return replicated, replicated
    model.encoder.to(runtime.device)  # first: a gradient's hook is of the device on which it is registered
    return ModelIdTable(model.encoder, dropout, cold.nonzero()[:, 0].to(runtime.device)), None


def cold_items(run: Run) -> Tensor:
    """Items that no training position reads or predicts, bool [V]; computed by one process of each node."""
    with run.runtime.accelerator.local_main_process_first():
        trained = trained_items(run.store, window_rule(run.config))
    return ~torch.from_numpy(trained.copy())
