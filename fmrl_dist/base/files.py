"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.locks import lock_path, only_writer

TEMPORARY = re.compile(r"\.[0-9a-f]{16}(\.old)?", re.ASCII)  # ends the name of a folder that is being filled
ABANDONED_S = 7 * 86_400.0  # without a change: whoever was filling a folder is dead; an encoder may run for days


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` by :func:`written_aside`."""
    with written_aside(path) as file:
        file.write(data)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write; at the end it is flushed, then renamed to ``path``; of concurrent writers, one wins.

    Each writer's temporary name is random: processes in different containers or machines can have the same id. If the
    block raises, the temporary file is removed and ``path`` is unchanged.

    Raises:
        UserError: the folder does not exist: it is never created, as it may have been removed meanwhile.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except FileNotFoundError:
        raise UserError(f"{path} cannot be written: its folder does not exist, or was deleted or moved") from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_folder(target: Path, is_kept: Callable[[str], bool] = lambda _: True) -> Iterator[Path]:
    """A temporary folder to fill, beside ``target``; at the end it is flushed and replaces ``target`` in one step.

    If the block raises, the temporary folder is removed and ``target`` is unchanged. What a killed process left behind
    is removed by the next one; an old ``target`` that it had moved aside is put back first. What others put into
    ``target`` while the block ran is kept there.

    Args:
        target: to write.
        is_kept: whether that is so of a name; else it goes with what it stood beside.

    Raises:
        UserError: another process is writing ``target``.
    """
    last_writer = ""  # who did not live to remove the lock file
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last_writer = lock_path(target).read_text()
    with only_writer(target) as is_locked:
        if is_locked:
            _clear_away(target, last_writer)
        else:
            print(f"{target} cannot be locked: nothing prevents a second process from writing it", flush=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        aside.mkdir(parents=True)
        replaced = set(os.listdir(target)) if target.exists() else set()
        try:
            yield aside
            for path in (*aside.iterdir(), aside):
                flush(path)
            if target.exists():
                _exchange(aside, target)
                for name in filter(is_kept, set(os.listdir(aside)) - replaced - set(os.listdir(target))):
                    (aside / name).rename(target / name)
            else:
                aside.rename(target)
            flush(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # what was replaced, or what is left of a failure


def _clear_away(target: Path, last_writer: str) -> None:
    """Put an old ``target`` back that a killed process had moved aside, and remove what killed processes left.

    Locks of some network file systems do not reach other machines, and then a process there may still be alive: what it
    may be filling stays for a week.

    Args:
        target: locked.
        last_writer: what its lock file said before, "" if its last writer had ended in good order.
    """
    is_here = last_writer.rstrip().endswith(f" of {socket.gethostname()}")
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        found = TEMPORARY.fullmatch(left.name.removeprefix(f".{target.name}"))
        if found is None or not left.is_dir():
            continue
        if found[1] and not target.exists():
            print(f"{target} had been moved aside by a process that was killed; it is put back", flush=True)
            left.rename(target)
        elif found[1] or is_here or time.time() - _last_change(left) > ABANDONED_S:
            shutil.rmtree(left)
        else:
            who = last_writer.strip() or "a process of another machine"
            print(f"{left} is left alone: {who} may still be filling it; else remove it", flush=True)


def _last_change(folder: Path) -> float:
    """Time of the last change of a folder or of a file in it, in seconds."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)


def final_name(name: str) -> str:
    """The name that a file of :func:`write_atomically` was to get, where a killed process left it; else ``name``."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}", name, re.ASCII)
    return found[1] if found else name


def _exchange(aside: Path, target: Path) -> None:
    """Swap two folders: in one step where kernel and file system can, else in two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is not None and renameat2(here, os.fsencode(aside), here, os.fsencode(target), exchange) == 0:
        return
    old = target.with_name(f"{aside.name}.old")
    target.rename(old)
    aside.rename(target)
    old.rename(aside)


def foreign_entries(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """Names in a folder that are not files of the kind that is to be replaced: they must not be removed with it."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() or not is_ours(path.name))


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def home_folder() -> Path | None:
    """The user's home; None where there is none: a container may give its user's id no name, and set no HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def json_sha256(value: Any) -> str:
    """Hash of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
