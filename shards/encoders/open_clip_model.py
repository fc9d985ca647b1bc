"""Which open_clip model an image feature names: its architecture, its preprocessing and a file of safe weights.

    model       a name that open_clip knows, or a JSON file: a model config as in open_clip's folder ``model_configs``,
                or the ``open_clip_config.json`` published with the weights (it holds the preprocessing too)
    pretrained  a tag that open_clip knows for the named model, or a file with the weights of the whole model

Only safetensors are fetched and read: other formats of weights are pickles, which can run code.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fmrl_dist.base.errors import UserError, require
from shards.encoders.model_folder import check_towers
from shards.encoders.torchvision_import import make_torchvision_importable

make_torchvision_importable()

import open_clip  # noqa: E402 - imports torchvision
from open_clip.constants import HF_SAFE_WEIGHTS_NAME  # noqa: E402
from open_clip.model import CLIPVisionCfg  # noqa: E402
from open_clip.pretrained import download_pretrained_from_hf  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict  # noqa: E402

CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")


@dataclass(frozen=True)
class Architecture:
    """What open_clip builds a model from."""

    name: str
    config: dict[str, Any]
    preprocessing: dict[str, Any] | None  # of images; None for a name, which does not specify it


@dataclass(frozen=True)
class ImageModel:
    """A model whose weights are on this machine."""

    encoder: str  # as the manifest names it
    config: dict[str, Any]
    preprocessing: dict[str, Any]  # of images: size, mean, std, interpolation, resize_mode, fill_color, mode
    weights: Path  # safetensors

    @property
    def dim(self) -> int:
        """Width of an image embedding."""
        return int(self.config["embed_dim"])

    @property
    def revision(self) -> str:
        """sha256 of the weights, in hex."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_image_model(model: str, pretrained: str) -> ImageModel:
    """The model that a config names; a tag's weights are downloaded unless the hub's cache has them.

    Raises:
        UserError: neither a known name nor a valid JSON file; neither a known tag nor a file; weights that are a pickle
            or cannot be fetched; a tag that was trained with another activation.
    """
    architecture = read_architecture(model)
    if Path(pretrained).suffix == ".safetensors" or Path(pretrained).suffix in PICKLES or Path(pretrained).is_file():
        weights = Path(pretrained)
        require(weights.is_file(), f"image weights {weights} do not exist; expected a .safetensors file")
        require(
            weights.suffix == ".safetensors",
            f"image weights {weights} end in {weights.suffix!r}; expected .safetensors (other formats are pickles, "
            "which can run code)",
        )
        preprocessing = architecture.preprocessing
        if preprocessing is None:
            preprocessing = _agreed_preprocessing(architecture.name)
        return _image_model(architecture, weights.name, preprocessing, weights)
    require(
        not model.endswith(".json"),
        f"image model {model} is a file but its weights {pretrained!r} are not; expected a .safetensors file",
    )
    tag = _find_tag(architecture.name, pretrained)
    if tag.get("quick_gelu") and not architecture.config.get("quick_gelu"):
        raise UserError(
            f"weights {pretrained!r} of image model {architecture.name!r} were trained with QuickGELU; "
            f"name the model {architecture.name}-quickgelu"
        )
    return _image_model(architecture, pretrained, tag, _fetch(architecture.name, pretrained, tag))


def read_architecture(model: str) -> Architecture:
    """The architecture of a name that open_clip knows, or of a JSON file.

    Raises:
        UserError: neither, or it names what a hub holds.
    """
    architecture = _named_architecture(model) if not model.endswith(".json") else _architecture_in(Path(model))
    check_towers(model, architecture.config, _known_text_towers())
    return architecture


def _named_architecture(model: str) -> Architecture:
    names = open_clip.list_models()
    close = difflib.get_close_matches(model, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "; open_clip.list_models() lists them"
    require(model in names, f"open_clip knows no image model {model!r}{hint}")
    return Architecture(model, open_clip.get_model_config(model), None)


def _architecture_in(path: Path) -> Architecture:
    require(path.is_file(), f"image model {path} does not exist; expected a JSON file of an open_clip model config")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"image model {path} is not JSON: {error}") from None
    if isinstance(found, dict):
        config, preprocessing = found.get("model_cfg", found), found.get("preprocess_cfg", {})
        if isinstance(config, dict) and isinstance(preprocessing, dict) and all(key in config for key in CONFIG_KEYS):
            return Architecture(path.stem, config, preprocessing)
    raise UserError(f"image model {path} is not an open_clip model config; expected the keys {', '.join(CONFIG_KEYS)}")


