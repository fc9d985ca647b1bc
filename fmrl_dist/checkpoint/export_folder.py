"""An exported model: one folder that needs neither a run nor a store. docs/format.md, "The export", describes it.

    config.json                   how to build the model, how it reads a history, where it came from
    model.safetensors             its state dict
    item_embeddings.safetensors   the scoring embeddings: no item features are needed to deploy
    rotation.safetensors          what turns outputs and embeddings into vectors that may be cut
    item_vectors.safetensors      embeddings rotated and cut, for a retrieval index, if asked for
    vocab.parquet                 copied from the store: external ids, training counts, titles if any
    fit-<feature>.safetensors     copied from the store: what a new item's text is encoded with, of a fitted feature
    README.md                     the model card

Matrices are float32, float16 or int8 in the files, and float32 once they are read. The folder of an ONNX export has
graphs and arrays instead of the model's files (:mod:`fmrl_dist.deploy.onnx_format`).

V items, D the model's width, which is the exported size.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
    CHANGES,
    CONFIG_FILE,
    REMOVED,
    check_export_file,
    export_config_text,
    read_export_config,
)
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from fmrl_dist.model.rotation import rotate_tiles
from fmrl_dist.model.stored_tensors import restored, stored

ITEMS_FILE = "item_embeddings.safetensors"
ITEMS_TENSOR = "item_embeddings"
ROTATION_FILE = "rotation.safetensors"
ROTATION_TENSOR, SEARCH_TENSOR = "rotation", "search_rotation"
VECTORS_FILE = "item_vectors.safetensors"
VECTORS_TENSOR = "item_vectors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, MODEL_FILE, ITEMS_FILE, ROTATION_FILE, VOCAB_FILE, CARD_FILE)
STEP_FILE, ENCODER_FILE = "step.onnx", "item_encoder.onnx"
ITEMS_ARRAY, SCALES_ARRAY = "item_embeddings.npy", "item_scales.npy"
START_ARRAY, ROTATION_ARRAY = "start.npy", "rotation.npy"
ONNX_FILES = (STEP_FILE, ENCODER_FILE, ITEMS_ARRAY, SCALES_ARRAY, START_ARRAY, ROTATION_ARRAY)
FIT = re.compile(r"fit-([a-z][a-z0-9_]*)\.safetensors", re.ASCII)  # of a fitted feature
ADDED = re.compile(r"evaluation(-[a-z0-9-]+)?\.(json|png|parts|parquet)", re.ASCII)  # by fmrl_dist.evaluate


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


def is_export(folder: Path) -> bool:
    """Whether ``folder`` is an export, intact or damaged: any model of the Hub has a ``config.json``."""
    return (folder / ITEMS_FILE).is_file() or {"format_version", "origin"} <= _config_as_found(folder).keys()


def _config_as_found(folder: Path) -> dict[str, Any]:
    """``config.json``, unchecked; empty if it is missing or cannot be read."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it is an export to overwrite that holds nothing of others."""
    if not folder.exists():
        return
    require(is_export(folder), f"{folder} exists and is not an export; choose another --output")
    listed = _config_as_found(folder).get("sha256_of")
    own = {CONFIG_FILE, *listed} if isinstance(listed, dict) else None  # None: of an older version, or damaged
    foreign = foreign_entries(
        folder, lambda name: is_evaluation(name) or (is_export_file(name) and (own is None or name in own))
    )
    require(
        not foreign,
        f"{folder} holds {', '.join(foreign[:3])}, which an export does not have; move it away, or choose another "
        "--output",
    )
    require(overwrite, f"export {folder} exists; keep it, or replace it with --overwrite")


def check_no_changes(folder: Path) -> None:
    """Refuse an export whose catalogue has changed since: to export a run again would undo it without a word.

    Raises:
        UserError: items were added, updated or removed.
    """
    config = _config_as_found(folder)
    if not (config.get(CHANGES) or config.get(REMOVED)):
        return
    changes = config.get(CHANGES)
    counts = changes if isinstance(changes, dict) else {"removed": config.get(REMOVED)}
    done = ", ".join(f"{count} {name}" for name, count in counts.items())
    raise UserError(
        f"export {folder} was changed by fmrl_dist.add_items (items: {done}), which --overwrite would undo; choose "
        "another --output, or remove the folder, export, and apply the changes again"
    )


def is_export_file(name: str) -> bool:
    """Whether a file of that name can be an export's own, of any format."""
    return name in (*FILES, VECTORS_FILE, *ONNX_FILES) or FIT.fullmatch(name) is not None


