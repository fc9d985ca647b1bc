"""Checkpoints: one folder of safetensors and JSON, either complete or absent; nothing is unpickled.

    checkpoints/step-00000120/model.safetensors       the model's state dict, float32
                              optimizer.safetensors   "<moment>/<parameter>": AdamW's moments and step counts
                              state.json              everything else that a resumed run needs (TrainState), and the
                                                      sha256 of the tensors and of the record itself
    checkpoints/latest -> step-00000120
    checkpoints/best   -> step-00000090

A folder is written under a temporary name, flushed, renamed and never overwritten; then the links are swapped. So a run
killed at any instant has a complete ``latest``; if a disk damages it, the previous one still exists. Dropout is seeded
per step and rank (``training/steps/learning.py``) and the order of users is arithmetic: no generator or
loader state is kept.

The links are a convenience. A run that was copied without them (to a bucket, by zip) or with folders in their place
(``cp -rL``) is the same run: without a link, the folders' records say which checkpoint is the latest and the best.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import file_sha256, flush, json_sha256
from fmrl_dist.data.feature_identity import MadeBy

CHECKPOINT_VERSION = 3
RECORD_FILE = "state.json"
STEP_NAME = re.compile(r"step-\d{8,}(-\d+)?", re.ASCII)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # how file systems say that they have none
TENSOR_FILES = ("model", "optimizer")
LINK_TRIES, LINK_RETRY_S = 50, 0.2  # a network file system may show an old link for a while


@dataclass
class TrainState:
    """A run's progress, apart from its tensors."""

    step: int = 0  # optimiser steps done
    best_value: float = -1.0  # of the chosen metric
    best_step: int = 0
    evaluations_without_gain: int = 0
    validation_is_due: bool = False  # for this step: the run was stopped before it
    skipped_blocks: list[int] = field(default_factory=list)  # damaged train blocks, left out on all ranks


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # empty if it was not read
    state: TrainState
    config: dict[str, Any]
    features: dict[str, int]  # feature → dim, as the model was built
    num_items: int
    manifest_sha256: str
    feature_encoders: dict[str, MadeBy]  # what made each feature of the store; empty in older checkpoints
    sha256: str  # of its record, which contains the hashes of its tensors
    # hashes of the vocabulary of an id table's items, by "rows" and "file"; empty in older checkpoints
    vocabulary: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    facts: dict[str, Any],
    keep: int = 1,
) -> Path:
    """Write ``folder/step-…`` and point ``latest`` at it, and ``best`` too if its evaluation is the best so far.

    Args:
        folder: the run's ``checkpoints``; created in the run's folder, which must exist.
        state: the run's progress.
        model: the unwrapped model's state dict, on the CPU.
        optimizer: the complete AdamW state, named as by :func:`optimizer_tensors`.
        facts: ``config``, ``features``, ``num_items``, ``manifest_sha256`` and anything else worth recording.
        keep: number of newest checkpoints to keep, besides the best.

    Raises:
        OSError: it cannot be written; earlier checkpoints are unchanged.
    """
    _prune(folder, keep)
    path = _unused_path(folder, state.step)
    aside = folder / f".{path.name}"
    folder.mkdir(exist_ok=True)  # not its parents: a run's folder that is gone stays so
    aside.mkdir()
    try:
        for name, tensors in zip(TENSOR_FILES, (model, optimizer), strict=True):
            _save_tensors(tensors, aside / f"{name}.safetensors")
        hashes = {name: file_sha256(aside / f"{name}.safetensors") for name in TENSOR_FILES}
        record = {"checkpoint_version": CHECKPOINT_VERSION, "state": asdict(state), "sha256_of": hashes, **facts}
        record = json.loads(json.dumps(record))
        (aside / RECORD_FILE).write_text(json.dumps(record | {"sha256": json_sha256(record)}, indent=1))
        for file in (*aside.iterdir(), aside):
            flush(file)
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(folder)
    if state.best_step == state.step:  # first: a run killed in between repeats this step and finds it best again
        point(folder, "best", path, keep)
    point(folder, "latest", path, keep)
    return path


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # raised for a full disk
        raise OSError(None, " ".join(str(error).split())) from None


