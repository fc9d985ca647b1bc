"""What an export is made of: a trained model, the catalogue it ranks, and what its folder holds beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.files import ITEMS_TENSOR
from fmrl_dist.data.feature_identity import MadeBy
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.rotation import rotate_tiles
from fmrl_dist.model.stored_tensors import restored, stored


@dataclass(frozen=True)
class Origin:
    """Where a model and its catalogue came from."""

    fmrl_dist_version: str  # the version that wrote the export
    step: int  # of the checkpoint
    training_manifest_sha256: str  # store it was trained on
    manifest_sha256: str  # store of its catalogue and vocabulary
    store: str  # that store's folder, or its URL without credentials


@dataclass(frozen=True)
class ExportedModel:
    """A trained model and the catalogue it ranks."""

    model: FMRLRec  # float32, in evaluation mode
    items: Tensor  # scoring embeddings, float32 [V, D]
    max_length: int  # number of last events of a history that the model reads
    predict_first: bool  # whether the start position, which serves an empty history, was trained
    origin: Origin
    normalize: bool = False  # whether scores are cosines of each size's prefixes
    rotation: Tensor | None = None  # orthogonal [D, D], for cut vectors; older exports have none
    search_rotation: Tensor | None = None  # orthogonal [D, D], for a funnel's prefix; None: ``rotation``, or none

    def to(self, device: torch.device) -> ExportedModel:
        rotation, search = (
            None if matrix is None else matrix.to(device) for matrix in (self.rotation, self.search_rotation)
        )
        model, items = self.model.to(device), self.items.to(device)
        return replace(self, model=model, items=items, rotation=rotation, search_rotation=search)


@dataclass(frozen=True)
class ExportParts:
    """What an export's folder holds beside the model and its catalogue."""

    vocab: bytes  # the store's vocabulary file
    encoders: Mapping[str, MadeBy]  # what made each feature that the model reads, and what it is codes of
    fits: Mapping[str, bytes]  # file of each of those that was fitted to its items
    vectors: int = 0  # also write item vectors cut to so many channels; 0 for none
    dtype: str = "float32"  # of matrices, one of ``DTYPES``
    quality: Mapping[str, Any] | None = None  # what the dtype costs, as measured
    card: str = ""  # the model card
    changes: Mapping[str, Any] = field(default_factory=dict)  # keys of a catalogue that has changed since its export


def cut_vectors(exported: ExportedModel, size: int) -> Tensor:
    """Item embeddings rotated and cut, float32 [V, size]."""
    assert exported.rotation is not None
    return rotate_tiles(exported.items, exported.rotation)[:, :size]


def as_stored(recommender: ExportedModel, dtype: str) -> ExportedModel:
    """What :func:`read_export` reads from an export of ``dtype``.

    Raises:
        UserError: a number does not fit the dtype.
    """
    if dtype == "float32":
        return recommender
    tensors = restored(stored_or_refused(recommender.model.state_dict(), dtype), dtype)
    items = restored(stored_or_refused({ITEMS_TENSOR: recommender.items}, dtype), dtype)[ITEMS_TENSOR]
    model = copy.deepcopy(recommender.model)
    model.load_state_dict(tensors)
    return replace(recommender, model=model, items=items)


def stored_or_refused(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """See :func:`fmrl_dist.model.stored_tensors.stored`.

    Raises:
        UserError: a number does not fit the dtype.
    """
    try:
        return stored(tensors, dtype)
    except ValueError as error:
        raise UserError(f"the model cannot be stored as {dtype}: {error}; use --dtype float32") from None
