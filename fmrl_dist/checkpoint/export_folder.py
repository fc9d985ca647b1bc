"""An exported model: one folder that needs neither a run nor a store. docs/format.md, "The export", describes it.

    config.json                   how to build the model, how it reads a history, where it came from
    model.safetensors             its state dict, float32
    item_embeddings.safetensors   the scoring embeddings: no item features are needed to deploy
    rotation.safetensors          what turns outputs and embeddings into vectors that may be cut
    item_vectors.safetensors      embeddings rotated and cut, for a retrieval index, if asked for
    vocab.parquet                 copied from the store: external ids, training counts, titles if any
    fit-<feature>.safetensors     copied from the store: what a new item's text is encoded with, of a fitted feature

V items, D the model's width, which is the exported size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, final_name, foreign_entries, json_sha256, replaced_folder
from fmrl_dist.data.feature_identity import MadeBy
from fmrl_dist.data.store.manifest import VOCAB_FILE, fit_file
from fmrl_dist.model.export_config import (
    CONFIG_FILE,
    check_export_file,
    export_config_text,
    read_export_config,
)
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from fmrl_dist.model.rotation import rotate_tiles

ITEMS_FILE = "item_embeddings.safetensors"
ITEMS_TENSOR = "item_embeddings"
ROTATION_FILE = "rotation.safetensors"
ROTATION_TENSOR = "rotation"
VECTORS_FILE = "item_vectors.safetensors"
VECTORS_TENSOR = "item_vectors"
# What an export may also have: fits of its features, and what fmrl_dist.evaluate adds.
ADDED = re.compile(
    r"fit-[a-z][a-z0-9_]*\.safetensors|item_vectors\.safetensors|evaluation(-[a-z0-9-]+)?\.(json|png|parts|parquet)",
    re.ASCII,
)
FILES = (CONFIG_FILE, MODEL_FILE, ITEMS_FILE, ROTATION_FILE, VOCAB_FILE)


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

    def to(self, device: torch.device) -> ExportedModel:
        rotation = None if self.rotation is None else self.rotation.to(device)
        return replace(self, model=self.model.to(device), items=self.items.to(device), rotation=rotation)


def is_export(folder: Path) -> bool:
    """Whether ``folder`` is an export, intact or damaged: any model of the Hub has a ``config.json``."""
    if (folder / ITEMS_FILE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"format_version", "origin"} <= config.keys()


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it is an export to overwrite."""
    if not folder.exists():
        return
    require(is_export(folder), f"{folder} exists and is not an export; choose another --output")
    foreign = foreign_entries(folder, lambda name: name in FILES or ADDED.fullmatch(final_name(name)) is not None)
    require(
        not foreign,
        f"{folder} holds {', '.join(foreign[:3])}, which an export does not have; move it away, or choose another "
        "--output",
    )
    require(overwrite, f"export {folder} exists; keep it, or replace it with --overwrite")


