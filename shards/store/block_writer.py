"""Tar shards on disk: blocks of arrays in, the manifest's index entries out.

webdataset's ``TarWriter`` writes to files that are opened here, bytes that are encoded here: nothing is pickled. Times
and owners are left out, so the same arrays always give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from webdataset import TarWriter

from fmrl_dist.data.store.manifest import Block, Shard, block_sha256


@dataclass(frozen=True)
class _PendingBlock:
    """A block whose hash is not known yet."""

    offset: int
    num_bytes: int
    count: int
    events: int


class BlockWriter:
    """Writes the blocks of one split, ``blocks_per_shard`` to a tar.

    A context manager: ``blocks`` and ``shards`` are complete once it is closed.
    """

    def __init__(self, folder: Path, split: str, blocks_per_shard: int) -> None:
        self.blocks: list[Block] = []
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._blocks_per_shard = blocks_per_shard
        self._num_blocks = 0
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._pending: list[_PendingBlock] = []  # of the open shard

    def write(self, arrays: dict[str, np.ndarray], count: int, events: int) -> None:
        """Append one block: ``arrays`` by field name, which hold ``count`` items or users and ``events`` events."""
        if self._tar is None:
            self._file = (self._folder / self._shard_name()).open("wb")
            self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="")
        start = self._tar.tarstream.offset
        members = {f"{field}.npy": _npy_bytes(array) for field, array in arrays.items()}
        self._tar.write({"__key__": f"{self._num_blocks:06d}", **members})
        self._pending.append(_PendingBlock(start, self._tar.tarstream.offset - start, count, events))
        self._num_blocks += 1
        if len(self._pending) == self._blocks_per_shard:
            self._finish_shard()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish_shard()

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self.shards):06d}.tar"

    def _finish_shard(self) -> None:
        """Close the open tar and hash it from disk, block by block and whole."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        name = self._shard_name()
        whole = hashlib.sha256()
        with (self._folder / name).open("rb") as file:
            for pending in self._pending:
                data = file.read(pending.num_bytes)
                whole.update(data)
                self.blocks.append(Block(shard=name, sha256=block_sha256(data), **asdict(pending)))
            whole.update(file.read())
            size = file.tell()
        self.shards.append(
            Shard(
                name=name,
                num_bytes=size,
                sha256=whole.hexdigest(),
                samples=len(self._pending),
                count=sum(pending.count for pending in self._pending),
                events=sum(pending.events for pending in self._pending),
            )
        )
        self._tar = self._file = None
        self._pending = []


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()
