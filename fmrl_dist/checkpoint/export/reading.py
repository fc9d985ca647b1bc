"""An export is read, each file held against its hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.checkpoint.export.files import (
    CARD_FILE,
    FIT,
    ITEMS_FILE,
    ITEMS_TENSOR,
    ROTATION_FILE,
    ROTATION_TENSOR,
    SEARCH_TENSOR,
    is_export_file,
)
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts, Origin
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.model.export_config import CHANGES, CONFIG_FILE, REMOVED, check_export_file, read_export_config
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from fmrl_dist.model.stored_tensors import restored


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
