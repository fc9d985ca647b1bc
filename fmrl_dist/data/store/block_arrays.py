"""One tar sample as arrays: parsed without a copy from checked bytes, then held against what the manifest says of it.

A hash only says that bytes are those that somebody wrote. Here everything is refused that is no plain file, no plain
array, or not of the dtype, shape and range that its reader relies on. Nothing is unpickled, and a header that promises
more bytes than there are allocates nothing. Arrays are read-only views of the bytes.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fmrl_dist.base.errors import UserError, require

MEMBER_NAME = re.compile(r"(\d{6,})\.([a-z][a-z0-9_]*(?:\.mask)?)\.npy", re.ASCII)
NPY_HEADER = re.compile(  # what np.save writes of the dtypes that a store may hold; no general parser is needed
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][bif][1248])', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n",
    re.DOTALL,
)
MIN_EVENTS = {"train": 1, "valid": 2, "test": 3}  # of each user's slice

Expected = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by field


def parse_block(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Arrays of one tar sample by field name; ``where`` names it in messages.

    Raises:
        UserError: a member is not a plain file ``<block>.<field>.npy`` of one block, or not a plain array.
    """
    arrays: dict[str, np.ndarray] = {}
    keys, offset = set(), 0
    try:
        while offset < len(data):
            member = tarfile.TarInfo.frombuf(data[offset : offset + tarfile.BLOCKSIZE], "utf-8", "strict")
            match = MEMBER_NAME.fullmatch(member.name)
            if match is None or member.type != tarfile.REGTYPE or match[2] in arrays:
                raise UserError(f"block {where} has an odd member {member.name!r}; expected files <block>.<field>.npy")
            keys.add(match[1])
            arrays[match[2]] = _array(data, offset + tarfile.BLOCKSIZE, member.size)
            offset += (1 + -(-member.size // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE
    except UserError:
        raise
    except (tarfile.TarError, ValueError, TypeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"block {where} cannot be read ({problem}); build the store again") from None
    require(len(keys) == 1, f"block {where} holds members of {len(keys)} blocks; expected 1")
    return arrays


def _array(data: bytes, offset: int, num_bytes: int) -> np.ndarray:
    """The ``.npy`` file at ``offset``, as a view.

    Raises:
        ValueError: it is none as NumPy writes it, is cut, or holds no plain numbers in C order.
    """
    if num_bytes < 0 or offset + num_bytes > len(data):
        raise ValueError(f"a member of {num_bytes} bytes where {len(data) - offset} are left")
    header = NPY_HEADER.match(data, offset, offset + num_bytes)
    if header is None:
        raise ValueError("a member is no .npy file of version 1.0 with plain numbers in C order")
    if offset + 10 + int.from_bytes(header[1], "little") != header.end():
        raise ValueError("a .npy header of another length than it says")
    dtype = np.dtype(header[2].decode())
    shape = tuple(int(length) for length in header[3].split(b",") if length.strip())
    if header.end() + math.prod(shape) * dtype.itemsize != offset + num_bytes:
        raise ValueError(f"an array {dtype} {list(shape)} in {offset + num_bytes - header.end()} bytes")
    return np.frombuffer(data, dtype, math.prod(shape), header.end()).reshape(shape)


def item_problems(
    arrays: Mapping[str, np.ndarray], count: int, features: Mapping[str, tuple[int, bool]], num_items: int
) -> Iterator[str]:
    """What is wrong with a block of items.

    Args:
        arrays: of the block.
        count: items that it should hold.
        features: dim of each feature, and whether it has a mask.
        num_items: V.
    """
    problems = field_problems(arrays, {"ids": ("int64", (count,))} | _feature_fields(features, count))
    yield from problems
    if problems:
        return
    ids = arrays["ids"]
    if ((ids < 0) | (ids >= num_items)).any():
        yield f"item ids outside 0 ... {num_items - 1}"
    elif len(np.unique(ids)) < count:
        yield "an item stands twice in it"
    yield from _feature_problems(arrays, features)


def user_problems(
    arrays: Mapping[str, np.ndarray],
    count: int,
    events: int,
    split: str,
    num_users: int,
    num_items: int,
    inline: Mapping[str, tuple[int, bool]] | None = None,
) -> Iterator[str]:
    """What is wrong with a block of users, in CSR form.

    Args:
        arrays: of the block.
        count, events: users and events that it should hold.
        split: of :data:`MIN_EVENTS`.
        num_users, num_items: of the whole store.
        inline: of an inline store the features that ride with the block, as in :func:`item_problems`; else None.
    """
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"users": ("int64", (count,)), "starts": ("int64", (count + 1,))}
    for name in ("items", "times") if "times" in arrays else ("items",):
        expected[name] = ("int64", (events,))
    if inline is not None:
        num_distinct = min(arrays["block_items"].size, events) if "block_items" in arrays else 0
        expected |= dict.fromkeys(("block_items", "block_counts"), ("int64", (num_distinct,)))
        expected |= _feature_fields(inline, num_distinct)
    problems = field_problems(arrays, expected)
    yield from problems
    if problems:
        return
    starts, items, users = arrays["starts"], arrays["items"], arrays["users"]
    if starts[0] != 0 or starts[-1] != events or (np.diff(starts) < MIN_EVENTS[split]).any():
        yield f"starts do not rise from 0 to {events} by at least {MIN_EVENTS[split]}"
    if ((items < 0) | (items >= num_items)).any():
        yield f"item ids outside 0 ... {num_items - 1}"
    if ((users < 0) | (users >= num_users)).any():
        yield f"user ids outside 0 ... {num_users - 1}"
    if len(np.unique(users)) < count:
        yield f"a user stands twice in {split}"
    if inline is not None:
        if not np.array_equal(arrays["block_items"], np.unique(items)):
            yield "block_items are not its distinct items, sorted"
        if (arrays["block_counts"] < 0).any():
            yield "block_counts are negative"
        yield from _feature_problems(arrays, inline)


def _feature_fields(features: Mapping[str, tuple[int, bool]], count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    fields: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dim, masked) in features.items():
        fields[name] = ("float16", (count, dim))
        if masked:
            fields[f"{name}.mask"] = ("bool", (count,))
    return fields


def _feature_problems(arrays: Mapping[str, np.ndarray], features: Iterable[str]) -> Iterator[str]:
    for name in features:
        rows, mask = arrays[name], arrays.get(f"{name}.mask", np.True_)
        if not np.isfinite(rows).all():
            yield f"{name} holds NaN or infinity"
        if rows[~mask].any():
            yield f"{name} is not zero where its mask is false"


def field_problems(arrays: Mapping[str, np.ndarray], expected: Expected) -> list[str]:
    """Fields that are missing, unknown, or of another dtype or shape."""
    if set(arrays) != set(expected):
        return [f"fields {sorted(arrays)}, expected {sorted(expected)}"]
    return [
        f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected {dtype} {list(shape)}"
        for name, (dtype, shape) in expected.items()
        if arrays[name].dtype != dtype or arrays[name].shape != shape
    ]
