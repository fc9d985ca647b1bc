"""What a run trains: model, loss and optimiser, initialised from the seed or a checkpoint, and saved to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmrl_dist.base.errors import require
from fmrl_dist.checkpoint.folder import Checkpoint, TrainState, load_checkpoint
from fmrl_dist.checkpoint.restore import check_features, load_weights
from fmrl_dist.checkpoint.writer import CheckpointWriter
from fmrl_dist.config.loading import config_from_dict
from fmrl_dist.data.feature_identity import feature_encoders
from fmrl_dist.data.item_statistics import scored_items
from fmrl_dist.data.item_table import ItemTable, load_item_table
from fmrl_dist.data.items_differ import check_items_differ
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.losses.item_tiles import RowMatrix
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.losses.split_catalogue import CatalogueSlice
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.build_model import build_inline_model, build_model, fitted_items
from fmrl_dist.training.checks import check_scan_impl, resolve_loss_impl, splits_catalogue
from fmrl_dist.training.engine import Engine, num_elements, prepare_engine
from fmrl_dist.training.id_table.item_draws import ItemNoise
from fmrl_dist.training.id_table.prepare import prepare_id_table
from fmrl_dist.training.id_table.rows import SeparateIdTable
from fmrl_dist.training.item_columns import (
    FeatureDropout,
    TableColumns,
    catalogue_columns,
    catalogue_slice,
    columns_dtype,
)
from fmrl_dist.training.module import TrainingModule
from fmrl_dist.training.optimizer import ID_TABLE, build_optimizer
from fmrl_dist.training.run import Run

NOISE_STREAM = 0x6E6F6973  # "nois": a separate random stream
# Keys of the model that say what its tensors mean, whatever their shapes; where |Λ| began, and dropout, may change.
MEANING = (
    "sizes",
    "depth",
    "mixer",
    "input_norm",
    "output_norm",
    "feature_scale",
    "id_table",
    "item_encoder",
)
ATTENTION = ("head_width", "positions", "window")
MEANING_OF = {  # further ones, by item encoder and by mixer
    **{"unisrec": ("experts",), "vqrec": ("codes",), "projection": ()},
    **{"lru": (), "filter": ("window",), "circular": ("window",), "attention": ATTENTION, "bidirectional": ATTENTION},
    "bsarec": (*ATTENTION, "low_pass", "low_pass_share"),
}


@dataclass(frozen=True)
class Learner:
    """What training changes, and the facts that each of its checkpoints records."""

    module: TrainingModule
    table: ItemTable | None  # features of all items; None if they are inline
    id_table: SeparateIdTable | None  # None if it is a parameter of the model, or there is none
    engine: Engine  # runs the module and the optimiser on all ranks together
    facts: dict[str, Any]

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Let the model have the weights that an evaluation needs on this rank; all ranks must enter together."""
        with self.engine.whole_weights(), nullcontext() if self.id_table is None else self.id_table.evaluated():
            yield

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        own = sum(num_elements(parameter) for parameter in self.module.model.parameters())
        return own if self.id_table is None else own + self.id_table.num_weights

    def state_dict(self) -> dict[str, Tensor]:
        """All of the model's tensors on rank 0; other ranks must call it, too."""
        ids = None if self.id_table is None else self.id_table.weights()
        return self.module.model.state_dict() | ({} if ids is None else {ID_TABLE: ids})