def is_evaluation(name: str) -> bool:
    """Whether a file of that name is what an evaluation puts into an export, or leaves there if it is killed."""
    return ADDED.fullmatch(final_name(name)) is not None


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


def write_export(recommender: ExportedModel, folder: Path, parts: ExportParts, overwrite: bool) -> None:
    """Write ``folder``, in safetensors.

    Args:
        recommender: the model and its catalogue, with a rotation if vectors can be cut.
        folder: to write.
        parts: what else belongs into it.
        overwrite: replace an existing export.

    Raises:
        UserError: as :func:`check_output`, another process is writing ``folder``, or a number does not fit the dtype.
    """
    with folder_of_export(recommender, folder, parts, overwrite, "safetensors") as aside:
        save_tensors(stored_or_refused(recommender.model.state_dict(), parts.dtype), aside / MODEL_FILE)
        save_tensors(stored_or_refused({ITEMS_TENSOR: recommender.items}, parts.dtype), aside / ITEMS_FILE)
        if recommender.rotation is not None:
            rotations = {ROTATION_TENSOR: recommender.rotation, SEARCH_TENSOR: recommender.search_rotation}
            # Copies: one matrix may be both, and safetensors refuses tensors that share memory.
            present = {name: matrix.clone() for name, matrix in rotations.items() if matrix is not None}
            save_tensors(present, aside / ROTATION_FILE)
        if parts.vectors:
            vectors = cut_vectors(recommender, parts.vectors)
            save_tensors(stored_or_refused({VECTORS_TENSOR: vectors}, parts.dtype), aside / VECTORS_FILE)


def cut_vectors(exported: ExportedModel, size: int) -> Tensor:
    """Item embeddings rotated and cut, float32 [V, size]."""
    assert exported.rotation is not None
    return rotate_tiles(exported.items, exported.rotation)[:, :size]


