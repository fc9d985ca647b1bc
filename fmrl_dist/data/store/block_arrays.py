"""One tar sample as arrays: parsed without a copy from checked bytes, then compared with the manifest.

A hash only proves that bytes are those that somebody wrote. Here everything is refused that is not a plain file, not a
plain array, or not of the dtype, shape and range that its reader relies on. Nothing is unpickled, and a header that
claims more bytes than there are allocates nothing. Arrays are read-only views of the bytes.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterator, Mapping

import numpy as np

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.data.store.manifest import LEAVE_ONE_OUT, Block, Manifest

MEMBER_NAME = re.compile(r"(\d{6,})\.([a-z][a-z0-9_]*(?:\.mask)?)\.npy", re.ASCII)
NPY_HEADER = re.compile(  # what np.save writes for the dtypes that a store may hold; no general parser is needed
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][bif][1248])', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n",
    re.DOTALL,
)
SIGN_BIT, INFINITY_BITS = np.uint16(0x8000), np.uint16(0x7C00)  # of a float16; NaN has more bits than infinity
MIN_EVENTS = {"train": 1, "valid": 2, "test": 2}  # of each user's slice: a target, and a history before it
MIN_TEST_EVENTS = 3  # with leave-one-out, where the history has the validation target

Expected = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape by field


def parse_block(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Arrays of one tar sample by field name; messages call it ``where``.

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
        ValueError: it is not a file as NumPy writes it, is cut, or holds something other than numbers in C order.
    """
    if num_bytes < 0 or offset + num_bytes > len(data):
        raise ValueError(f"a member of {num_bytes} bytes, but only {len(data) - offset} are left")
    header = NPY_HEADER.match(data, offset, offset + num_bytes)
    if header is None:
        raise ValueError("a member is not a .npy file of version 1.0 with plain numbers in C order")
    if offset + 10 + int.from_bytes(header[1], "little") != header.end():
        raise ValueError("a .npy header is not as long as it says")
    dtype = np.dtype(header[2].decode())
    shape = tuple(int(length) for length in header[3].split(b",") if length.strip())
    if header.end() + math.prod(shape) * dtype.itemsize != offset + num_bytes:
        raise ValueError(f"an array {dtype} {list(shape)} in {offset + num_bytes - header.end()} bytes")
    return np.frombuffer(data, dtype, math.prod(shape), header.end()).reshape(shape)


def item_problems(arrays: Mapping[str, np.ndarray], block: Block, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the arrays of a block of items."""
    problems = _field_problems(arrays, {"ids": ("int64", (block.count,))} | _feature_fields(manifest, block.count))
    yield from problems
    if problems:
        return
    ids = arrays["ids"]
    if ((ids < 0) | (ids >= manifest.num_items)).any():
        yield f"item ids outside 0 ... {manifest.num_items - 1}"
    elif len(np.unique(ids)) < block.count:
        yield "an item occurs twice in it"
    yield from _feature_problems(arrays, ids, manifest)


def user_problems(arrays: Mapping[str, np.ndarray], block: Block, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the arrays of a block of users, in CSR form."""
    split, events = block.split, block.events
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "users": ("int64", (block.count,)),
        "starts": ("int64", (block.count + 1,)),
    }
    for name in ("items", "times") if "times" in arrays else ("items",):
        expected[name] = ("int64", (events,))
    if manifest.inline:
        num_distinct = min(arrays["block_items"].size, events) if "block_items" in arrays else 0
        expected |= dict.fromkeys(("block_items", "block_counts"), ("int64", (num_distinct,)))
        expected |= _feature_fields(manifest, num_distinct)
    problems = _field_problems(arrays, expected)
    yield from problems
    if problems:
        return
    starts, items, users = arrays["starts"], arrays["items"], arrays["users"]
    is_whole_test = split == "test" and manifest.split_rule == LEAVE_ONE_OUT
    least = MIN_TEST_EVENTS if is_whole_test else MIN_EVENTS[split]
    if starts[0] != 0 or starts[-1] != events or (np.diff(starts) < least).any():
        yield f"starts do not rise from 0 to {events} by at least {least}"
    if ((items < 0) | (items >= manifest.num_items)).any():
        yield f"item ids outside 0 ... {manifest.num_items - 1}"
    if ((users < 0) | (users >= manifest.num_users)).any():
        yield f"user ids outside 0 ... {manifest.num_users - 1}"
    if len(np.unique(users)) < block.count:
        yield f"a user occurs twice in {split}"
    if manifest.inline:
        if not np.array_equal(arrays["block_items"], np.unique(items)):
            yield "block_items are not its distinct items, sorted"
        if (arrays["block_counts"] < 0).any():
            yield "block_counts are negative"
        yield from _feature_problems(arrays, arrays["block_items"], manifest)


def _feature_fields(manifest: Manifest, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    fields: dict[str, tuple[str, tuple[int, ...]]] = {}
    for feature in manifest.features:
        fields[feature.name] = ("float16", (count, feature.dim))
        if feature.masked:
            fields[f"{feature.name}.mask"] = ("bool", (count,))
    return fields


def _feature_problems(arrays: Mapping[str, np.ndarray], ids: np.ndarray, manifest: Manifest) -> Iterator[str]:
    for name in (feature.name for feature in manifest.features):
        if (problem := row_problem(arrays[name], arrays.get(f"{name}.mask"))) is not None:
            what, row = problem
            yield f"{name} of item {ids[row]} {what}"


def row_problem(rows: np.ndarray, present: np.ndarray | None) -> tuple[str, int] | None:
    """What no reader takes in rows of a feature, and the first row of that kind; None if all are sound.

    A row of zeros that counts as present was never written: no encoder makes one, and a precomputed one is absent.

    Args:
        rows: float16 [n, dim].
        present: bool [n], true for the items that have the feature; None: all of them.
    """
    present = np.ones(len(rows), np.bool_) if present is None else present
    magnitudes = rows.view(np.uint16) & ~SIGN_BIT  # several times faster than float16 itself
    filled = magnitudes.any(axis=1)
    for what, wrong in (
        ("holds NaN or infinity", (magnitudes >= INFINITY_BITS).any(axis=1)),
        ("is not zero where its mask is false", filled & ~present),
        ("is all zero, though the item is said to have it: it was never written", present & ~filled),
    ):
        if wrong.any():
            return what, int(np.argmax(wrong))
    return None


def _field_problems(arrays: Mapping[str, np.ndarray], expected: Expected) -> list[str]:
    """Fields that are missing, unknown, or of another dtype or shape."""
    if set(arrays) != set(expected):
        return [f"fields {sorted(arrays)}, expected {sorted(expected)}"]
    return [
        f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}, expected {dtype} {list(shape)}"
        for name, (dtype, shape) in expected.items()
        if arrays[name].dtype != dtype or arrays[name].shape != shape
    ]
