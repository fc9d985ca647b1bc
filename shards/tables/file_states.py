"""Whether files stay what they are while they are read, more than once and over hours: seen by their size and times.

A file that is hashed, then replaced, then read would be recorded by a hash of what was not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from fmrl_dist.base.errors import UserError, require

MEND = "nothing was written; run this again when the files stay as they are"


class FileState(NamedTuple):
    """What changes when a file does."""

    num_bytes: int
    modified_ns: int
    inode: int  # changes when another file takes its place, and on some network file systems without a reason
    status_ns: int  # changes likewise, and with rights and links

    def is_of_same(self, other: FileState) -> bool:
        """A copy that keeps the time of its original has both another inode and another time of its status."""
        is_same = (self.num_bytes, self.modified_ns) == (other.num_bytes, other.modified_ns)
        return is_same and (self.inode == other.inode or self.status_ns == other.status_ns)

    def __str__(self) -> str:
        moment = datetime.fromtimestamp(self.modified_ns // 10**9, UTC).isoformat(sep=" ").removesuffix("+00:00")
        return f"{self.num_bytes:,} bytes of {moment} UTC"


def file_states(files: Iterable[Path]) -> dict[Path, FileState]:
    """The states of files, now.

    Raises:
        UserError: one is not there any more.
    """
    return {file: _state_of(file) for file in files}


def check_unchanged(before: Mapping[Path, FileState], after: Mapping[Path, FileState]) -> None:
    """Refuse what was read while files changed.

    Raises:
        UserError: a file was replaced or written to, is gone, or has come.
    """
    for file in before.keys() | after.keys():
        require(file in after, f"{file} was removed while it was needed; {MEND}")
        require(file in before, f"{file} has come since the table's other files were read; {MEND}")
        if not before[file].is_of_same(after[file]):
            raise UserError(f"{file} changed while it was read: it had {before[file]}, now {after[file]}; {MEND}")


def _state_of(file: Path) -> FileState:
    try:
        found = file.stat()
    except FileNotFoundError:
        raise UserError(
            f"{file} does not exist: it was never there, or was removed while it was needed; {MEND}"
        ) from None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)
