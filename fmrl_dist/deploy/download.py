"""An export by its place: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from fmrl_dist.base.errors import UserError, require

NEEDED = ("config.json", "vocab.parquet", "*.safetensors")  # nothing that could hold code
NOT_NEEDED = ("fit-*.safetensors", "item_vectors.safetensors")  # of what recommends
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def export_at(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an export; one of the Hub is downloaded into the Hub's cache.

    Args:
        source: a folder, or else the id of a repository on the Hub, such as ``owner/name``.
        revision: branch, tag or commit on the Hub; None for its main branch.

    Raises:
        UserError: it is neither, or cannot be downloaded.
    """
    folder = Path(source)
    if str(source) and folder.is_dir():
        require(revision is None, f"{folder} is a folder here, which has no revision {revision!r}; leave revision out")
        return folder
    is_id = isinstance(source, str) and HUB_ID.fullmatch(source) is not None and not folder.exists()
    require(is_id, f"{str(source)!r} is neither a folder nor the id of a repository on the Hub, such as owner/name")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(
            f"{source} is no folder here, and a repository on the Hub takes huggingface_hub: "
            "pip install 'fmrl-dist[hub]'"
        ) from None
    # Its bases are those of all errors of the HTTP client, whichever that is, such as no connection.
    known: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        downloaded = snapshot_download(
            str(source), revision=revision, allow_patterns=list(NEEDED), ignore_patterns=list(NOT_NEEDED)
        )
    except known as error:
        at_revision = "" if revision is None else f" at revision {revision!r}"
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{source} is no folder here, and cannot be downloaded from the Hub{at_revision} ({problem}); "
            "check its name, your rights and the connection"
        ) from None
    return Path(downloaded)
