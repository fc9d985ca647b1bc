"""What an evaluation ranks with: a model and a catalogue, from a checkpoint or an export."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fmrl_dist.checkpoint.export_folder import Recommender
from fmrl_dist.checkpoint.folder import Checkpoint
from fmrl_dist.checkpoint.restore import (
    build_recommender,
    check_features,
    embed_catalogue,
    load_catalogue_table,
    restore_model,
)
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.processes import Runtime
from fmrl_dist.evaluation.catalogue import Catalogue, EmbeddedCatalogue, StreamedCatalogue
from fmrl_dist.evaluation.split_catalogue import SplitCatalogue, ranks_share
from fmrl_dist.model.fmrlrec import FMRLRec


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

    The processes share the items where :func:`fmrl_dist.evaluation.split_catalogue.ranks_share` says so; the figures
    are the same.

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