def _known_text_towers() -> set[str]:
    """The text towers of transformers that open_clip's own models have."""
    configs = map(open_clip.get_model_config, open_clip.list_models())
    return {name for config in configs if (name := config.get("text_cfg", {}).get("hf_model_name"))}


def load_tower(model: ImageModel) -> torch.nn.Module:
    """The image tower with its weights, float32 on the CPU, for inference; the text tower is dropped.

    Raises:
        UserError: the weights are not safetensors, or belong to another model.
    """
    try:
        with _folder(model.config, model.preprocessing, model.weights) as name:
            clip = open_clip.create_model(name, pretrained_text=False)
    except Exception as error:  # noqa: BLE001 - a foreign file or config can make open_clip raise anything
        raise UserError(
            f"{model.encoder} cannot be loaded from {model.weights}: {_one_line(error)}; expected safetensors of all "
            "its weights, text tower included"
        ) from None
    tower: torch.nn.Module = clip.visual
    return tower.eval()


def make_transform(preprocessing: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """How the model prepares an RGB image for inference: as float32 [3, height, width]."""
    transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(PreprocessCfg(**preprocessing), False)
    return transform


def draw_weights(architecture: Architecture, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a whole model, as open_clip initialises them from a seed.

    Raises:
        UserError: open_clip cannot build this architecture.
    """
    torch.manual_seed(seed)
    try:
        with _folder(architecture.config, {}, None) as name:
            clip = open_clip.create_model(name, pretrained_text=False)
    except Exception as error:  # noqa: BLE001 - as above
        raise UserError(f"open_clip cannot build image model {architecture.name!r}: {_one_line(error)}") from None
    return {key: value.contiguous() for key, value in clip.state_dict().items()}


def _image_model(architecture: Architecture, weights_name: str, own: dict[str, Any], weights: Path) -> ImageModel:
    vision = architecture.config["vision_cfg"]
    size = vision.get("image_size", CLIPVisionCfg().image_size)
    preprocessing = merge_preprocess_dict(PreprocessCfg(), own) | {"size": size}
    return ImageModel(f"open_clip:{architecture.name} {weights_name}", architecture.config, preprocessing, weights)


def _agreed_preprocessing(name: str) -> dict[str, Any]:
    """How images are prepared for a named model with weights from a file: as for its published weights.

    open_clip itself would use its defaults, which are wrong for SigLIP.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [merge_preprocess_dict({}, open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    require(
        all(one == known[0] for one in known),
        f"published weights of image model {name!r} differ in their preprocessing, and a file does not say which it "
        "needs; as the model, name the open_clip_config.json that was published with the file",
    )
    return known[0] if known else {}


def _find_tag(name: str, tag: str) -> dict[str, Any]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    expected = f"expected one of: {', '.join(tags)}; or" if tags else "expected"
    require(
        open_clip.is_pretrained_cfg(name, tag),
        f"image weights {tag!r} are not a tag that open_clip knows for {name!r}; {expected} a .safetensors file",
    )
    found: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    return found


def _fetch(name: str, tag: str, config: dict[str, Any]) -> Path:
    """Weights of a tag, as safetensors; open_clip's own download would fall back to a pickle."""
    repository, _, file = config["hf_hub"].rpartition("/")
    file = Path(file).with_suffix(".safetensors").name if file else HF_SAFE_WEIGHTS_NAME
    try:
        return Path(download_pretrained_from_hf(repository, filename=file))
    except Exception as error:  # noqa: BLE001 - the hub's client and the network can raise anything
        raise UserError(
            f"weights {tag!r} of image model {name!r} cannot be fetched: {_one_line(error)}; without a network, "
            "name a .safetensors file as pretrained"
        ) from None


@contextmanager
def _folder(config: dict[str, Any], preprocessing: dict[str, Any], weights: Path | None) -> Iterator[str]:
    """A model as it is published, config and weights in one folder: only from such a folder open_clip takes everything.

    Its log is silenced meanwhile: that a model has no weights, say, is known here.
    """
    with tempfile.TemporaryDirectory() as folder:
        content = {"model_cfg": copy.deepcopy(config), "preprocess_cfg": preprocessing}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
        if weights is not None:
            (Path(folder) / HF_SAFE_WEIGHTS_NAME).symlink_to(weights.absolute())
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield f"local-dir:{folder}"
        finally:
            logging.disable(level)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
