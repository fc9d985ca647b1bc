"""Checkpoints: one folder of safetensors and JSON, whole or not there; nothing is unpickled.

    checkpoints/step-00000120/model.safetensors       the model's state dict, float32
                              optimizer.safetensors   "<moment>/<parameter>": AdamW's moments and step counts
                              state.json              everything else that a resumed run needs (TrainState)
    checkpoints/latest -> step-00000120
    checkpoints/best   -> step-00000090

A folder is written aside, flushed and renamed, and never written over; then the links are swapped. So a run killed at
any instant has a whole ``latest``. Dropout is seeded per step and rank (``train.py``), so there is no generator state
to keep.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fmrl_dist.errors import UserError
from fmrl_dist.files import flush

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
    folder: Path, state: TrainState, model: nn.Module, optimizer: dict[str, Tensor], facts: dict[str, Any]
) -> Path:
    """Write ``folder/step-…`` and point ``latest`` at it, and ``best`` too if its evaluation was the best so far.

    Args:
        folder: the run's ``checkpoints``.
        state: where the run stands.
        model: the unwrapped model.
        optimizer: the whole of its AdamW, as :func:`optimizer_tensors` names it.
        facts: ``config``, ``features``, ``num_items``, ``manifest_sha256`` and whatever else is worth recording.
    """
    _prune(folder)
    path = _unused_path(folder, state.step)
    aside = folder / f".{path.name}"
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, aside / "model.safetensors")
    save_file(optimizer, aside / "optimizer.safetensors")
    record = {"checkpoint_version": CHECKPOINT_VERSION, "state": asdict(state), **facts}
    (aside / "state.json").write_text(json.dumps(record, indent=1))
    for file in aside.iterdir():
        flush(file)
    flush(aside)
    aside.rename(path)
    flush(folder)
    if state.best_step == state.step:  # first: a run killed in between does this step again, and finds it best again
        point(folder, "best", path)
    point(folder, "latest", path)
    return path


def point(folder: Path, link: str, target: Path) -> None:
    """Make ``folder/link`` lead to ``target`` in one step, and remove checkpoints that no link leads to."""
    aside = folder / f".{link}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    aside.replace(folder / link)
    flush(folder)
    _prune(folder)


def _prune(folder: Path) -> None:
    """Remove checkpoints that no link leads to, and what a killed process left half-written."""
    kept = {(folder / name).resolve() for name in ("latest", "best")}
    for path in (*folder.glob("step-*"), *folder.glob(".step-*")):
        if path.resolve() not in kept:
            shutil.rmtree(path)


def _unused_path(folder: Path, step: int) -> Path:
    """Where to save ``step``: while a link leads to an earlier save of the same step, the next one gets a suffix."""
    names = (f"step-{step:08d}{suffix}" for suffix in ("", "-2", "-3"))  # two links: one of these is free
    return next(folder / name for name in names if not (folder / name).exists())


def load_checkpoint(path: Path, link: str = "best") -> Checkpoint:
    """Read a checkpoint folder, or the one that a run folder's ``link`` ("best" or "latest") leads to.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = find_checkpoint(path, link)
    try:
        record = json.loads((path / "state.json").read_text())
        version = record["checkpoint_version"]
        if version != CHECKPOINT_VERSION:
            raise UserError(f"checkpoint {path} has version {version!r}; expected {CHECKPOINT_VERSION}")
        # Read, not mapped: this folder may be removed while its tensors are in use.
        model, optimizer = (load((path / f"{name}.safetensors").read_bytes()) for name in ("model", "optimizer"))
        state = TrainState(**{f.name: record["state"][f.name] for f in fields(TrainState)})
        facts = {name: record[name] for name in ("config", "features", "num_items", "manifest_sha256")}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"checkpoint {path} is damaged ({problem}); use another or start again") from None
    return Checkpoint(path, model, optimizer, state, **facts)


def find_checkpoint(path: Path, link: str) -> Path:
    """The checkpoint that ``path`` (a checkpoint or a run) means."""
    for candidate in (path, path / "checkpoints" / link):
        if (candidate / "state.json").is_file():
            return candidate.resolve()
    raise UserError(f"{path} holds no checkpoint; expected a run folder or one of its checkpoints/…")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``<moment>/<parameter>`` of every parameter that has taken a step, on the CPU."""
    return {
        f"{moment}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put saved moments back; a parameter that had taken no step yet has none."""
    for name, parameter in model.named_parameters():
        saved = {key.split("/")[0]: t for key, t in tensors.items() if key.split("/")[1] == name}
        if saved:
            optimizer.state[parameter] = {
                moment: t if moment == "step" else t.to(parameter.device) for moment, t in saved.items()
            }
