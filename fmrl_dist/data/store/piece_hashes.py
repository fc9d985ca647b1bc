"""Hashes of the pieces of large files that are written once and then mapped, so that damage to them can be noticed.

Nothing can hash a table of hundreds of gigabytes at every start. So the files are hashed in pieces when they are
complete. A start compares small files whole, and of large ones the first piece, the last, and some between. Which ones
follows from the file's length and time, so that all processes of a node choose the same. ``shards.verify`` compares
all.

Cost: one more read of the files when they are written; at a start, at most 32 MiB of each.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from pathlib import Path

PIECE_BYTES = 1 << 20
SAMPLED_PIECES = 32  # of each file; a file of no more pieces is compared whole
DIGEST_BYTES = 32  # of a sha256 hash


def write_hashes(path: Path, files: Sequence[Path]) -> None:
    """Write the hashes of the pieces of ``files``, in their order, and of the hashes themselves."""
    digests = b"".join(_hash(file, piece) for file in files for piece in range(_num_pieces(file)))
    with path.open("wb") as file:
        file.write(digests + hashlib.sha256(digests).digest())


def find_damage(path: Path, files: Sequence[Path], whole: bool = False) -> str | None:
    """What is wrong with ``files``, whose hashes are at ``path``; None if they are as they were written.

    Args:
        path: what :func:`write_hashes` wrote.
        files: in the same order.
        whole: compare all pieces, not a sample of them.

    Raises:
        OSError: a file is there but cannot be read.
    """
    for file in (path, *files):
        if not file.exists():
            return f"{file.name} is missing"
    content = path.read_bytes()
    digests, own = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(digests).digest() != own:
        return f"{path.name} is damaged"
    counts = [_num_pieces(file) for file in files]
    if sum(counts) * DIGEST_BYTES != len(digests):
        return f"{' and '.join(file.name for file in files)} are not as long as they were"
    first = 0
    for file, count in zip(files, counts, strict=True):
        for piece in range(count) if whole else _sample(file, count):
            begin = (first + piece) * DIGEST_BYTES
            if _hash(file, piece) != digests[begin : begin + DIGEST_BYTES]:
                return f"{file.name} holds other bytes than were written, after byte {piece * PIECE_BYTES}"
        first += count
    return None


def _num_pieces(file: Path) -> int:
    return -(-file.stat().st_size // PIECE_BYTES)


def _hash(file: Path, piece: int) -> bytes:
    with file.open("rb", buffering=0) as opened:
        return hashlib.sha256(os.pread(opened.fileno(), PIECE_BYTES, piece * PIECE_BYTES)).digest()


def _sample(file: Path, count: int) -> list[int]:
    if count <= SAMPLED_PIECES:
        return list(range(count))
    status = file.stat()
    between = random.Random(f"{status.st_size} {status.st_mtime_ns}").sample(range(1, count - 1), SAMPLED_PIECES - 2)
    return sorted([0, *between, count - 1])
