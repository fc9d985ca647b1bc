"""Checkpoints: one folder of safetensors and JSON, whole or not there; nothing is unpickled.

    checkpoints/step-00000120/model.safetensors       the model's state dict, float32
                              optimizer.safetensors   "<moment>/<parameter>": AdamW's moments and step counts
                              state.json              everything else that a resumed run needs (TrainState)
    checkpoints/latest -> step-00000120
    checkpoints/best   -> step-00000090

A folder is written aside, flushed and renamed; then the link is swapped. Dropout is seeded per step and rank
(``train.py``), so there is no generator state to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmrl_dist.errors import UserError

CHECKPOINT_VERSION = 1


@dataclass
class TrainState:
    """Where a run stands, besides its tensors."""

    step: int = 0  # optimiser steps done
    best_value: float = -1.0  # of the chosen metric
    best_step: int = 0
    evaluations_without_gain: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainState
    config: dict[str, Any]
    features: dict[str, int]  # feature → dim, as the model was built
    num_items: int
    manifest_sha256: str


def save_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> Path:
    """Write ``folder/step-…`` and point ``latest`` at it.

    Args:
        folder: the run's ``checkpoints``.
        state: where the run stands.
        model: the unwrapped model.
        optimizer: its AdamW.
        facts: ``config``, ``features``, ``num_items``, ``manifest_sha256`` and whatever else is worth recording.
    """
    path = folder / f"step-{state.step:08d}"
    aside = folder / f".{path.name}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, aside / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
    record = {"checkpoint_version": CHECKPOINT_VERSION, "state": asdict(state), **facts}
    (aside / "state.json").write_text(json.dumps(record, indent=1))
    for file in aside.iterdir():
        _flush(file)
    _flush(aside)
    if path.exists():  # the same step saved again, now with its evaluation
        shutil.rmtree(path)
    aside.rename(path)
    _flush(folder)
    point(folder, "latest", path)
    return path


def point(folder: Path, link: str, target: Path) -> None:
    """Make ``folder/link`` lead to ``target`` in one step, and remove checkpoints that no link leads to."""
    aside = folder / f".{link}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    aside.replace(folder / link)
    kept = {(folder / name).resolve() for name in ("latest", "best")}
    for path in folder.glob("step-*"):
        if path.resolve() not in kept:
            shutil.rmtree(path)


def load_checkpoint(path: Path, link: str = "best") -> Checkpoint:
    """Read a checkpoint folder, or the one that a run folder's ``link`` ("best" or "latest") leads to.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = find_checkpoint(path, link)
    try:
        record = json.loads((path / "state.json").read_text())
        model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); use another or start again") from None
    if record.get("checkpoint_version") != CHECKPOINT_VERSION:
        raise UserError(
            f"checkpoint {path} has version {record.get('checkpoint_version')!r}; expected {CHECKPOINT_VERSION}"
        )
    state = TrainState(**{f.name: record["state"][f.name] for f in fields(TrainState)})
    facts = {name: record[name] for name in ("config", "features", "num_items", "manifest_sha256")}
    return Checkpoint(path, model, optimizer, state, **facts)


def find_checkpoint(path: Path, link: str) -> Path:
    """The checkpoint that ``path`` (a checkpoint or a run) means."""
    for candidate in (path, path / "checkpoints" / link):
        if (candidate / "state.json").is_file():
            return candidate.resolve()
    raise UserError(f"{path} holds no checkpoint; expected a run folder or one of its checkpoints/…")


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved moments back; a parameter that had taken no step yet has none."""
    for name, parameter in model.named_parameters():
        saved = {key.split("/")[0]: t for key, t in tensors.items() if key.split("/")[1] == name}
        if saved:
            optimizer.state[parameter] = {
                moment: t if moment == "step" else t.to(parameter.device) for moment, t in saved.items()
            }


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
