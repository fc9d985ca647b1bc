"""Where the bytes of a store come from: the interface between the store's reader and a folder or a URL.

:class:`LocalFiles` reads a folder; :class:`fmrl_dist.data.store.remote.RemoteFiles` fetches from a URL. Both open only
file names that a store can have, so that no manifest can make a reader open anything else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from fmrl_dist.base.errors import UserError, require

FILE_NAME = re.compile(
    r"(manifest|build-report)\.json|(vocab|users)\.parquet|fit-[a-z][a-z0-9_]*\.safetensors|[a-z]+-\d{6}\.tar", re.ASCII
)
CHUNK_BYTES = 8 << 20

T = TypeVar("T")


class SourceError(UserError):
    """The source of a store does not answer. The store itself may be intact, so none of its blocks may be skipped."""


class FinalError(UserError):
    """A problem that a retry cannot solve."""


class StoreFiles(Protocol):
    """The files of one store, by name.

    Every method raises FileNotFoundError if there is no such file, and :class:`UserError` if it cannot be read.
    """

    location: str  # folder or URL without credentials, to be shown and recorded

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        """A whole file, parsed; ``parse`` raises :class:`UserError` if it is damaged."""

    def read_range(self, name: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        """A byte range, checked; a :class:`UserError` says what is wrong with it."""

    def size(self, name: str) -> int:
        """Size of a file in bytes."""

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """The first ``num_bytes`` of a file, in pieces, unchecked."""

    def names(self) -> list[str] | None:
        """All names in the folder; None for a URL, which cannot be listed."""


class LocalFiles:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def read(self, name: str, parse: Callable[[bytes], T]) -> T:
        with _said(f"{name} "):
            data = self._existing(name).read_bytes()
        return parse(data)

    def read_range(self, name: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        with _said(), self._existing(name).open("rb") as file:
            file.seek(offset)
            there = max(min(num_bytes, os.fstat(file.fileno()).st_size - offset), 0)
            data = file.read(there)
        return checked_range(data, num_bytes, sha256)

    def size(self, name: str) -> int:
        return self._existing(name).stat().st_size

    def stream(self, name: str, num_bytes: int) -> Iterator[bytes]:
        with _said(f"{name} "), self._existing(name).open("rb") as file:
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


@contextmanager
def _said(subject: str = "") -> Iterator[None]:
    """A file that the system cannot read, though it is there, is said to be so."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(
            f"{subject}cannot be read ({error.strerror}); check its disk, and this user's rights to the file"
        ) from None


def checked_name(name: str) -> str:
    """``name`` if it is a plain name that a store's file can have: no path, no URL, no ``pipe:``."""
    require(
        FILE_NAME.fullmatch(name) is not None,
        f"{name!r} is not a file of a store; expected a name such as train-000000.tar",
    )
    return name


def checked_range(data: bytes, num_bytes: int, sha256: str) -> bytes:
    """``data`` if it has this length and hash; otherwise a :class:`UserError` says what is wrong."""
    require(len(data) == num_bytes, f"is truncated: {len(data)} of {num_bytes} bytes")
    found = hashlib.sha256(data).hexdigest()
    require(found == sha256, f"is damaged: its sha256 is not the manifest's {sha256[:12]}")
    return data
