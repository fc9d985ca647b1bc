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

import json
import re
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import final_name, foreign_entries
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.model.export_config import CHANGES, CONFIG_FILE, REMOVED
from fmrl_dist.model.fmrlrec import MODEL_FILE

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
