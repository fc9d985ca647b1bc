"""From configuration and store to a model, and to a recommender: the one place where both meet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fmrl_dist import __version__
from fmrl_dist.catalogue import Catalogue, EmbeddedCatalogue, StreamedCatalogue
from fmrl_dist.checkpoint import Checkpoint
from fmrl_dist.config import Config, ModelConfig
from fmrl_dist.data.feature_scale import block_parts, feature_affine, feature_sums, table_parts
from fmrl_dist.data.items import ItemTable, feature_dims, load_item_table
from fmrl_dist.data.store import Store
from fmrl_dist.errors import UserError, require
from fmrl_dist.export_folder import Origin, Recommender
from fmrl_dist.model import FMRLRec
from fmrl_dist.runtime import Runtime
from fmrl_dist.split_catalogue import SplitCatalogue, ranks_share

EMBEDDED_AT_ONCE = 4096  # items


def build_model(config: ModelConfig, table: ItemTable, matmul_dtype: torch.dtype | None = None) -> FMRLRec:
    """A freshly initialised model for the items of ``table``."""
    sums = feature_sums(table.dims, table_parts(table)) if config.feature_scale == "standardize" else None
    return _with_scale(_construct(config, dict(table.dims), len(table.values), matmul_dtype), config, sums)


def build_inline_model(
    config: ModelConfig, store: Store, runtime: Runtime, matmul_dtype: torch.dtype | None = None
) -> FMRLRec:
    """A freshly initialised model for an inline store; ranks share the reading of its items' statistics.

    Raises:
        UserError: a feature is not in the store, or an item shard is damaged.
    """
    dims, blocks, sums = feature_dims(store, config.features), store.manifest.items, None
    if config.feature_scale == "standardize":
        mine = [blocks[number] for number in runtime.my_share(len(blocks))]
        sums = runtime.sum(feature_sums(dims, block_parts(store, mine, dims)).to(runtime.device)).cpu()
    return _with_scale(_construct(config, dims, store.manifest.num_items, matmul_dtype), config, sums)


def _with_scale(model: FMRLRec, config: ModelConfig, sums: Tensor | None) -> FMRLRec:
    shift, scale = feature_affine(model.encoder.feature_dims, sums, config.feature_scale)
    model.encoder.feature_shift.copy_(shift)
    model.encoder.feature_scale.copy_(scale)
    return model


def restore_model(config: ModelConfig, checkpoint: Checkpoint) -> FMRLRec:
    """The model of a checkpoint, in float32."""
    model = _construct(config, checkpoint.features, checkpoint.num_items, None)
    load_weights(model, checkpoint)
    return model


def load_weights(model: FMRLRec, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's tensors into a model of its config.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"checkpoint {checkpoint.path} does not fit its config: {problem}") from None


def load_catalogue_table(store: Store, checkpoint: Checkpoint) -> ItemTable:
    """The features that a checkpoint's model reads, from ``store``.

    Raises:
        UserError: the store lacks one, has it in another dim, or has another number of items than the id table.
    """
    check_features(store, checkpoint)
    has_id_table = checkpoint.config["model"]["id_table"]
    if has_id_table and store.manifest.num_items != checkpoint.num_items:
        raise UserError(
            f"checkpoint {checkpoint.path} has an id table of {checkpoint.num_items} items; "
            f"store {store.location} has {store.manifest.num_items}"
        )
    return load_item_table(store, tuple(checkpoint.features))


def check_features(store: Store, checkpoint: Checkpoint) -> None:
    """Refuse a store that lacks a feature which the checkpoint's model reads, or has it in another dim."""
    dims = feature_dims(store, tuple(checkpoint.features))
    if dims != checkpoint.features:
        raise UserError(
            f"checkpoint {checkpoint.path} reads features {checkpoint.features}; store {store.location} has {dims}"
        )


@torch.no_grad()
def embed_catalogue(
    model: FMRLRec, table: ItemTable, device: torch.device, first: int = 0, last: int | None = None
) -> Tensor:
    """Embeddings of all items, or of those from ``first`` to before ``last``, float32 [·, D] on ``device``.

    Of the features only some rows are read at a time.
    """
    encoder = model.encoder
    last = len(table.values) if last is None else last
    items = torch.empty(last - first, model.width, device=device)
    for begin in range(first, last, EMBEDDED_AT_ONCE):
        end = min(begin + EMBEDDED_AT_ONCE, last)
        present = table.present[begin:end].to(device)
        features = encoder.normalize(table.values[begin:end].to(device), present)
        items[begin - first : end - first] = encoder(features, present, torch.arange(begin, end, device=device))
    return items


