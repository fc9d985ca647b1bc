"""One file of a folder, damaged as disks, copies and people damage files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

JSON_KINDS = (b"null", b"3", b'"text"', b"[]", b"{}", b"[{}]", b"true", b"NaN", b'{"a": {"b": []}}', b"[" * 5000)
KINDS = ("flip", "flip", "flip", "zeros", "cut", "double", "swap", "folder", "empty", "json", "delete", "noise", "link")


def files_in(folder: Path) -> list[Path]:
    """Every file, once even where links lead to it, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and _is_itself(path))


def _is_itself(path: Path) -> bool:
    return path.resolve() == path.absolute()


def damage(folder: Path, generator: np.random.Generator) -> str:
    """Damage one file of a folder; returns what was done."""
    files = files_in(folder)
    path = files[generator.integers(len(files))]
    kind = str(generator.choice(KINDS))
    data = bytearray(path.read_bytes())
    place = int(generator.integers(len(data) + 1))
    length = int(generator.integers(1, 600))
    if kind == "flip" and data:
        data[min(place, len(data) - 1)] ^= 1 << int(generator.integers(8))
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "noise":
        data[place : place + length] = generator.bytes(len(data[place : place + length]))
    elif kind == "cut":
        del data[place:]
    elif kind == "double":
        data[place:place] = data[place : place + length]
    elif kind == "empty":
        data.clear()
    elif kind == "json":
        data = bytearray(JSON_KINDS[generator.integers(len(JSON_KINDS))])
    elif kind == "swap":
        other = files[generator.integers(len(files))]
        data = bytearray(other.read_bytes())
        _replace(other, path.read_bytes())
        kind = f"swap with {other.relative_to(folder)}"
    if kind == "delete":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "link":
        path.unlink()
        os.symlink("nowhere", path)
    else:
        _replace(path, bytes(data))
    return f"{kind} {path.relative_to(folder)} at byte {place}, {length} bytes"


def _replace(path: Path, data: bytes) -> None:
    """A new file of that name: the old one may be linked elsewhere."""
    path.unlink()
    path.write_bytes(data)


def restore(whole: Path, folder: Path) -> None:
    """Make a folder a copy of another again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
