"""The files of an export that have a row for each item, with rows appended or replaced; other rows keep their bytes.

V items before, n rows to write, D the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.files import (
    ENCODER_FILE,
    ITEMS_ARRAY,
    ITEMS_FILE,
    ITEMS_TENSOR,
    ROTATION_FILE,
    ROTATION_TENSOR,
    SCALES_ARRAY,
    VECTORS_FILE,
    VECTORS_TENSOR,
)
from fmrl_dist.checkpoint.export.writing import save_tensors
from fmrl_dist.deploy.catalogue.borrowed_ids import borrowed_ids
from fmrl_dist.deploy.onnx_format import check_installed
from fmrl_dist.model.embed_catalogue import check_rankable
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.item_encoders.item_encoder import ItemEncoder
from fmrl_dist.model.nested import add_prefix
from fmrl_dist.model.rotation import rotate_tiles
from fmrl_dist.model.stored_tensors import SCALE, restored, stored

Embed = Callable[[Tensor, Tensor, np.ndarray], Tensor]


def embedder(folder: Path, config: Mapping[str, Any]) -> Embed:
    """What turns features into embeddings, of the export in ``folder``.

    Called with raw features float16 [n, F], which of them are there bool [n, M], and the rows int64 [n] that the items
    have or will have; returns float32 [n, D]. Rows of the id table are added, to items that came later
    :func:`~fmrl_dist.deploy.catalogue.borrowed_ids.borrowed_ids`; for onnxruntime, of which the export has no ids, not.

    Raises:
        UserError: the export is damaged; or calling it: the result cannot be ranked with.
    """
    if config["format"] == "onnx":
        return lambda values, present, rows: _embed_in_onnx(folder, config, values, present, rows)
    model = FMRLRec.from_pretrained(folder)
    items = None
    if model.encoder.id_table is not None:
        items = restored(load_file(folder / ITEMS_FILE), config["dtype"])[ITEMS_TENSOR]
    return lambda values, present, rows: embed(model.encoder, items, values, present, rows)


@torch.no_grad()
def embed(encoder: ItemEncoder, items: Tensor | None, values: Tensor, present: Tensor, rows: np.ndarray) -> Tensor:
    """See :func:`embedder`; ``items`` are the export's embeddings [V, D], if the encoder has ids."""
    embeddings = encoder.without_ids(encoder.normalize(values, present), present)
    if encoder.id_table is not None:
        assert items is not None
        num_ids = len(encoder.id_table)
        ids = encoder.id_table[torch.from_numpy(rows.clip(max=num_ids - 1))]
        is_new = torch.from_numpy(rows >= num_ids)
        ids[is_new] = borrowed_ids(embeddings[is_new], encoder.id_table, items[:num_ids])
        ids[is_new & ~present.any(1)] = 0  # of which nothing is known: it is like no other
        embeddings = add_prefix(embeddings, ids)
    check_rankable(embeddings, "item embeddings")
    return embeddings


def _embed_in_onnx(
    folder: Path, config: Mapping[str, Any], values: Tensor, present: Tensor, rows: np.ndarray
) -> Tensor:
    check_installed()
    import onnxruntime

    if (rows < config["model"]["num_items"]).any():
        raise UserError(
            f"{folder} is for onnxruntime, and does not hold the ids that the model has learned of the items to "
            "update; update an export of format safetensors of the same run"
        )
    session = onnxruntime.InferenceSession(folder / ENCODER_FILE, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"features": values.float().numpy(), "present": present.numpy()})
    embeddings = torch.from_numpy(np.asarray(found))
    check_rankable(embeddings, "item embeddings")
    return embeddings


def write_item_files(
    folder: Path, config: Mapping[str, Any], aside: Path, rows: np.ndarray, embeddings: Tensor
) -> None:
    """Write into ``aside`` each file of ``folder`` that has a row for each item.

    Args:
        folder: of an export.
        config: its ``config.json``.
        aside: folder to write into.
        rows: int64 [n], of the items whose embeddings these are; from V on they are appended, in order.
        embeddings: float32 [n, D].

    Raises:
        UserError: a number does not fit the dtype.
        ValueError, OSError, LookupError, SafetensorError: a file is damaged.
    """
    new = _stored(ITEMS_TENSOR, embeddings, config["dtype"])
    if config["format"] == "onnx":
        for name, tensor in ((ITEMS_ARRAY, ITEMS_TENSOR), (SCALES_ARRAY, ITEMS_TENSOR + SCALE)):
            if tensor in new:
                old = torch.from_numpy(np.load(folder / name, allow_pickle=False))
                np.save(aside / name, _changed(old, rows, new[tensor], name).numpy())
        return
    _write(folder / ITEMS_FILE, aside / ITEMS_FILE, rows, new)
    if VECTORS_FILE in config["sha256_of"]:
        rotation = load_file(folder / ROTATION_FILE)[ROTATION_TENSOR]
        vectors = rotate_tiles(embeddings, rotation)[:, : config["vectors"]]
        _write(folder / VECTORS_FILE, aside / VECTORS_FILE, rows, _stored(VECTORS_TENSOR, vectors, config["dtype"]))


def _stored(name: str, rows: Tensor, dtype: str) -> dict[str, Tensor]:
    try:
        return stored({name: rows}, dtype)
    except ValueError as error:
        raise UserError(
            f"the items cannot be stored as {dtype}: {error}; export the run as float32, and change that export"
        ) from None


def _write(source: Path, target: Path, rows: np.ndarray, new: Mapping[str, Tensor]) -> None:
    old = load_file(source)
    if set(old) != set(new):
        raise ValueError(f"{source.name} holds {', '.join(sorted(old))}; expected {', '.join(sorted(new))}")
    save_tensors({name: _changed(old[name], rows, new[name], source.name) for name in new}, target)


def _changed(old: Tensor, rows: np.ndarray, new: Tensor, name: str) -> Tensor:
    if old.dtype != new.dtype or old.shape[1:] != new.shape[1:]:
        raise ValueError(f"{name} is {old.dtype} {list(old.shape)}; expected {new.dtype} {[len(old), *new.shape[1:]]}")
    result = torch.cat((old, old.new_zeros((int((rows >= len(old)).sum()), *old.shape[1:]))))
    result[torch.from_numpy(rows)] = new
    return result
