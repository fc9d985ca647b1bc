"""What a row is found by: the sha256 of the bytes that were encoded, a text in UTF-8 or an image file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

KEY = np.dtype("V32")  # NumPy compares and sorts its elements as bytes


def content_key(content: bytes) -> bytes:
    """Its sha256, 32 bytes."""
    return hashlib.sha256(content).digest()


def as_keys(digests: Iterable[bytes]) -> np.ndarray:
    """:data:`KEY` [n], of n sha256."""
    return np.frombuffer(b"".join(digests), KEY)
