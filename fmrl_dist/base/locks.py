"""File locks, which the kernel (or a file server) releases however their process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fmrl_dist.base.errors import UserError


class LockHeldError(TimeoutError):
    """Another process holds a lock."""


class BeingWrittenError(UserError):
    """Another process is writing what this one was to write."""


def lock_file(
    descriptor: int,
    patience_s: float,
    poll_s: float = 0.05,
    across_machines: bool = False,
    on_wait: Callable[[float], None] | None = None,
) -> None:
    """Lock an open file for this process alone; closing it unlocks it.

    Args:
        descriptor: of a file open for writing.
        patience_s: longest wait for another process; ``math.inf`` waits forever.
        poll_s: seconds between attempts.
        across_machines: use a POSIX lock, which network file systems share between machines; forked processes do not
            hold it. Otherwise the lock is local to this machine, and held by all processes that inherit the descriptor.
        on_wait: called after each failed attempt with the seconds waited so far.

    Raises:
        LockHeldError: another process still holds the lock.
        OSError: the file system does not support locks.
    """
    lock = fcntl.lockf if across_machines else fcntl.flock
    began = time.monotonic()
    while True:
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - began
        except PermissionError:  # a POSIX lock may also say so that another process holds it
            if not across_machines:
                raise
            waited_s = time.monotonic() - began
        if waited_s >= patience_s:
            raise LockHeldError(f"locked by another process for {waited_s:.0f} s")
        if on_wait is not None:
            on_wait(waited_s)
        time.sleep(poll_s)


@contextmanager
def only_writer(target: Path) -> Iterator[bool]:
    """Keep every other process from writing ``target`` while the context lasts, by a lock file beside it.

    Yields:
        Whether the lock is held: false on a file system without locks.

    Raises:
        BeingWrittenError: another process is writing it; the message says which.
    """
    path = lock_path(target)
    missing = [folder for folder in path.parents if not folder.exists()]  # from the innermost
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, target) as is_locked:
            yield is_locked
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[bool]:
    """Hold the lock file ``path``, and remove it at the end."""
    while True:
        with path.open("a+") as file:
            try:
                lock_file(file.fileno(), patience_s=0, across_machines=True)
                is_locked = True
            except LockHeldError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise BeingWrittenError(f"{holder} is writing {target}; wait until it ends, then try again") from None
            except OSError:
                is_locked = False
            if is_locked and not _is_file(path, file.fileno()):
                continue  # its holder removed it between our opening and our locking it
            try:
                if is_locked:
                    file.truncate(0)
                    print(f"process {os.getpid()} of {socket.gethostname()}", file=file, flush=True)
                yield is_locked
            finally:
                path.unlink(missing_ok=True)
            return


def lock_path(target: Path) -> Path:
    """The lock file of :func:`only_writer`; it exists while a process writes ``target``."""
    return target.with_name(f".{target.name}.lock")


def _is_file(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
