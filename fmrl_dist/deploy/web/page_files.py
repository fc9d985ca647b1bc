"""The files of the page, which every web export has, with the hash of the export in their addresses.

Servers and browsers keep files for a while. As ``app.js?v=HASH`` has another address in every export, a page never
meets files of an older one; ``index.html`` alone has no such address, and the service worker's list has its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources

PACKAGE = "fmrl_dist.deploy.web"
SERVICE_WORKER = "service-worker.js"
PAGE_FILES = ("index.html", "style.css", "app.js", "model.js", "api_model.js", "manifest.webmanifest", "icon.svg")
EXPORT_MARK, FILES_MARK = b"__EXPORT__", b"const FILES = {};"


def page_sources() -> dict[str, bytes]:
    """The files as they are in this package, by name; the service worker is one of them."""
    folder = resources.files(PACKAGE)
    return {name: folder.joinpath(name).read_bytes() for name in (*PAGE_FILES, SERVICE_WORKER)}


def rendered_page(export: str, others: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of the page of one export, by name.

    Args:
        export: its hash.
        others: what else the service worker is to keep, by name.
    """
    files = {name: data.replace(EXPORT_MARK, export.encode()) for name, data in page_sources().items()}
    worker = files.pop(SERVICE_WORKER)
    assert worker.count(FILES_MARK) == 1
    kept = {name: hashlib.sha256(data).hexdigest() for name, data in {**files, **others}.items()}
    listed = f"const FILES = {json.dumps(kept, indent=2, sort_keys=True)};".encode()
    return files | {SERVICE_WORKER: worker.replace(FILES_MARK, listed)}
