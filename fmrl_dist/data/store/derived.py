"""The files that runs make from a store once and keep (``Store.derived_folder``), and how damage to them is noticed.

items-<features>-<manifest>.values.npy, .present.npy     the unpacked item table (fmrl_dist.data.item_table)
                           .sha256                       hashes of the pieces of both
<name>-<manifest>.npy                                    counted (fmrl_dist.data.item_statistics), hash appended
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fmrl_dist.data.store.piece_hashes import DIGEST_BYTES, find_damage
from fmrl_dist.data.store.reader import Store


def damaged_files(store: Store) -> Iterator[str]:
    """What is wrong with the files made from the store, every byte compared; one line each."""
    name = store.manifest.sha256[:16]
    for folder in store.derived_folders:
        for path in sorted(folder.glob(f"items-*-{name}.values.npy")):
            if (damage := table_damage(path, whole=True)) is not None:
                yield f"{path}: {damage}; delete it, it will be unpacked again"
        for path in sorted(folder.glob(f"*-{name}.npy")):
            try:
                check_appended_hash(path)
            except (OSError, ValueError) as error:
                yield f"{path}: {error}; delete it, it will be rebuilt"


def table_damage(values: Path, whole: bool = False) -> str | None:
    """What is wrong with an unpacked table, by a sample of its pieces or all of them; None if nothing is.

    Raises:
        OSError: it is there but cannot be read.
    """
    stem = values.name.removesuffix(".values.npy")
    present, hashes = (values.with_name(f"{stem}.{part}") for part in ("present.npy", "sha256"))
    return find_damage(hashes, (present, values), whole)


def check_appended_hash(path: Path) -> None:
    """Compare a file with the sha256 that is its end.

    Raises:
        ValueError: it is another one, or the file is empty.
        OSError: it cannot be read.
    """
    content = np.memmap(path, np.uint8, "r")
    if hashlib.sha256(content[:-DIGEST_BYTES].data).digest() != content[-DIGEST_BYTES:].tobytes():
        raise ValueError("its sha256 does not match the appended one")
