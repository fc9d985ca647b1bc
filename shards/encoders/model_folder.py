"""Where a pretrained text model is: in a local folder, in an installed package, or in a snapshot of a hub repository.

Everything is loaded from the folder found here, so nothing later uses the network, and one place says why a model
cannot be found. An image model's config may name nothing that a hub holds, either.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import UserError, require

PACKAGE_PREFIX = "package:"
# Weights (safetensors only), config and tokenizer: fetched from a hub, and hashed as the revision of a local folder.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")

TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # an architecture of timm's own; a hub's has a colon


def find_text_model(name: str, revision: str) -> tuple[Path, str]:
    """The folder of a model, and its revision.

    Args:
        name: a local folder, ``package:NAME/PATH`` (folder PATH inside the installed package NAME) or a hub id.
        revision: branch, tag or commit of a hub model; "" takes its default branch.

    Returns:
        The folder, and the commit of a hub model or else the SHA-256 of :data:`MODEL_FILES`.

    Raises:
        UserError: no such folder or package, a path that leaves its package, or a hub model that cannot be fetched.
    """
    folder = _local_folder(name)
    if folder is None:
        return _hub_snapshot(name, revision)
    require(not revision, f"model {name!r} has revision {revision!r}, but only a hub model has revisions; remove it")
    return folder, _content_sha256(folder)


def local_model_sha256(name: str) -> str | None:
    """Revision of a model in a folder or a package; None for the id of a hub's model.

    Raises:
        UserError: no such package, or a path that leaves it.
    """
    folder = _local_folder(name)
    return None if folder is None else _content_sha256(folder)


def _local_folder(name: str) -> Path | None:
    if name.startswith(PACKAGE_PREFIX):
        return _package_folder(name)
    return Path(name) if Path(name).is_dir() else None


def _package_folder(name: str) -> Path:
    package, _, path = name.removeprefix(PACKAGE_PREFIX).partition("/")
    require(
        package.isidentifier() and bool(path),
        f"model {name!r} is malformed; expected package:NAME/PATH, NAME as Python imports it",
    )
    spec = importlib.util.find_spec(package)  # of a top-level name: this does not run the package
    require(
        spec is not None,
        f"model {name!r}: package {package} is not installed; pip install {package.replace('_', '-')}",
    )
    assert spec is not None
    roots = [Path(root).resolve() for root in spec.submodule_search_locations or ()]
    for root in roots:
        folder = (root / path).resolve()
        require(folder.is_relative_to(root), f"model {name!r} leaves the package; expected a folder inside {root}")
        if folder.is_dir():
            return folder
    raise UserError(f"model {name!r}: package {package} has no folder {path!r}; check its files")


def _hub_snapshot(name: str, revision: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # "*/*": subfolders hold exports to other formats, which are larger than the model.
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"]
        )
    except HFValidationError:
        raise UserError(
            f"model {name!r} is neither a folder nor a hub id; expected a folder that exists, or OWNER/NAME"
        ) from None
    except OSError as error:  # the hub's client raises it for a missing model, no access, or no network
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {name!r} cannot be fetched from the hub ({type(error).__name__}: {reason}); check its name, "
            "revision and the network, or give a local folder"
        ) from None
    return Path(folder), Path(folder).name


def _content_sha256(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check_towers(name: str, config: dict[str, Any], text_models: Set[str]) -> None:
    """Refuse the config of an image model that names anything but architectures that the libraries hold themselves.

    Only the image tower is used, but open_clip builds the text tower too: for one of transformers, it reads the config
    that ``hf_model_name`` names, and transformers fetches and runs the attention that this config names.

    Args:
        name: of the model, for the message.
        config: as open_clip takes it.
        text_models: names of text towers that open_clip's own configs have.

    Raises:
        UserError: likewise.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    require(
        isinstance(vision, dict) and isinstance(text, dict),
        f"image model {name}: vision_cfg and text_cfg are not both mappings; expected an open_clip model config",
    )
    tower = text.get("hf_model_name")
    require(
        not tower or (isinstance(tower, str) and tower in text_models and not Path(tower).exists()),
        f"image model {name}: text_cfg.hf_model_name is {str(tower)[:100]!r}, which is not a text tower of open_clip's "
        "own models, or is a folder here; the tower could run code from a hub: choose another model",
    )
    architecture = vision.get("timm_model_name")
    require(
        not architecture or (isinstance(architecture, str) and TIMM_NAME.fullmatch(architecture) is not None),
        f"image model {name}: vision_cfg.timm_model_name is {str(architecture)[:100]!r}; expected the name of an "
        "architecture, such as vit_base_patch16_224, not of a model on a hub",
    )
    require(
        not vision.get("timm_model_pretrained"),
        f"image model {name}: vision_cfg.timm_model_pretrained is on, which fetches other weights; turn it off",
    )
