"""A case's folder on a read-only or a full file system, seen only by the process that enters the context.

Root ignores permissions, so these are real mounts, in a mount namespace of the process.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

CLONE_NEWNS = 0x00020000  # linux/sched.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # linux/mount.h
PAGE_BYTES = 4096
CANNOT_MOUNT = "mounts need root and a kernel that permits them in a namespace of one's own"


@cache
def can_mount() -> bool:
    """Whether a process of this user may mount anything in a namespace of its own."""
    return (
        sys.platform == "linux" and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    )


def _call(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [source.encode(), os.fsencode(target), kind.encode()]
    _call(libc.mount(*words, flags, options.encode()), f"mount {target}")


def leave_mounts_of_others() -> None:
    """From here on, what this process mounts is seen by no other process."""
    _call(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS), "unshare")
    _mount("none", Path("/"), "", MS_REC | MS_PRIVATE)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """``folder`` cannot be written."""
    leave_mounts_of_others()
    _mount(str(folder), folder, "", MS_BIND)
    _mount("none", folder, "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    yield


@contextmanager
def almost_full(spare_pages: int, folder: Path) -> Iterator[None]:
    """``folder`` is on a file system with room for so many pages; at the end, its content is put into the real one."""
    leave_mounts_of_others()
    copy, real = folder.with_name(f"{folder.name}-copy"), folder.with_name(f"{folder.name}-real")
    folder.rename(copy)
    folder.mkdir()
    real.mkdir()
    _mount(str(folder), real, "", MS_BIND)
    _mount("tmpfs", folder, "tmpfs", 0, "size=1g")
    shutil.copytree(copy, folder, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(copy)
    status = os.statvfs(folder)
    used = (status.f_blocks - status.f_bfree) * status.f_bsize
    _mount("tmpfs", folder, "tmpfs", MS_REMOUNT, f"size={used + spare_pages * PAGE_BYTES}")
    try:
        yield
    finally:
        _mount("tmpfs", folder, "tmpfs", MS_REMOUNT, "size=1g")
        shutil.copytree(folder, real, symlinks=True, dirs_exist_ok=True)


@contextmanager
def nothing_else_writable(folder: Path) -> Iterator[None]:
    """Nothing on the disk can be written but what is in ``folder``."""
    leave_mounts_of_others()
    _mount(str(folder), folder, "", MS_BIND)
    _mount("/", Path("/"), "", MS_REMOUNT | MS_BIND | MS_RDONLY)
    yield
