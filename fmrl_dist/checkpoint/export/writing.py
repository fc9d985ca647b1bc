"""An export is written: the files of its format aside, then ``config.json`` with their hashes, then a rename."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fmrl_dist.base.files import replaced_folder
from fmrl_dist.checkpoint.export.files import (
    CARD_FILE,
    ITEMS_FILE,
    ITEMS_TENSOR,
    ROTATION_FILE,
    ROTATION_TENSOR,
    SEARCH_TENSOR,
    VECTORS_FILE,
    VECTORS_TENSOR,
    check_no_changes,
    check_output,
    is_evaluation,
    is_export_file,
)
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts, cut_vectors, stored_or_refused
from fmrl_dist.data.store.manifest import VOCAB_FILE, fit_file
from fmrl_dist.model.export_config import CONFIG_FILE, export_config_text
from fmrl_dist.model.fmrlrec import MODEL_FILE


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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of an export."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # expected by other readers of the Hub
