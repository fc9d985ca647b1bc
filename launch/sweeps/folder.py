"""The folder of a sweep.

space.yaml, base.yaml   what is searched, as it was when the sweep began: a file that is edited later changes nothing
journal.log             the study (launch/sweeps/study.py)
trial-0003/             the run of a trial; its output is beside it, in trial-0003.log
worker-0.lock           held by the worker and by what it trains
jobs/                   logs of the workers, SLURM's jobs (submitted.json), and what submitit needs
best.yaml               in the end: the config with the best values
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.locks import lock_file
from launch.sweeps.space import Space, overrides, read_space
from launch.sweeps.study import JOURNAL, Study, Trial

SPACE, BASE, BEST, JOBS = "space.yaml", "base.yaml", "best.yaml", "jobs"
LOCK_POLL_S = 0.5


def prepare_folder(folder: Path, space: Space) -> Space:
    """Make the folder of a new sweep, or find the one that is gone on with; returns the space as it is recorded there.

    Raises:
        UserError: the folder holds another sweep; only the number of trials may change.
    """
    config = space.config()
    base = config.to_dict()
    require(
        base["store"]["path"] == config.store.path,
        "store.path holds credentials, which a sweep does not record; put them into the environment (README)",
    )
    frozen = {
        **{"base": str(folder / BASE), "study": space.study, "trials": space.trials, "sampler": {"seed": space.seed}},
        "parameters": space.raw["parameters"],
    }
    if (folder / SPACE).exists():
        known, known_base = (yaml.safe_load((folder / name).read_text()) for name in (SPACE, BASE))
        now = {"space": {**frozen, "trials": known["trials"]}, "base": base}
        if changed := _first_difference("", {"space": known, "base": known_base}, now):
            raise UserError(f"{folder} holds a sweep with another {changed}; restore it, or choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BASE, yaml.safe_dump(base, sort_keys=False).encode())
    write_atomically(folder / SPACE, yaml.safe_dump(frozen, sort_keys=False).encode())
    return read_space(folder / SPACE)


def open_folder(folder: Path) -> tuple[Space, Study]:
    """The space and the study of a sweep that has begun.

    Raises:
        UserError: there is none.
    """
    require((folder / SPACE).exists(), f"{folder} holds no sweep; start one with python -m launch.sweep SPACE")
    space = read_space(folder / SPACE)
    return space, Study(folder, space)


def has_begun(folder: Path) -> bool:
    """Whether any worker has come to the study."""
    return (folder / JOURNAL).exists()


def run_of(folder: Path, trial: Trial) -> Path:
    """Where a trial is trained."""
    return folder / f"trial-{trial.number:04d}"


def stopped_file(folder: Path, worker: int) -> Path:
    """What a worker leaves when a signal has ended it."""
    return folder / f"worker-{worker}.stopped"


def training_words(folder: Path, words: Mapping[str, str], run: Path) -> list[str]:
    """What follows ``fmrl_dist.train`` to train with these values into the folder ``run``."""
    return ["--config", str(folder / BASE), *overrides(words), "--run.dir", str(run)]


@contextmanager
def worker_lock(folder: Path, worker: int, patience_s: float) -> Iterator[int]:
    """Hold the lock of a worker, or none of its trials could be taken up: it would be trained twice at a time.

    A process that inherits the descriptor holds it too, and one that dies frees it.

    Raises:
        UserError: another process still held it after ``patience_s``.
    """
    descriptor = os.open(folder / f"worker-{worker}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock_file(descriptor, patience_s, poll_s=LOCK_POLL_S)
        except TimeoutError:
            raise UserError(
                f"worker {worker} of {folder} is running, or what it trains is; wait for it (--status), or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _first_difference(where: str, before: Any, now: Any) -> str:
    """What differs first between two mappings, and how; empty where nothing does."""
    if before == now:
        return ""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{where}: {before!r}, now {now!r}"
    keys = [*before, *(key for key in now if key not in before)]
    key = next(key for key in keys if before.get(key) != now.get(key) or (key in before) != (key in now))
    return _first_difference(f"{where}.{key}".lstrip("."), before.get(key), now.get(key))
