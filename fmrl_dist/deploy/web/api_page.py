"""The same page for a service: it asks the API instead of computing, so it holds no weights and no list of items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from fmrl_dist.base.files import json_sha256
from fmrl_dist.deploy.item_vocabulary import ItemId
from fmrl_dist.deploy.web.page_files import SERVICE_WORKER, page_sources, rendered_page
from fmrl_dist.deploy.web.web_format import FORMAT, FORMAT_VERSION, MODEL_JSON

LARGEST_ID = 2**53 - 1  # that JavaScript's numbers tell from its neighbours
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "webmanifest": "application/manifest+json",
}


def can_show(ids: Sequence[ItemId]) -> bool:
    """Whether a browser can name all items: integers beyond 2⁵³ would become others."""
    return all(isinstance(item_id, str) or abs(item_id) <= LARGEST_ID for item_id in ids)


def api_page(name: str, sizes: Sequence[int], num_items: int, max_length: int, api: str) -> dict[str, bytes]:
    """The page's files, by name.

    Args:
        name: shown on the page.
        sizes: that the service answers for, ascending.
        num_items: of the catalogue.
        max_length: last events of a history that the model reads.
        api: address below which ``/v1`` is, as seen from the page, with a slash at the end.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "api": api,
        "sizes": list(sizes),
        "num_items": num_items,
        "max_length": max_length,
        "figures": None,
    }
    sources = {file: hashlib.sha256(data).hexdigest() for file, data in page_sources().items()}
    export = json_sha256({"model": manifest, "page": sources})[:32]
    data = {MODEL_JSON: json.dumps({"export": export, **manifest}).encode()}
    files = rendered_page(export, data) | data
    del files[SERVICE_WORKER]  # without the service there is nothing to show
    return files
