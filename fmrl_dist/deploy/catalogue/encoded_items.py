"""New items with their features, as ``shards.encode`` writes them, held against what the export records.

The encoders are in the package ``shards``, which this one does not import: they run in a process of their own, as they
do where stores are built, and may run on another machine. n items, F features' total dim, M features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fmrl_dist.base.errors import EXIT_USER_ERROR, UserError, require
from fmrl_dist.base.parquet import bounded_table
from fmrl_dist.data.feature_identity import encoder_differences
from fmrl_dist.data.store.built_from import list_differences
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.data.store.tables import table_batches

FEATURES_FILE, ENCODERS_FILE = "features.safetensors", "encoders.json"
MASK = ".mask"


@dataclass(frozen=True)
class EncodedItems:
    """Some items, in the order of their table."""

    ids: pa.Array  # [n], int64 or large_string, each once
    titles: pa.Array | None  # large_string [n]
    values: Tensor  # float16 [n, F], raw features in the order of the model's columns; zero where absent
    present: Tensor  # bool [n, M]


def run_encoders(words: Sequence[object], temporary: Path) -> None:
    """``python -m shards.encode`` with these words; what it prints is shown.

    Args:
        words: its arguments.
        temporary: folder for its temporary files, which a signal may not let it remove.

    Raises:
        UserError: it complained; with its words.
        RuntimeError: it crashed.
    """
    command = [sys.executable, "-m", "shards.encode", *map(str, words)]
    environment = os.environ | {"TMPDIR": str(temporary)}
    sys.stdout.flush()
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    lines = ended.stderr.strip().splitlines() or [""]
    if ended.returncode == EXIT_USER_ERROR and lines[-1].startswith("error: "):
        raise UserError(lines[-1].removeprefix("error: "))
    sys.stderr.write(ended.stderr)
    if ended.returncode:
        raise RuntimeError(f"shards.encode ended with code {ended.returncode}; see the lines above")


def read_encoded(folder: Path, dims: Mapping[str, int], recorded: Mapping[str, Any]) -> EncodedItems:
    """What ``shards.encode`` wrote.

    Args:
        folder: that it wrote.
        dims: name → dim of each feature that the model reads, in the order of its columns.
        recorded: what made each of these features of the items that are there.

    Raises:
        UserError: it is damaged, of other features, or other encoders made them.
    """
    mend = "encode the items again with shards.encode"
    try:
        encoders = json.loads((folder / ENCODERS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / FEATURES_FILE)
        table = bounded_table(table_batches((folder / VOCAB_FILE).read_bytes(), VOCAB_FILE), VOCAB_FILE)
        ids = table.column("external_id").combine_chunks()
        titles = table.column("title").combine_chunks() if "title" in table.column_names else None
        expected = {*dims, *(name + MASK for name in dims)}
        if set(tensors) != expected or set(encoders) != set(dims):
            raise ValueError(f"it has {', '.join(sorted(tensors)) or 'nothing'}")
        for name, dim in dims.items():
            rows, mask = tensors[name], tensors[name + MASK]
            is_sound = rows.shape == (len(ids), dim) and rows.dtype == torch.float16
            if not is_sound or mask.shape != (len(ids),) or mask.dtype != torch.bool or not rows.isfinite().all():
                raise ValueError(f"{name} is {rows.dtype} {list(rows.shape)}; expected float16 {[len(ids), dim]}")
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, pa.ArrowException, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{folder} does not hold new items of this model ({problem}); {mend}") from None
    for name in dims:
        differences = encoder_differences(recorded[name], encoders[name])
        require(
            not differences,
            f"feature {name!r} of the new items is not the one that the model was trained on: "
            f"{list_differences(differences)}; encode them with the recorded encoder and settings",
        )
    values = torch.cat([tensors[name] for name in dims], 1)
    return EncodedItems(ids, titles, values, torch.stack([tensors[name + MASK] for name in dims], 1))