def prepare_learner(run: Run, resume_from: Checkpoint | None) -> Learner:
    """Model, loss and optimiser, initialised from the seed or from a checkpoint."""
    config, runtime = run.config, run.runtime
    check_scan_impl(config.model.scan, runtime.device)
    settings = LossSettings(
        sizes=config.model.sizes,
        temperatures=config.temperatures if config.loss.normalize or set(config.temperatures) != {1.0} else None,
        impl=resolve_loss_impl(config.loss.impl, runtime.device),
        dtype=runtime.matmul_dtype,
        distillation=config.loss.alphas(len(config.model.sizes)),
        teacher_temperature=config.loss.teacher_temperature,
    )
    torch.manual_seed(config.train.seed)
    table = load_item_table(run.store, config.model.features) if not run.inline else None
    if not config.model.has_ids:
        check_items_differ(run.store, config.model.features, table)
    if table is not None:
        model = build_model(config.model, table, runtime.matmul_dtype, fitted_items(run.store))
    else:
        model = build_inline_model(config.model, run.store, runtime, runtime.matmul_dtype)
    if resume_from is not None:
        load_weights(model, resume_from)
    elif config.train.init:
        load_initial_weights(model, run)
    split = table is not None and splits_catalogue(config, runtime)
    id_rows, id_table = prepare_id_table(model, run, split, resumed=resume_from is not None)
    model.to(runtime.device)
    dtype = columns_dtype(model.encoder, runtime.matmul_dtype)
    columns: RowMatrix | None = None
    part = None
    if table is not None and split:
        columns = TableColumns(model.encoder, table, dtype)
        part = catalogue_slice(model.encoder, table, dtype, runtime.rank, runtime.world_size)
    elif table is not None:
        columns = catalogue_columns(model.encoder, table, dtype)
    scored = scored_rows(run, part) if table is not None and config.loss.softmax == "full" else None
    rate = config.model.feature_dropout
    dropout = FeatureDropout(model.encoder, rate, config.train.seed) if rate else None
    count = model.encoder.num_noises
    noise = ItemNoise(count, NOISE_STREAM, config.train.seed) if count else None
    mask_rate = config.loss.mask_rate
    module = TrainingModule(
        model, columns, settings, config.loss.normalize, part, id_rows, scored, mask_rate, dropout, noise
    )
    optimizer = build_optimizer(
        model,
        lr=config.train.lr,
        betas=(config.train.beta1, config.train.beta2),
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        id_lr_factor=config.train.id_lr_factor,
        id_weight_decay=config.train.id_weight_decay,
    )
    engine = prepare_engine(runtime, module, optimizer, config.train.clip_norm, id_table)
    if resume_from is not None:
        engine.restore_optimizer(resume_from.optimizer)
    facts = {
        "config": config.to_dict(),
        "features": dict(model.encoder.feature_dims),
        "num_items": run.store.manifest.num_items,
        "manifest_sha256": run.store.manifest.sha256,
        "feature_encoders": feature_encoders(run.store),
        "vocabulary": vocabulary_hashes(run.store) if config.model.has_ids else {},
        "lanes": run.order.lanes,
    }
    return Learner(module, table, id_table, engine, facts)


def scored_rows(run: Run, part: CatalogueSlice | None) -> Tensor | None:
    """Which items the full softmax scores, as rows of the catalogue or of this rank's part of it; None for all."""
    with run.runtime.accelerator.local_main_process_first():
        scored = scored_items(run.store, run.config.loss.score_untrained)
    if scored is None:
        return None
    if part is not None:
        scored = scored[part.begin : part.begin + part.columns.shape[0]]
    return torch.from_numpy(np.flatnonzero(scored)).to(run.runtime.device)


def load_initial_weights(model: FMRLRec, run: Run) -> None:
    """Start a fresh run from the weights of another one (``train.init``), with a schedule of its own.

    Raises:
        UserError: they are of another model or of other features, or an id table is of another store's items.
    """
    source = load_checkpoint(Path(run.config.train.init), with_optimizer=False)
    features = model.encoder.feature_dims
    require(
        list(source.features.items()) == list(features.items()),  # in this order: it is that of the columns
        f"train.init {source.path} reads features {source.features}, this run {features}; choose another, or give "
        f"model.features {list(source.features)}",
    )
    theirs, ours = config_from_dict(source.config).model, run.config.model
    ids = ("id_width",) if ours.has_ids else ()
    for key in (*MEANING, *MEANING_OF[ours.item_encoder], *MEANING_OF[ours.mixer], *ids):
        before, now = getattr(theirs, key), getattr(ours, key)
        if key == "id_width":  # 0: all channels
            before, now = before or theirs.width, now or ours.width
        require(
            before == now,
            f"train.init {source.path} has model.{key} {before!r}, this run {now!r}: its weights mean something else; "
            f"choose another, or give model.{key}",
        )
    require(
        not run.config.model.has_ids or source.manifest_sha256 == run.store.manifest.sha256,
        f"train.init {source.path} has an id table of another store's items; use that store, or no model.id_table",
    )
    check_features(run.store, source)
    load_weights(model, source)


def vocabulary_hashes(store: Store) -> dict[str, str]:
    """What the copy of a store's vocabulary that a run keeps is held against."""
    return {"rows": store.manifest.tables[VOCAB_FILE], "file": store.manifest.table_files.get(VOCAB_FILE, "")}


def save(run: Run, learner: Learner, state: TrainState, writer: CheckpointWriter) -> None:
    """Save a checkpoint: every rank contributes its share of the optimiser, rank 0 writes everything."""
    moments = learner.engine.optimizer_tensors()
    with learner.engine.whole_weights():
        weights = learner.state_dict()
        if run.runtime.is_main:
            writer.save(state, weights, moments)