@contextmanager
def folder_of_export(
    recommender: ExportedModel,
    folder: Path,
    parts: ExportParts,
    overwrite: bool,
    format_name: str,
    further: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """A temporary folder to write the files of a format into; it becomes ``folder`` if the block succeeds.

    Vocabulary, fits, card and ``config.json``, with the hashes of all files, are added to it.

    Args:
        recommender: the model and its catalogue.
        folder: to write.
        parts: what else belongs into it.
        overwrite: replace an existing export.
        format_name: one of ``FORMATS``.
        further: keys of ``config.json`` that only this format has; it may be filled while the folder is.

    Raises:
        UserError: as :func:`check_output` and, unless ``parts`` has changes, :func:`check_no_changes`; or another
            process is writing ``folder``.
    """
    with replaced_folder(folder, is_kept=lambda name: not is_evaluation(name)) as aside:
        check_output(folder, overwrite)  # another process may have written it since it was looked at
        if not parts.changes:
            check_no_changes(folder)
        (aside / VOCAB_FILE).write_bytes(parts.vocab)
        for feature, data in parts.fits.items():
            (aside / fit_file(feature)).write_bytes(data)
        (aside / CARD_FILE).write_text(parts.card, encoding="utf-8")
        yield aside
        names = sorted(path.name for path in aside.iterdir())
        assert all(map(is_export_file, names)), names
        config = _config_of(recommender, parts, format_name) | dict(further or {})
        (aside / CONFIG_FILE).write_text(export_config_text(config, aside, names), encoding="utf-8")
        for name in names:  # safetensors makes files readable only by their owner
            shutil.copymode(aside / CONFIG_FILE, aside / name)
        if not overwrite:
            check_output(folder, overwrite)  # or meanwhile, where there are no locks


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


def _config_of(recommender: ExportedModel, parts: ExportParts, format_name: str) -> dict[str, Any]:
    return {
        "format": format_name,
        "dtype": parts.dtype,
        "model": recommender.model.arguments,
        "num_items": len(recommender.items),
        "max_length": recommender.max_length,
        "predict_first": recommender.predict_first,
        "normalize": recommender.normalize,
        **({"vectors": parts.vectors} if parts.vectors else {}),
        "quality": dict(parts.quality or {"not_measured": "it was not asked for"}),
        **parts.changes,
        "feature_encoders": dict(parts.encoders),
        "origin": asdict(recommender.origin),
    }


def stored_or_refused(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """See :func:`fmrl_dist.model.stored_tensors.stored`.

    Raises:
        UserError: a number does not fit the dtype.
    """
    try:
        return stored(tensors, dtype)
    except ValueError as error:
        raise UserError(f"the model cannot be stored as {dtype}: {error}; use --dtype float32") from None


def read_export(folder: Path) -> ExportedModel:
    """Read what :func:`write_export` wrote, except the vocabulary: float32 on the CPU, whatever dtype the files have.

    Raises:
        UserError: the folder is not an export, is damaged, of another version, or of a format that is for others.
    """
    model = FMRLRec.from_pretrained(folder)
    try:
        config = read_export_config(folder)
        check_export_file(folder, config, ITEMS_FILE)
        items = restored(load_file(folder / ITEMS_FILE), config["dtype"])[ITEMS_TENSOR]
        shape = (config["num_items"], model.width)
        if items.shape != shape:
            raise ValueError(f"{ITEMS_FILE} is {list(items.shape)}; expected {list(shape)}")
        rotation, search_rotation = _read_rotations(folder, config, model.width)
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
    return ExportedModel(model, items, max_length, predict_first, origin, normalize, rotation, search_rotation)


def _read_rotations(folder: Path, config: Mapping[str, Any], width: int) -> tuple[Tensor | None, Tensor | None]:
    """The rotations of an export, for cut vectors and for a search; None where it is from before there was one."""
    if ROTATION_FILE not in config.get("sha256_of", {}):
        return None, None
    check_export_file(folder, config, ROTATION_FILE)
    tensors = load_file(folder / ROTATION_FILE)
    rotation, search_rotation = tensors[ROTATION_TENSOR], tensors.get(SEARCH_TENSOR)
    for name, matrix in {ROTATION_TENSOR: rotation, SEARCH_TENSOR: search_rotation}.items():
        if matrix is None:
            continue
        shape = (width, width)
        if matrix.dtype != torch.float32 or matrix.shape != shape:
            found = f"{matrix.dtype} {list(matrix.shape)}"
            raise ValueError(f"{name} of {ROTATION_FILE} is {found}; expected float32 {list(shape)}")
        if not torch.allclose(matrix.T @ matrix, torch.eye(width), atol=1e-4):
            raise ValueError(f"{name} of {ROTATION_FILE} is not orthogonal")
    return rotation, search_rotation


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


def read_export_parts(folder: Path) -> ExportParts:
    """What an export's folder holds beside the model and its catalogue: to write it again, changed.

    Raises:
        UserError: the export is damaged, or of another version.
    """
    try:
        config = read_export_config(folder)
        names = config.get("sha256_of") or dict.fromkeys(path.name for path in folder.iterdir())
        fits = {found[1]: name for name in names if (found := FIT.fullmatch(name))}
        for name in (VOCAB_FILE, *fits.values(), *([CARD_FILE] if CARD_FILE in names else [])):
            check_export_file(folder, config, name)
        return ExportParts(
            vocab=(folder / VOCAB_FILE).read_bytes(),
            encoders=config.get("feature_encoders", {}),
            fits={feature: (folder / name).read_bytes() for feature, name in fits.items()},
            vectors=config.get("vectors", 0),
            dtype=config["dtype"],
            quality=config.get("quality"),
            card=(folder / CARD_FILE).read_text(encoding="utf-8") if CARD_FILE in names else "",
            changes={key: config[key] for key in (CHANGES, REMOVED) if key in config},
        )
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def intact_files(folder: Path) -> list[str]:
    """Names of all files of an export of any format, each of which has the hash that ``config.json`` says.

    Raises:
        UserError: it is not an export, is damaged, or older than hashes.
    """
    require((folder / CONFIG_FILE).is_file(), f"{folder} is not an export: it has no {CONFIG_FILE}")
    try:
        config = read_export_config(folder)
        names = [CONFIG_FILE, *config.get("sha256_of", {})]
        if not all(map(is_export_file, names)):
            raise ValueError(f"{CONFIG_FILE} names files that an export does not have")
        for name in names[1:]:
            check_export_file(folder, config, name)
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from None
    require(len(names) > 1, f"export {folder} has no hashes: it is of an older version; export the run again")
    return names


def _damaged(folder: Path, error: Exception) -> UserError:
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"export {folder} is damaged ({problem}); export it again")


def export_sha256(folder: Path) -> str:
    """Hash of the files an export ranks with: all except the vocabulary."""
    return json_sha256({name: file_sha256(folder / name) for name in (CONFIG_FILE, MODEL_FILE, ITEMS_FILE)})


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of an export."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # expected by other readers of the Hub
