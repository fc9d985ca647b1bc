"""A bounded folder of checked byte ranges, shared by all processes of a machine.

A range is kept under its sha256, which is checked at every read. So the cache needs no record of where a range came
from, copies of a store share it, and a damaged file only means one fetch more. Ranges are written aside and renamed: a
reader never sees half of one. The folder's total is kept beside the ranges and changed under a lock. When a new range
would exceed the limit, the least recently read ranges go first.

A cache smaller than what an epoch reads is of little use: the epoch's first ranges are evicted before the next epoch
reads them. Cost: one hash per read; one lock and two small writes per new range; a listing of the folder when it is
full.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.locks import lock_file
from fmrl_dist.data.store.files import checked_range

SHA256 = re.compile(r"[0-9a-f]{64}")
LOW_WATER = 0.9  # share of the limit that eviction goes down to, so that the folder is rarely listed
LOCK_S = 5.0  # after that the range is not kept: the process that holds the lock may have been stopped
STALE_S = 3600.0  # a file aside that is older was left by a process that was killed


class RangeCache:
    """Byte ranges by sha256.

    Args:
        folder: created if it is missing, for this user only.
        limit_bytes: for all ranges together; files aside, one per writing process, are not counted.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._total_file = folder / "total-bytes"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._total_file.open("a").close()
        except OSError as error:
            raise UserError(
                f"store.cache_dir {folder} cannot be written ({error.strerror}); choose another, "
                "or turn the cache off with --store.cache_gb 0"
            ) from None

    def get(self, sha256: str, num_bytes: int) -> bytes | None:
        """The range, or None if the cache does not hold it whole."""
        path = self._path(sha256)
        try:
            data = checked_range(path.read_bytes(), num_bytes, sha256)
            os.utime(path)  # eviction sorts by the time of the last read
        except UserError:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        except OSError:  # absent, evicted meanwhile, or on a failing disk: the range can be fetched again
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a range. If that fails, warn: the run continues, but fetches the range each time."""
        if len(data) > self._limit_bytes:
            return
        aside = self._folder / f"aside-{uuid.uuid4().hex}"
        try:
            aside.write_bytes(data)
            with self._locked_total() as total:
                if not self._path(sha256).exists():  # another process may have been faster
                    self._make_room(total, len(data))
                    aside.replace(self._path(sha256))
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(
                f"the cache {self._folder} does not keep blocks ({reason}); they are fetched each time", stacklevel=2
            )
        finally:
            aside.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), "the manifest is checked for this: the hash becomes a file name"
        return self._folder / sha256

    @contextlib.contextmanager
    def _locked_total(self) -> Iterator[int]:
        """Descriptor of the file that holds the total, locked for all other processes and threads."""
        descriptor = os.open(self._total_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock_file(descriptor, patience_s=LOCK_S, poll_s=0.01)
            yield descriptor
        finally:
            os.close(descriptor)  # which unlocks it

    def _make_room(self, descriptor: int, num_bytes: int) -> None:
        """Evict until ``num_bytes`` more fit, and count them already: after a kill the total is at worst too high."""
        text = os.pread(descriptor, 32, 0)
        total = int(text) if text.isdigit() else None
        if total is None or total + num_bytes > self._limit_bytes:
            total = self._evict(num_bytes)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(total + num_bytes).encode(), 0)

    def _evict(self, num_bytes: int) -> int:
        """List the folder; if it is too full, drop the least recently read ranges. Returns the bytes that remain."""
        ranges, total = [], 0
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if SHA256.fullmatch(entry.name):
                    ranges.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                elif entry.name.startswith("aside-") and time.time() - status.st_mtime > STALE_S:
                    os.unlink(entry.path)
        if total + num_bytes <= self._limit_bytes:
            return total
        for _, size, path in sorted(ranges):
            if total + num_bytes <= LOW_WATER * self._limit_bytes or total == 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total