def point(folder: Path, link: str, target: Path, keep: int = 1) -> None:
    """Point ``folder/link`` at ``target`` atomically, and remove checkpoints that need not be kept."""
    aside = folder / f".{link}"
    aside.unlink(missing_ok=True)
    _put_copy_in_its_place(folder, folder / link)
    try:
        aside.symlink_to(target.name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        (folder / link).unlink(missing_ok=True)  # the file system has no links: the records say what they would
    else:
        aside.replace(folder / link)
    flush(folder)
    _prune(folder, keep)


def restore_links(folder: Path, keep: int) -> None:
    """Give a copied run its links back, where it came without them or with folders in their place."""
    for link in ("best", "latest"):
        target = linked_checkpoint(folder, link)
        if target is not None and not (folder / link).is_symlink():
            point(folder, link, _put_copy_in_its_place(folder, folder / link) or target, keep)


def _put_copy_in_its_place(folder: Path, link: Path) -> Path | None:
    """Where a copied run has a folder instead of a link: drop it if its original is here, else rename it.

    Returns:
        The original, or the new name; None where there is no such folder.

    Raises:
        UserError: the folder is not an intact checkpoint.
    """
    if link.is_symlink() or not link.is_dir():
        return None
    record = _record(link)
    if record is None:
        raise UserError(f"{link} is a folder but not an intact checkpoint; expected a link: move it away, then resume")
    for original in _named_by_step(folder):
        known = _record(original)
        if known is not None and known["sha256"] == record["sha256"]:
            shutil.rmtree(link)
            return original
    return link.rename(_unused_path(folder, record["state"]["step"]))


def _prune(folder: Path, keep: int) -> None:
    """Remove half-written folders of killed processes, and old checkpoints that are neither latest nor best."""
    kept = {linked_checkpoint(folder, name) for name in ("latest", "best")}
    whole = newest_first(folder)
    kept |= {path.resolve() for path in whole[:keep]}
    for path in (*whole, *folder.glob(".step-*")):
        if path.resolve() not in kept:
            shutil.rmtree(path)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, starting with the target of ``latest``, if there is that link.

    In a copy, they may be folders named as the links: such folders are among them.
    """
    latest = (folder / "latest").resolve()
    named = [(_numbers(path), path) for path in _named_by_step(folder)]
    for copy in (folder / "latest", folder / "best"):
        if copy.is_dir() and not copy.is_symlink():
            record = _record(copy)
            named.append(([-1 if record is None else record["state"]["step"]], copy))
    paths = [path for _, path in sorted(named, reverse=True)]
    return sorted(paths, key=lambda path: path.resolve() != latest)


def _named_by_step(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name)]


def _numbers(path: Path) -> list[int]:
    """Step of a checkpoint's name, and which save of that step it is."""
    return [int(number) for number in path.name.split("-")[1:]]


def linked_checkpoint(folder: Path, link: str) -> Path | None:
    """The checkpoint that a run's ``link`` points to, there or not; without the link, what the records say.

    Args:
        folder: the run's ``checkpoints``.
        link: "latest" or "best".
    """
    linked = folder / link
    if linked.is_symlink() or (linked / RECORD_FILE).is_file():
        return linked.resolve()
    records = _records(folder)
    if not records:
        return None
    latest, newest = records[0]
    if link == "latest":
        return latest.resolve()
    best_step = newest["state"]["best_step"]
    return next((path.resolve() for path, record in records if record["state"]["step"] == best_step), None)


def latest_sha256(folder: Path) -> str:
    """Hash of the record of a run's latest checkpoint; "" if there is none, or it is damaged."""
    latest = linked_checkpoint(folder, "latest")
    record = None if latest is None else _record(latest)
    return "" if record is None else str(record["sha256"])


def _records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints of a run with their records, newest first, but for those whose record cannot be read."""
    pairs = [(path, _record(path)) for path in newest_first(folder)]
    return [(path, record) for path, record in pairs if record is not None]


def _record(path: Path) -> dict[str, Any] | None:
    """A checkpoint's record, None if it is damaged."""
    try:
        record: dict[str, Any] = json.loads((path / RECORD_FILE).read_text())
        whole = {name: value for name, value in record.items() if name != "sha256"}
        steps = {type(record["state"][name]) for name in ("step", "best_step")}
        intact = record["sha256"] == json_sha256(whole) and steps == {int}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if intact else None


def _unused_path(folder: Path, step: int) -> Path:
    """Where to save ``step``: an earlier save of the same step is never overwritten; the new one gets a suffix."""
    name = f"step-{step:08d}"
    return next(path for n in count(1) if not (path := folder / (f"{name}-{n}" if n > 1 else name)).exists())


def load_checkpoint(path: Path, link: str = "best", with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint folder, or the target of a run folder's ``link`` ("best" or "latest").

    A link may point to a folder that the training process has just removed; then it is followed again.

    Args:
        path: a checkpoint or a run.
        link: which link of the run to follow.
        with_optimizer: read the moments too; without them ``optimizer`` is empty and a third of the bytes are read.

    Raises:
        UserError: there is none, it is damaged, or it has another version.
    """
    for tries_left in reversed(range(LINK_TRIES)):
        found = find_checkpoint(path, link)
        try:
            return _read_checkpoint(found, with_optimizer)
        except FileNotFoundError as error:
            if found.exists() or not tries_left:
                raise UserError(
                    f"checkpoint {found} is damaged ({error.filename} is missing); use another, or start over"
                ) from None
        time.sleep(LINK_RETRY_S)
    raise AssertionError("the last attempt returns or raises")


def _read_checkpoint(path: Path, with_optimizer: bool) -> Checkpoint:
    try:
        record = json.loads((path / RECORD_FILE).read_text())
        version = record["checkpoint_version"]
        if version != CHECKPOINT_VERSION:
            raise UserError(f"checkpoint {path} has version {version!r}; expected {CHECKPOINT_VERSION}")
        sha256 = record.pop("sha256")
        if sha256 != json_sha256(record):
            raise ValueError("state.json was changed after it was written")
        hashes = record["sha256_of"]
        model = _load_tensors(path / "model.safetensors", hashes["model"])
        optimizer = _load_tensors(path / "optimizer.safetensors", hashes["optimizer"]) if with_optimizer else {}
        state = TrainState(**{f.name: record["state"][f.name] for f in fields(TrainState)})
        facts = {name: record[name] for name in ("config", "features", "num_items", "manifest_sha256")}
        facts["feature_encoders"] = record.get("feature_encoders", {})
        facts["vocabulary"] = record.get("vocabulary", {})
    except (UserError, FileNotFoundError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"checkpoint {path} is damaged ({problem}); use another, or start over") from None
    return Checkpoint(path, model, optimizer, state, sha256=sha256, **facts)


def load_newest_whole(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint of a run; None if the run has none at all (or died saving its first).

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    paths = newest_first(folder)
    problem = ""
    for path in paths:
        try:
            return load_checkpoint(path)
        except UserError as error:
            problem = str(error)
            say(f"{problem}; falling back to the previous one")
    require(not paths, f"{problem}; all {len(paths)} in {folder} are damaged: start over in another --run.dir")
    return None


def _load_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    data = path.read_bytes()  # read, not mapped: the folder may be removed while its tensors are in use
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"the sha256 of {path.name} is not the recorded one")
    return load(data)


def find_checkpoint(path: Path, link: str) -> Path:
    """The checkpoint that ``path`` (a checkpoint or a run) refers to; a link's target, whether or not it exists."""
    if (path / RECORD_FILE).is_file():
        return path.resolve()
    if found := linked_checkpoint(path / "checkpoints", link):
        return found
    raise UserError(f"{path} holds no checkpoint; expected a run folder or one of its checkpoints/…")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``<moment>/<parameter>`` of every parameter that has taken a step, on the CPU."""
    return {
        f"{moment}/{name}": tensor.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore saved moments; a parameter that had not taken a step has none."""
    for name, parameter in model.named_parameters():
        saved = {key.split("/")[0]: t for key, t in tensors.items() if key.split("/")[1] == name}
        if saved:
            optimizer.state[parameter] = {moment: t.to(parameter.device) for moment, t in saved.items()}
