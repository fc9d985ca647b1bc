"""What an evaluation ranks with: a model and a catalogue, from a run in training, a checkpoint or an export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.checkpoint.restore import check_features, load_catalogue_table, match_id_table, restore_model
from fmrl_dist.config.sections import Config
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.evaluation.catalogue import Catalogue, EmbeddedCatalogue, StreamedCatalogue
from fmrl_dist.evaluation.split_catalogue import SplitCatalogue, is_shared, tile_bounds
from fmrl_dist.model.embed_catalogue import check_rankable, embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder

CPU = torch.device("cpu")


class SequenceModel(Protocol):
    """What turns packed histories into outputs, which are scored against items."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Prefixes of outputs and items that are ranked with."""

    def __call__(self, items: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        """Outputs [N, D] for histories of N items without start positions, as :meth:`FMRLRec.forward` makes them."""


@dataclass(frozen=True)
class RotatedModel:
    """A whole model whose outputs are rotated, then cut to each of some sizes (:mod:`fmrl_dist.model.rotation`)."""

    model: SequenceModel
    rotation: Tensor  # float32 [D, D]
    sizes: tuple[int, ...]

    def __call__(self, items: Tensor, starts: Tensor, from_start: Tensor) -> Tensor:
        """Outputs [N, D]."""
        return self.model(items, starts, from_start) @ self.rotation


@dataclass(frozen=True)
class Ranker:
    """A model in evaluation mode, and the catalogue."""

    model: SequenceModel
    catalogue: Catalogue
    max_length: int  # number of last events of a history that the model reads
    normalize: bool  # whether scores are cosines of each size's prefixes
    device: torch.device = CPU  # of model and catalogue
    temperatures: tuple[float, ...] = ()  # what each size's scores are divided by before a softmax; empty: 1
    rotation: Tensor | None = None  # of cut vectors, float32 [D, D], if it is known already

    def rotated(self, rotation: Tensor, sizes: tuple[int, ...]) -> Ranker:
        """The whole model, its outputs and item vectors rotated and cut to each of ``sizes``."""
        assert isinstance(self.catalogue, EmbeddedCatalogue | SplitCatalogue | StreamedCatalogue), "a model's own items"
        catalogue = self.catalogue.rotated(rotation)
        return replace(self, model=RotatedModel(self.model, rotation, sizes), catalogue=catalogue)


def build_ranker(model: FMRLRec, config: Config, store: Store, table: ItemTable | None, runtime: Runtime) -> Ranker:
    """A ranker of the store's items; figures are the same in all three cases.

        no table     streamed   embedded block by block, in every pass
        many items   split      each process embeds its share (:func:`fmrl_dist.evaluation.split_catalogue.is_shared`)
        otherwise    embedded   each process embeds all

    Args:
        model: on the runtime's device, in evaluation mode, so float32 throughout.
        config: of the run.
        store: its catalogue is ranked.
        table: its items' features; None for an inline store, whose item shards are streamed.
        runtime: this process and its group.
    """
    catalogue: Catalogue
    if table is None:
        catalogue = StreamedCatalogue(model.encoder, store, model.encoder.feature_dims)
    elif is_shared_by(config, model, len(table.values), runtime):
        embed = partial(embed_catalogue, model.encoder, table.values, table.present)
        catalogue = SplitCatalogue.embed(runtime.rank, runtime.world_size, len(table.values), embed)
    else:
        catalogue = EmbeddedCatalogue(embed_catalogue(model.encoder, table.values, table.present))
    temperatures = config.temperatures
    return Ranker(model, catalogue, config.data.max_length, config.loss.normalize, runtime.device, temperatures)


def ranker_of_checkpoint(checkpoint: Checkpoint, config: Config, store: Store, runtime: Runtime) -> Ranker:
    """A checkpoint's model and the items of ``store``, streamed if run and store are inline.

    Raises:
        UserError: the store does not fit the model.
    """
    model = restore_model(config.model, checkpoint).eval()
    if config.store.feature_mode == "inline" and store.manifest.inline:
        check_features(store, checkpoint)
        return build_ranker(model.to(runtime.device), config, store, None, runtime)
    match_id_table(model, checkpoint, store)
    table = load_catalogue_table(store, checkpoint)
    if model.encoder.id_table is not None and is_shared_by(config, model, len(table.values), runtime):
        keep_own_rows(model.encoder, model.encoder.id_table, len(table.values), runtime)
    return build_ranker(model.to(runtime.device), config, store, table, runtime)


def is_shared_by(config: Config, model: FMRLRec, num_items: int, runtime: Runtime) -> bool:
    """Whether the processes of an evaluation share the items."""
    return is_shared(num_items, model.width, runtime.world_size, in_loss=config.loss.catalogue == "split")


def keep_own_rows(encoder: ItemEncoder, id_table: Tensor, num_items: int, runtime: Runtime) -> None:
    """Leave the encoder the id table's rows of the items that this process embeds, as a split catalogue has them."""
    begin, end = tile_bounds(num_items, runtime.world_size)[runtime.rank : runtime.rank + 2]
    encoder.id_table, encoder.first_id_row = nn.Parameter(id_table.detach()[begin:end].clone()), begin


def ranker_of_export(recommender: ExportedModel) -> Ranker:
    """An exported model and its own item embeddings.

    Raises:
        UserError: the embeddings are too large to compare.
    """
    check_rankable(recommender.items, "item embeddings")
    catalogue = EmbeddedCatalogue(recommender.items)
    return Ranker(
        recommender.model,
        catalogue,
        recommender.max_length,
        recommender.normalize,
        recommender.items.device,
        rotation=recommender.rotation,
    )
