"""The folder of a sweep.

space.yaml, base.yaml   what is searched, as it was when the sweep started: editing the original files changes nothing
store.json              the store that all trials are trained on, by its manifest's hash
journal.log             the study (launch/sweeps/study.py)
trial-0003/             the run of a trial; its output is in trial-0003.log
worker-0.lock           held by the worker and by the training that it has started
worker-0.stopped        the signal that ended the worker
jobs/                   logs of the workers, the record of SLURM's jobs (submitted.json), and submitit's files
best.yaml               at the end: the config with the best values
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.json_text import read_object
from fmrl_dist.base.locks import LockHeldError, lock_file
from fmrl_dist.base.urls import hide_credentials
from fmrl_dist.base.yaml_text import read_yaml
from fmrl_dist.config.data_section import StoreConfig
from fmrl_dist.data.store.reader import Store
from launch.sweeps.space import SearchSpace, overrides, read_space
from launch.sweeps.study import JOURNAL, SweepStudy, Trial

SPACE, BASE, STORE, BEST, JOBS = "space.yaml", "base.yaml", "store.json", "best.yaml", "jobs"
LOCK_POLL_S = 0.5


def prepare_folder(folder: Path, space: SearchSpace) -> SearchSpace:
    """Create the folder of a new sweep, or find that of an interrupted one; returns the space recorded there.

    Raises:
        UserError: the folder holds another sweep; only the number of trials may change.
    """
    config = space.config()
    base = config.to_dict()
    recorded = {
        "base": str(folder / BASE),
        "study": space.study,
        "trials": space.trials,
        "sampler": {"seed": space.seed},
        "parameters": space.raw["parameters"],
    }
    if (folder / SPACE).exists():
        mend = f"restore it, or choose another --folder than {folder}"
        require((folder / BASE).is_file(), f"{folder / BASE} is missing; {mend}")
        known, known_base = (read_yaml(folder / name, "the sweep's") for name in (SPACE, BASE))
        require(isinstance(known, dict) and "trials" in known, f"{folder / SPACE} is not a sweep's space; {mend}")
        now = {"space": {**recorded, "trials": known["trials"]}, "base": base}
        if difference := _first_difference("", {"space": known, "base": known_base}, now):
            raise UserError(
                f"{folder} holds a sweep with a different {difference}; restore it, or choose another --folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BASE, yaml.safe_dump(base, sort_keys=False).encode())
    write_atomically(folder / SPACE, yaml.safe_dump(recorded, sort_keys=False).encode())
    return read_space(folder / SPACE)


def record_store(folder: Path, access: StoreConfig) -> None:
    """Record which store a new sweep trains on; for one that is resumed, :func:`check_store`."""
    if not (folder / STORE).exists():
        record = {"manifest_sha256": Store.open(access.path, access).manifest.sha256}
        write_atomically(folder / STORE, f"{json.dumps(record)}\n".encode())
    check_store(folder, access)


def check_store(folder: Path, access: StoreConfig) -> None:
    """Refuse another store than that of the first trials: figures on two stores do not compare.

    Raises:
        UserError: it was built anew from something else, is missing, or is not recorded.
    """
    mend = f"choose another --folder than {folder}"
    require((folder / STORE).is_file(), f"{folder / STORE} is missing; restore it, or {mend}")
    known = read_object(folder / STORE, "record", mend).get("manifest_sha256")
    now = Store.open(access.path, access).manifest.sha256
    require(
        known == now,
        f"store {hide_credentials(access.path)} has the manifest {now[:12]}, but the sweep in {folder} began on one "
        f"with {str(known)[:12]}, and its trials would not compare; restore that store, or {mend}",
    )


def open_folder(folder: Path) -> tuple[SearchSpace, SweepStudy]:
    """The space and the study of a sweep that has started.

    Raises:
        UserError: the folder holds no sweep.
    """
    require((folder / SPACE).exists(), f"{folder} holds no sweep; start one with python -m launch.sweep SPACE")
    space = read_space(folder / SPACE)
    return space, SweepStudy(folder, space)


def has_started(folder: Path) -> bool:
    """Whether a worker has opened the study."""
    return (folder / JOURNAL).exists()


def run_of(folder: Path, trial: Trial) -> Path:
    """The run's folder of a trial."""
    return folder / f"trial-{trial.number:04d}"


def stopped_file(folder: Path, worker: int) -> Path:
    """What a worker writes when a signal has ended it."""
    return folder / f"worker-{worker}.stopped"


def training_arguments(folder: Path, arguments: Mapping[str, str], run: Path) -> list[str]:
    """What follows ``fmrl_dist.train`` to train with these parameters, by key, into the folder ``run``."""
    return ["--config", str(folder / BASE), *overrides(arguments), "--run.dir", str(run)]


@contextmanager
def worker_lock(folder: Path, worker: int, patience_s: float) -> Iterator[int]:
    """Hold a worker's lock: otherwise two processes could train its trial at the same time.

    A process that inherits the descriptor holds the lock too; one that dies releases it.

    Raises:
        UserError: another process still held it after ``patience_s``.
    """
    descriptor = os.open(folder / f"worker-{worker}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_file(descriptor, patience_s, poll_s=LOCK_POLL_S)
        except LockHeldError:
            raise UserError(
                f"worker {worker} of {folder}, or a training that it started, is running; "
                "wait for it (--status), or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def refused_when_gone(folder: Path) -> Iterator[None]:
    """Say that a sweep's folder is gone, where that is why something in it cannot be read or written.

    Raises:
        UserError: it was deleted or moved meanwhile.
    """
    try:
        yield
    except (OSError, UserError):
        require(
            folder.is_dir(),
            f"the sweep's folder {folder} does not exist, or was deleted or moved meanwhile",
        )
        raise


def _first_difference(key: str, before: Any, now: Any) -> str:
    """The first key in which two nested mappings differ, and its values; empty if they are equal."""
    if before == now:
        return ""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{key}: {before!r}, now {now!r}"
    keys = [*before, *(name for name in now if name not in before)]
    name = next(name for name in keys if before.get(name) != now.get(name) or (name in before) != (name in now))
    return _first_difference(f"{key}.{name}".lstrip("."), before.get(name), now.get(name))
