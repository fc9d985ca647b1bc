"""Copies of files that URLs name: made once, streamed, whole or absent, and made anew when the original has changed."""

from __future__ import annotations

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import written_aside
from fmrl_dist.base.urls import hide_credentials

CHUNK_BYTES = 1 << 22
VERSION_KEYS = ("size", "ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created")


def copies_of(url: str, folder: Path) -> list[Path]:
    """Copies in ``folder`` of the file at ``url``, or of those that match it where it is a pattern.

    A copy's name begins with a hash of the URL and of what the server says of the file's version: one that is there is
    used again.

    Raises:
        UserError: it cannot be read, matches nothing, or its protocol needs a package that is missing.
    """
    import fsspec

    shown = hide_credentials(url)
    try:
        system, path = fsspec.core.url_to_fs(url)
        paths = sorted(system.glob(path)) if glob.has_magic(path.partition("?")[0]) and "?" not in path else [path]
        if not paths:
            raise UserError(f"no file matches {shown}; check the path in the config")
        folder.mkdir(parents=True, exist_ok=True)
        return [_copy(system, str(path), folder) for path in paths]
    except ImportError as error:
        raise UserError(f"{shown} cannot be read: {error}; install that package") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - each protocol raises exceptions of its own
        what = hide_credentials(" ".join(str(error).split())) or type(error).__name__
        raise UserError(f"{shown} cannot be read: {what}; check the URL and who may read it") from None


def _copy(system: Any, path: str, folder: Path) -> Path:
    info = system.info(path)
    version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
    digest = hashlib.sha256(json.dumps([path, version], sort_keys=True).encode()).hexdigest()[:16]
    name = path.partition("?")[0].rstrip("/").rpartition("/")[2]
    target = folder / f"{digest}-{name[-100:]}"
    if target.is_file():
        return target
    print(f"copying {hide_credentials(system.unstrip_protocol(path))} to {target}", flush=True)
    # a web server that knows no ranges gives a file from its beginning only
    options = {"block_size": 0} if "http" in system.protocol else {}
    with system.open(path, "rb", **options) as source, written_aside(target) as copy:
        while chunk := source.read(CHUNK_BYTES):
            copy.write(chunk)
        size = copy.tell()
    if info.get("size") not in (None, size):
        target.unlink()
        raise UserError(f"the copy of {path} ended after {size:,} of {info['size']:,} bytes; run this again")
    return target
