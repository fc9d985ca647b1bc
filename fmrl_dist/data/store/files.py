"""Where the bytes of a store come from: the seam between the store's reader and a folder, or a URL.

:class:`LocalFiles` reads a folder; :class:`fmrl_dist.data.store.remote.RemoteFiles` fetches from a URL. Both open
only names of a store's own kinds of file, so that no manifest can make a reader open anything else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from fmrl_dist.base.errors import UserError, require

FILE_NAME = re.compile(r"manifest\.json|(vocab|users)\.parquet|[a-z]+-\d{6}\.tar", re.ASCII)
CHUNK_BYTES = 8 << 20

T = TypeVar("T")


class SourceError(UserError):
    """Where a store comes from does not answer: it may be as good as ever, and nothing of it is to be left out."""


class StoreFiles(Protocol):
    """The files of one store, by name. Every method raises FileNotFoundError where there is no such file, and
    :class:`UserError` where it cannot be read."""

    location: str  # folder or URL, as it may be shown and recorded: without credentials

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        """What ``parse`` makes of a whole file; it raises :class:`UserError` on one that is damaged."""

    def read_range(self, name: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        """A byte range, checked; otherwise a :class:`UserError` that says what the range is."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """The first ``num_bytes`` of a file, in pieces; unchecked."""

    def names(self) -> list[str] | None:
        """What lies in the folder, or None where that cannot be known."""


class LocalFiles:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        return parse(self._existing(name).read_bytes())

    def read_range(self, name: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        with self._existing(name).open("rb") as file:
            file.seek(offset)
            there = max(min(num_bytes, os.fstat(file.fileno()).st_size - offset), 0)
            return checked_range(file.read(there), num_bytes, sha256)

    def size(self, name: str) -> int:
        return self._existing(name).stat().st_size

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        with self._existing(name).open("rb") as file:
            while num_bytes > 0 and (piece := file.read(min(CHUNK_BYTES, num_bytes))):
                yield piece
                num_bytes -= len(piece)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def _existing(self, name: str) -> Path:
        path = self.folder / checked_name(name)
        if not path.is_file():
            raise FileNotFoundError(path)
        return path


def checked_name(name: str) -> str:
    """``name`` if it is a plain name of a store's file: no path, no URL, no ``pipe:``."""
    require(FILE_NAME.fullmatch(name) is not None, f"{name!r} is no file of a store; expected train-000000.tar or such")
    return name


def checked_range(data: bytes, num_bytes: int, sha256: str) -> bytes:
    """``data`` if it has this length and hash; otherwise a :class:`UserError` that says what it is."""
    require(len(data) == num_bytes, f"is truncated: {len(data)} of {num_bytes} bytes")
    found = hashlib.sha256(data).hexdigest()
    require(found == sha256, f"is damaged: its sha256 is not the manifest's {sha256[:12]}")
    return data
