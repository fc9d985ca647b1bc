"""The same page for a service: it asks the API instead of computing, so it holds no weights and no list of items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.json_text import parse_object
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.deploy.item_vocabulary import ItemId
from fmrl_dist.deploy.web.page_files import SERVICE_WORKER, page_sources, rendered_page
from fmrl_dist.deploy.web.web_format import FORMAT, FORMAT_VERSION, MODEL_JSON, masked_figures

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


def figures_beside(folder: Path, exported: ExportedModel) -> dict[str, Any] | None:
    """What the page shows of the evaluation in an export's folder (``fmrl_dist.evaluate --checkpoint EXPORT``).

    None where there is none, or, which is printed, where it cannot serve: a service does without.
    """
    path = folder / f"{evaluation_file('test', mask_seen=False)}.json"
    try:
        return masked_figures(parse_object(path.read_bytes(), str(path), "evaluate the export again"), exported)
    except FileNotFoundError:
        return None
    except (UserError, OSError) as error:
        print(f"the page shows no quality: {' '.join(str(error).split())}", flush=True)
        return None


def api_page(
    name: str, sizes: Sequence[int], num_items: int, max_length: int, api: str, figures: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """The page's files, by name.

    Args:
        name: shown on the page.
        sizes: that the service answers for, ascending.
        num_items: of the catalogue.
        max_length: last events of a history that the model reads.
        api: address below which ``/v1`` is, as seen from the page, with a slash at the end.
        figures: quality of each size, from :func:`figures_beside`.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "api": api,
        "sizes": list(sizes),
        "num_items": num_items,
        "max_length": max_length,
        "figures": figures,
    }
    sources = {file: hashlib.sha256(data).hexdigest() for file, data in page_sources().items()}
    export = json_sha256({"model": manifest, "page": sources})[:32]
    data = {MODEL_JSON: json.dumps({"export": export, **manifest}).encode()}
    files = rendered_page(export, data) | data
    del files[SERVICE_WORKER]  # without the service there is nothing to show
    return files
