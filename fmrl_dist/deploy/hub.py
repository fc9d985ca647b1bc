"""Publish an export on the Hugging Face Hub: one commit with the files of the export, and nothing else.

Only the model card differs from the folder's, and its hash: its code reads the repository.

The token is the environment's (``HF_TOKEN``) or that of ``hf auth login``: huggingface_hub finds it, and it is never an
argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.checkpoint.export.files import CARD_FILE, is_export_file
from fmrl_dist.checkpoint.export.reading import intact_files
from fmrl_dist.deploy.card_source import with_source
from fmrl_dist.model.export_config import CONFIG_FILE, config_text_with_file, read_export_config

T = TypeVar("T")


def check_can_push(repo_id: str) -> None:
    """Refuse what would fail after an export has been written, without asking the Hub.

    Raises:
        UserError: huggingface_hub is missing, the id is not one, or there is no token.
    """
    _, get_token, validate_repo_id, _ = _hub()
    _asking(lambda: validate_repo_id(repo_id), f"{repo_id!r} is not the id of a repository on the Hub")
    require(
        get_token() is not None,
        f"there is no token to push to {repo_id} with; log in with `hf auth login`, or set HF_TOKEN",
    )


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False, message: str = "") -> str:
    """Upload an export as one commit to a repository's main branch; the repository is created if it does not exist.

    Files of an earlier export that this one does not have are removed in the same commit; files of others stay. In the
    code of the model card stands the repository's id; the folder's own files are left as they are.

    Args:
        folder: an export of any format and dtype.
        repo_id: such as ``owner/name``.
        private: create a private repository; an existing one must be private. False: as the owner's settings say.
        message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        UserError: the export is damaged, there is no token, the Hub refuses it or cannot be reached, or ``private`` is
            set and the repository is public; nothing is then uploaded.
    """
    folder = Path(folder)
    names = intact_files(folder)
    check_can_push(repo_id)
    api_class, _, _, add_or_delete = _hub()
    api, failure = api_class(library_name="fmrl-dist"), f"{folder} cannot be pushed to {repo_id}"
    _asking(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), failure)
    repo = _asking(lambda: api.repo_info(repo_id), failure)
    require(
        not private or bool(repo.private),
        f"{repo_id} exists and is public; make it private on the Hub first, or push to another repository",
    )
    known = [entry.rfilename for entry in repo.siblings or []]
    add, delete = add_or_delete
    renamed = files_of_repository(folder, repo_id, names)
    operations: list[Any] = [add(name, renamed.get(name, str(folder / name))) for name in names]
    operations += [delete(name) for name in known if is_export_file(name) and name not in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a model does not have Parquet files
        commit = _asking(
            lambda: api.create_commit(repo_id, operations, commit_message=message or f"Export {folder.name}"), failure
        )
    return str(commit.commit_url)


def files_of_repository(folder: Path, repo_id: str, names: Sequence[str]) -> dict[str, bytes]:
    """Content of the files ``names`` of an export that are others in a repository: the card, and with it the hashes."""
    if CARD_FILE not in names:
        return {}
    card = with_source((folder / CARD_FILE).read_text(encoding="utf-8"), repo_id, on_hub=True).encode()
    config = config_text_with_file(read_export_config(folder), CARD_FILE, card)
    return {CARD_FILE: card, CONFIG_FILE: config.encode()}


def _hub() -> tuple[Any, Any, Any, tuple[Any, Any]]:
    """``HfApi``, ``get_token``, ``validate_repo_id``, and the operations that add and delete.

    Raises:
        UserError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UserError("pushing to the Hub needs huggingface_hub: pip install 'fmrl-dist[hub]'") from None
    return HfApi, get_token, validate_repo_id, (CommitOperationAdd, CommitOperationDelete)


def _asking(call: Callable[[], T], failure: str) -> T:
    """The result of a call of huggingface_hub.

    Raises:
        UserError: the Hub refused it, or could not be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are those of all errors of the HTTP client, whichever that is, such as no connection.
    known: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        return call()
    except known as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        mend = {
            None: "check the id and the connection",
            401: "log in again with `hf auth login`, or set HF_TOKEN to a valid token",
            403: "use a token that may write to it",
            404: "check the id, and that the token may write to it",
        }.get(status, "try again later")
        raise UserError(f"{failure} ({problem}); {mend}") from None
