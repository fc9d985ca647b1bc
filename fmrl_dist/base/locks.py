"""File locks, which the kernel (or a file server) releases however their process ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable


class LockHeldError(TimeoutError):
    """Another process holds a lock."""


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
