"""One file with a model of every size: the model of size m is its first bytes.

The file has a section per size. A section holds what its size adds to the one before: of every weight matrix the rows
of chunk j, as far as its inputs reach, m_j columns; of every vector, and of every item's vector, the chunk's channels.
Nothing is stored twice, and the zeros of nested weights are not stored.

Numbers are those of an export of the same dtype (:mod:`fmrl_dist.model.stored_tensors`): matrices float32, float16, or
int8 with a float32 scale per row; all else float32. An item's scale is in the first section.

V items, D width, chunk j holds the channels m_{j-1} … m_j.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fmrl_dist.checkpoint.export.files import ITEMS_TENSOR
from fmrl_dist.checkpoint.export.parts import ExportedModel, stored_or_refused
from fmrl_dist.model.block import ResidualBlock
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.nested import chunks
from fmrl_dist.model.stored_tensors import SCALE

ALIGNMENT = 4  # bytes
PARTS = ("re", "im")  # of complex numbers


@dataclass(frozen=True)
class NestedFile:
    """The file's bytes, and what is where in it, as JSON can carry it."""

    data: bytes
    sections: list[dict[str, Any]]  # one per size


@dataclass
class _Section:
    """A section that is being filled."""

    data: bytearray = field(default_factory=bytearray)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        array = values.detach().contiguous().numpy()
        self.tensors[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "offset": len(self.data)}
        self.data += array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        self.data += bytes(-len(self.data) % ALIGNMENT)


def pack(exported: ExportedModel, dtype: str) -> NestedFile:
    """The file of a model and its item vectors.

    Raises:
        UserError: a number does not fit the dtype.
    """
    sections = {size: _Section() for size in exported.model.sizes}
    for size, name, values in _pieces(exported, dtype):
        sections[size].add(name, values)
    data, described = bytearray(), []
    for size, section in sections.items():
        described.append(
            {
                "size": size,
                "offset": len(data),
                "bytes": len(section.data),
                "sha256": hashlib.sha256(section.data).hexdigest(),
                "tensors": section.tensors,
            }
        )
        data += section.data
    return NestedFile(bytes(data), described)


def _pieces(exported: ExportedModel, dtype: str) -> Iterator[tuple[int, str, Tensor]]:
    """Size, name and numbers of each piece of a section: of a vector [w], of a matrix [w, m], of the items [V, w]."""
    model, spans = exported.model, chunks(exported.model.sizes)
    tensors = stored_or_refused(model.state_dict(), dtype)
    items = stored_or_refused({ITEMS_TENSOR: exported.items}, dtype)

    def vector(name: str, values: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        for low, high in spans:
            yield high, name, values[low:high]

    def matrix(name: str, source: str, *index: int) -> Iterator[tuple[int, str, Tensor]]:
        for low, high in spans:
            yield high, name, tensors[source][index][low:high, :high]
        if source + SCALE in tensors:
            yield from vector(name + SCALE, tensors[source + SCALE][index])

    if ITEMS_TENSOR + SCALE in items:
        yield model.sizes[0], f"items{SCALE}", items[ITEMS_TENSOR + SCALE]
    for low, high in spans:
        yield high, "items", items[ITEMS_TENSOR][:, low:high]
    yield from vector("start", tensors["encoder.bias"])
    for name in tensors:
        if "norm." in name:
            yield from vector(name, tensors[name])
    for number, block in enumerate(model.blocks):
        assert isinstance(block, ResidualBlock) and isinstance(block.mixer, LRU), "checked before"
        prefix = f"blocks.{number}"
        for part, decay in zip(PARTS, block.mixer.decay(), strict=True):
            yield from vector(f"{prefix}.decay.{part}", decay)
        yield from vector(f"{prefix}.gamma", torch.exp(block.mixer.gamma_log))
        for index, part in enumerate(PARTS):
            yield from matrix(f"{prefix}.b.{part}.weight", f"{prefix}.lru.B", index)
            yield from vector(f"{prefix}.b.{part}.bias", tensors[f"{prefix}.lru.b"][index])
            yield from matrix(f"{prefix}.c.{part}.weight", f"{prefix}.lru.C", index)
        yield from vector(f"{prefix}.c.re.bias", tensors[f"{prefix}.lru.c"])
        for name in ("gate", "w_1", "w_2"):
            yield from matrix(f"{prefix}.{name}.weight", f"{prefix}.ffn.{name}.weight")
            yield from vector(f"{prefix}.{name}.bias", tensors[f"{prefix}.ffn.{name}.bias"])
