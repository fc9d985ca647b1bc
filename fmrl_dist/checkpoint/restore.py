"""Rebuild a model, or a recommender, from a checkpoint and a store."""

from __future__ import annotations

from pathlib import Path

import torch

from fmrl_dist import __version__
from fmrl_dist.base.errors import UserError, require
from fmrl_dist.checkpoint.export.parts import ExportedModel, Origin
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.config.model_section import ModelConfig
from fmrl_dist.config.sections import Config
from fmrl_dist.data.feature_identity import encoder_differences, feature_encoders
from fmrl_dist.data.item_table import ItemTable, feature_dims, load_item_table
from fmrl_dist.data.items_differ import check_items_differ
from fmrl_dist.data.store.built_from import list_differences
from fmrl_dist.data.store.manifest import VOCAB_FILE, fit_file
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.store.tables import checked_table
from fmrl_dist.data.vocabulary import external_ids, rows_of
from fmrl_dist.model.embed_catalogue import embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec

ID_TABLE = "encoder.id_table"  # a model's tensor


def restore_model(config: ModelConfig, checkpoint: Checkpoint) -> FMRLRec:
    """The model of a checkpoint, in float32."""
    model = construct_model(config, checkpoint.features, checkpoint.num_items, None)
    load_weights(model, checkpoint)
    return model


def load_weights(model: FMRLRec, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's tensors into a model of its config.

    Raises:
        UserError: a tensor is missing, unknown, has another shape or is not finite.
    """
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"checkpoint {checkpoint.path} does not fit its config: {problem}") from None
    broken = [name for name, tensor in checkpoint.model.items() if not tensor.isfinite().all()]
    require(
        not broken,
        f"checkpoint {checkpoint.path} holds weights that are not finite ({', '.join(broken[:3])}); use another",
    )


def load_catalogue_table(store: Store, checkpoint: Checkpoint) -> ItemTable:
    """The features that a checkpoint's model reads, from ``store``.

    Raises:
        UserError: the store lacks one, has it with another dim, or another encoder made it; or all its items are the
            same to the model.
    """
    check_features(store, checkpoint)
    table = load_item_table(store, tuple(checkpoint.features))
    if ID_TABLE not in checkpoint.model:
        check_items_differ(store, None, table)
    return table


def match_id_table(model: FMRLRec, checkpoint: Checkpoint, store: Store) -> None:
    """Give each item of ``store`` its own row of the model's id table, if it has one: items are their external ids.

    Raises:
        UserError: the store has items that the run was not trained on, or the run's vocabulary is missing.
    """
    table = model.encoder.id_table
    if table is None or store.manifest.sha256 == checkpoint.manifest_sha256:
        return
    vocabulary = checkpoint.path.parent.parent / VOCAB_FILE
    require(
        vocabulary.is_file(),
        f"checkpoint {checkpoint.path} has an id table of another store's items, and {vocabulary} does not say which; "
        "use the store that it was trained on",
    )
    rows = rows_of(
        external_ids(store.read_table(VOCAB_FILE), f"{store.location}/{VOCAB_FILE}"),
        external_ids(_kept_vocabulary(vocabulary, checkpoint), str(vocabulary)),
        f"store {store.location}",
        f"the run of checkpoint {checkpoint.path}",
    )
    if rows is not None:
        model.encoder.id_table = torch.nn.Parameter(table.detach()[torch.from_numpy(rows).to(table.device)])
        model.num_items = len(rows)


def _kept_vocabulary(path: Path, checkpoint: Checkpoint) -> bytes:
    """The copy of its store's vocabulary that a run keeps, held against its checkpoint unless that is an older one."""
    data, hashes = path.read_bytes(), checkpoint.vocabulary
    try:
        return checked_table(data, path.name, hashes["rows"], hashes["file"]) if hashes else data
    except UserError as error:
        raise UserError(
            f"{path} is damaged ({str(error).partition(';')[0]}); copy it from the store that the run was trained on"
        ) from None


def check_features(store: Store, checkpoint: Checkpoint) -> None:
    """Refuse a store that lacks a feature of the checkpoint's model, or whose feature is another."""
    dims = feature_dims(store, tuple(checkpoint.features))
    if dims != checkpoint.features:
        raise UserError(
            f"checkpoint {checkpoint.path} reads features {checkpoint.features}; store {store.location} has {dims}"
        )
    found = feature_encoders(store)
    for name in checkpoint.features:
        differences = encoder_differences(checkpoint.feature_encoders.get(name, found[name]), found[name])
        mend = "with the same settings,"
        if name in store.manifest.fits and any(difference.startswith("revision ") for difference in differences):
            run = checkpoint.path.parent.parent
            place = run if (run / fit_file(name)).is_file() else "the run, or its store"
            mend = f"with data.features.{name}.fit: {place}, which keeps the fit,"
        require(
            not differences,
            f"checkpoint {checkpoint.path} was trained on another feature {name!r} than that of store "
            f"{store.location}: {list_differences(differences)}; build the store {mend} or train on this one",
        )


def build_recommender(
    checkpoint: Checkpoint, config: Config, store: Store, device: torch.device, size: int | None = None
) -> ExportedModel:
    """A checkpoint's model and the embeddings of the items in ``store``.

    Args:
        checkpoint: of a run.
        config: of the same run.
        store: its catalogue is ranked; it may differ from the run's store.
        device: computes, and holds the returned tensors.
        size: trained size to cut out; None for the full model.

    Raises:
        UserError: the size was not trained, or the store does not fit the model.
    """
    model = restore_model(config.model, checkpoint)
    if size is not None:
        model = model.truncate(size)
    model = model.to(device).eval()
    match_id_table(model, checkpoint, store)
    table = load_catalogue_table(store, checkpoint)
    items = embed_catalogue(model.encoder, table.values, table.present)
    origin = Origin(
        fmrl_dist_version=__version__,
        step=checkpoint.state.step,
        training_manifest_sha256=checkpoint.manifest_sha256,
        manifest_sha256=store.manifest.sha256,
        store=store.location,
    )
    return ExportedModel(
        model=model,
        items=items,
        max_length=config.data.max_length,
        predict_first=config.loss.predict_first,
        normalize=config.loss.normalize,
        origin=origin,
    )


def construct_model(
    config: ModelConfig,
    feature_dims: dict[str, int],
    num_items: int,
    matmul_dtype: torch.dtype | None,
    scan: str = "auto",
) -> FMRLRec:
    return FMRLRec(
        sizes=config.sizes,
        depth=config.depth,
        feature_dims=feature_dims,
        num_items=num_items if config.id_table else 0,
        **config.dropout_rates,
        dropout_power=config.dropout_power,
        r_min=config.r_min,
        r_max=config.r_max,
        input_norm=config.input_norm,
        output_norm=config.output_norm,
        matmul_dtype=matmul_dtype,
        scan=scan,
        id_width=config.id_width,
        id_init=config.id_init,
        mixer=config.mixer,
        head_width=config.head_width,
        positions=config.positions,
        window=config.num_window_events,
        low_pass=config.low_pass,
        low_pass_share=config.low_pass_share,
        item_encoder=config.item_encoder,
        experts=config.experts,
        codes=config.codes,
    )
