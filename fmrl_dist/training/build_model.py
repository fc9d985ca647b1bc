"""A freshly initialised model for the items of a store, with the statistics of their features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.checkpoint.restore import construct_model
from fmrl_dist.config.model_section import ModelConfig
from fmrl_dist.data.feature_scale import FITTED, block_parts, feature_affine, feature_sums, table_parts
from fmrl_dist.data.item_statistics import train_counts
from fmrl_dist.data.item_table import ItemTable, feature_dims
from fmrl_dist.data.store.manifest import LEAVE_ONE_OUT
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import DenseItemEncoder


def build_model(
    config: ModelConfig, table: ItemTable, matmul_dtype: torch.dtype | None = None, fitted: Tensor | None = None
) -> FMRLRec:
    """A freshly initialised model for the items of ``table``; ``fitted``: see :func:`fitted_items`."""
    sums = feature_sums(table.dims, table_parts(table, fitted)) if _has_fitted_scale(config) else None
    model = construct_model(config, dict(table.dims), len(table.values), matmul_dtype, config.scan)
    return _with_scale(model, config, sums)


def build_inline_model(
    config: ModelConfig, store: Store, runtime: Runtime, matmul_dtype: torch.dtype | None = None
) -> FMRLRec:
    """A freshly initialised model for an inline store; the ranks divide the reading of its items' statistics.

    Raises:
        UserError: a feature is not in the store, or an item shard is damaged.
    """
    dims, blocks, sums = feature_dims(store, config.features), store.manifest.items, None
    if _has_fitted_scale(config):
        mine = [blocks[number] for number in runtime.my_share(len(blocks))]
        parts = block_parts(store, mine, dims, fitted_items(store))
        sums = runtime.sum(feature_sums(dims, parts).to(runtime.device)).cpu()
    model = construct_model(config, dims, store.manifest.num_items, matmul_dtype, config.scan)
    return _with_scale(model, config, sums)


def fitted_items(store: Store) -> Tensor | None:
    """Items whose features may enter statistics, bool [V]; None for all.

    Where a split is not leave-one-out, those with a training event: which other items there are may depend on events
    that are held out.
    """
    if store.manifest.split_rule == LEAVE_ONE_OUT:
        return None
    return torch.from_numpy(np.asarray(train_counts(store)) > 0)


def _has_fitted_scale(config: ModelConfig) -> bool:
    return config.item_encoder != "vqrec" and config.feature_scale in FITTED


def _with_scale(model: FMRLRec, config: ModelConfig, sums: Tensor | None) -> FMRLRec:
    if not isinstance(model.encoder, DenseItemEncoder):  # codes have no scale
        return model
    shift, scale = feature_affine(model.encoder.feature_dims, sums, config.feature_scale)
    model.encoder.feature_shift.copy_(shift)
    model.encoder.feature_scale.copy_(scale)
    return model