def build_recommender(
    checkpoint: Checkpoint, config: Config, store: Store, device: torch.device, size: int | None = None
) -> Recommender:
    """A checkpoint's model and the embeddings of the items of ``store``.

    Args:
        checkpoint: of a run.
        config: that run's.
        store: whose catalogue is to be ranked, not always the one of the run.
        device: to compute and to leave the tensors on.
        size: which of the trained sizes to cut out; None for the whole model.

    Raises:
        UserError: the size was not trained, or the store does not fit the model.
    """
    model = restore_model(config.model, checkpoint)
    if size is not None:
        model = model.truncate(size)
    model = model.to(device).eval()
    items = embed_catalogue(model, load_catalogue_table(store, checkpoint), device)
    origin = Origin(
        fmrl_dist_version=__version__,
        step=checkpoint.state.step,
        training_manifest_sha256=checkpoint.manifest_sha256,
        manifest_sha256=store.manifest.sha256,
        store=store.location,
    )
    return Recommender(
        model=model,
        items=items,
        max_length=config.data.max_length,
        predict_first=config.loss.predict_first,
        normalize=config.loss.normalize,
        origin=origin,
    )


@dataclass(frozen=True)
class Ranker:
    """What an evaluation ranks with."""

    model: FMRLRec  # in evaluation mode
    catalogue: Catalogue
    max_length: int  # last events of a history that the model is to read
    normalize: bool  # whether scores are cosines of each size's prefixes


def ranker(recommender: Recommender) -> Ranker:
    """A recommender, to be evaluated."""
    catalogue = EmbeddedCatalogue(recommender.items)
    return Ranker(recommender.model, catalogue, recommender.max_length, recommender.normalize)


def build_ranker(checkpoint: Checkpoint, config: Config, store: Store, runtime: Runtime) -> Ranker:
    """A checkpoint's model and the items of ``store``: streamed where run and store are inline, else embedded.

    The ranks share the items where :func:`fmrl_dist.split_catalogue.ranks_share` says so; the figures are the same.

    Raises:
        UserError: the store does not fit the model.
    """
    device = runtime.device
    in_table = config.store.feature_mode == "table" or not store.manifest.inline
    num_items, in_loss = store.manifest.num_items, config.loss.catalogue == "split"
    if in_table and not ranks_share(num_items, config.model.width, runtime.world_size, in_loss):
        return ranker(build_recommender(checkpoint, config, store, device))
    model = restore_model(config.model, checkpoint).to(device).eval()
    catalogue: Catalogue
    if in_table:
        table = load_catalogue_table(store, checkpoint)
        embed = partial(embed_catalogue, model, table, device)
        catalogue = SplitCatalogue.embed(runtime.rank, runtime.world_size, num_items, embed)
    else:
        check_features(store, checkpoint)
        catalogue = StreamedCatalogue(model.encoder, store, checkpoint.features)
    return Ranker(model, catalogue, config.data.max_length, config.loss.normalize)


def check_inline(config: Config, store: Store) -> None:
    """Refuse to train inline on what only a table can serve."""
    if config.store.feature_mode == "table":
        return
    mend = "or read features from a table, by --store.feature_mode table"
    require(
        store.manifest.inline,
        f"store {store.location} does not carry features with its histories; build it with "
        f"python -m shards.build --overwrite --store.feature_mode inline, {mend}",
    )
    loss = config.loss
    found = "full" if loss.softmax == "full" else loss.negatives
    require(
        found in ("uniform", "in_batch", "mixed"),
        f"store.feature_mode is inline, and the softmax is {found}; expected loss.softmax sampled with negatives "
        f"uniform, in_batch or mixed, {mend}",
    )
    require(not config.model.id_table, f"store.feature_mode is inline and model.id_table is on; turn it off, {mend}")


def _construct(
    config: ModelConfig, feature_dims: dict[str, int], num_items: int, matmul_dtype: torch.dtype | None
) -> FMRLRec:
    return FMRLRec(
        sizes=config.sizes,
        depth=config.depth,
        feature_dims=feature_dims,
        num_items=num_items if config.id_table else 0,
        dropout=config.dropout,
        lru_dropout=config.lru_dropout,
        r_min=config.r_min,
        r_max=config.r_max,
        matmul_dtype=matmul_dtype,
    )