def write_export(
    recommender: ExportedModel,
    folder: Path,
    vocab: bytes,
    encoders: Mapping[str, MadeBy],
    fits: Mapping[str, bytes],
    overwrite: bool,
    vectors: int = 0,
) -> None:
    """Write ``folder``.

    Args:
        recommender: the model and its catalogue, with a rotation if vectors can be cut.
        folder: to write.
        vocab: the store's vocabulary file.
        encoders: what made each feature that the model reads.
        fits: file of each of those that was fitted to its items.
        overwrite: replace an existing export.
        vectors: also write item vectors cut to so many channels; 0 for none.

    Raises:
        UserError: as :func:`check_output`, or another process is writing ``folder``.
    """
    config = {
        "model": recommender.model.arguments,
        "num_items": len(recommender.items),
        "max_length": recommender.max_length,
        "predict_first": recommender.predict_first,
        "normalize": recommender.normalize,
        **({"vectors": vectors} if vectors else {}),
        "feature_encoders": encoders,
        "origin": asdict(recommender.origin),
    }
    with replaced_folder(folder) as aside:
        check_output(folder, overwrite)  # another process may have written it since it was looked at
        (aside / VOCAB_FILE).write_bytes(vocab)
        _save(recommender.model.state_dict(), aside / MODEL_FILE)
        _save({ITEMS_TENSOR: recommender.items}, aside / ITEMS_FILE)
        names = [MODEL_FILE, ITEMS_FILE, VOCAB_FILE]
        if recommender.rotation is not None:
            _save({ROTATION_TENSOR: recommender.rotation}, aside / ROTATION_FILE)
            names.append(ROTATION_FILE)
        if vectors:
            assert recommender.rotation is not None
            rotated = rotate_tiles(recommender.items, recommender.rotation)
            _save({VECTORS_TENSOR: rotated[:, :vectors]}, aside / VECTORS_FILE)
            names.append(VECTORS_FILE)
        for feature, data in fits.items():
            (aside / fit_file(feature)).write_bytes(data)
            names.append(fit_file(feature))
        (aside / CONFIG_FILE).write_text(export_config_text(config, aside, names), encoding="utf-8")
        for name in aside.glob("*.safetensors"):  # safetensors makes files readable only by their owner
            shutil.copymode(aside / CONFIG_FILE, name)
        if not overwrite:
            check_output(folder, overwrite)  # or meanwhile, where there are no locks


def read_export(folder: Path) -> ExportedModel:
    """Read what :func:`write_export` wrote, except the vocabulary, on the CPU.

    Raises:
        UserError: the folder is not an export, is damaged, or has another version.
    """
    model = FMRLRec.from_pretrained(folder)
    try:
        config = read_export_config(folder)
        check_export_file(folder, config, ITEMS_FILE)
        items = load_file(folder / ITEMS_FILE)[ITEMS_TENSOR]
        if not items.isfinite().all():
            raise ValueError(f"{ITEMS_FILE} holds numbers that are not finite")
        shape = (config["num_items"], model.width)
        if items.dtype != torch.float32 or items.shape != shape:
            raise ValueError(f"{ITEMS_FILE} is {items.dtype} {list(items.shape)}; expected float32 {list(shape)}")
        rotation = _read_rotation(folder, config, model.width)
        max_length, predict_first, origin = config["max_length"], config["predict_first"], Origin(**config["origin"])
        normalize = config.get("normalize", False)  # missing from older exports
        if type(max_length) is not int or max_length < 1 or {type(predict_first), type(normalize)} != {bool}:
            raise ValueError(
                f"max_length, predict_first, normalize are {max_length!r}, {predict_first!r}, {normalize!r}"
            )
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise _damaged(folder, error) from None
    return ExportedModel(model, items, max_length, predict_first, origin, normalize, rotation)


def _read_rotation(folder: Path, config: Mapping[str, Any], width: int) -> Tensor | None:
    """The rotation of an export; None if it is from before there was one."""
    if ROTATION_FILE not in config.get("sha256_of", {}):
        return None
    check_export_file(folder, config, ROTATION_FILE)
    rotation = load_file(folder / ROTATION_FILE)[ROTATION_TENSOR]
    shape = (width, width)
    if rotation.dtype != torch.float32 or rotation.shape != shape:
        raise ValueError(f"{ROTATION_FILE} is {rotation.dtype} {list(rotation.shape)}; expected float32 {list(shape)}")
    if not torch.allclose(rotation.T @ rotation, torch.eye(width), atol=1e-4):
        raise ValueError(f"{ROTATION_FILE} is not orthogonal")
    return rotation


def read_export_vocabulary(folder: Path) -> bytes:
    """The vocabulary file of an export.

    Raises:
        UserError: the export is damaged.
    """
    try:
        check_export_file(folder, read_export_config(folder), VOCAB_FILE)
        return (folder / VOCAB_FILE).read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UserError:
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"export {folder} is damaged ({problem}); export it again")


def export_sha256(folder: Path) -> str:
    """Hash of the files an export ranks with: all except the vocabulary."""
    return json_sha256({name: file_sha256(folder / name) for name in (CONFIG_FILE, MODEL_FILE, ITEMS_FILE)})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # expected by other readers of the Hub
