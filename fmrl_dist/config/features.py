"""Where a frozen item feature comes from: one dataclass per ``data.features.<name>.source``.

The three sources without pretrained weights (``npy``, ``tfidf``, ``pixels``) and the two encoders (``transformers``,
``open_clip``) each have the keys that they read and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fmrl_dist.base.errors import require
from fmrl_dist.config.parsing import require_at_least

Precision = Literal["auto", "fp32", "bf16"]  # auto: bf16 where the device multiplies it faster than float32


@dataclass(frozen=True)
class NpyFeature:
    """A precomputed array [V, dim], row = internal id, taken as it is."""

    source: Literal["npy"] = "npy"
    path: str = ""
    dim: int = 0  # 0 takes the file's, another is checked

    def check(self, key: str) -> None:
        """Refuse an impossible combination; ``key`` is where in the config this feature stands."""
        _require_path(self, key, self.path)
        require_at_least(self, key, 0, "dim")


@dataclass(frozen=True)
class TfidfFeature:
    """TF-IDF and a truncated SVD of the item text."""

    source: Literal["tfidf"] = "tfidf"
    dim: int = 0  # rank of the SVD
    text: tuple[str, ...] = ()  # parts of the item text; () takes data.text

    def check(self, key: str) -> None:
        require(self.dim > 0, f"{key} has no dim; source 'tfidf' needs the rank of its SVD, at least 1")


@dataclass(frozen=True)
class PixelsFeature:
    """The pixel descriptor (``shards.encoders.pixels``)."""

    source: Literal["pixels"] = "pixels"
    path: str = ""  # a Parquet table of item ids and images
    id: str = "item_id"  # its column of item ids
    image: str = "image"  # its column of images: encoded bytes, or file names relative to the table's folder

    def check(self, key: str) -> None:
        _require_path(self, key, self.path)


@dataclass(frozen=True)
class TransformersFeature:
    """A text encoder through ``transformers`` (paper section 5.3: BGE-large, the [CLS] token)."""

    source: Literal["transformers"] = "transformers"
    model: str = "BAAI/bge-large-en-v1.5"  # hub id, local folder, or package:NAME/PATH inside an installed package
    revision: str = ""  # of a hub model; "" takes its default branch
    pooling: Literal["cls", "mean"] = "cls"
    max_tokens: int = 512  # a longer text is cut
    batch_tokens: int = 16_384  # of one forward pass, padding included
    precision: Precision = "auto"
    text: tuple[str, ...] = ()  # parts of the item text; () takes data.text

    def check(self, key: str) -> None:
        require(bool(self.model), f"{key}.model is empty; expected a hub id, a folder or package:NAME/PATH")
        require_at_least(self, key, 3, "max_tokens")  # [CLS], a word, [SEP]
        require_at_least(self, key, self.max_tokens, "batch_tokens")


@dataclass(frozen=True)
class OpenClipFeature:
    """An image encoder through ``open_clip`` (paper section 5.3: SigLIP ViT-L/16 at 256 pixels)."""

    source: Literal["open_clip"] = "open_clip"
    path: str = ""  # a Parquet table of item ids and images
    id: str = "item_id"  # its column of item ids
    image: str = "image"  # its column of images: encoded bytes, or file names relative to the table's folder
    model: str = "ViT-L-16-SigLIP-256"  # a name that open_clip knows, or a JSON file of an open_clip model config
    pretrained: str = "webli"  # a tag that open_clip knows for the model, or a file of weights
    batch_images: int = 64  # of one forward pass
    workers: int = 2  # processes that decode; 0 decodes in the main process
    precision: Precision = "auto"

    def check(self, key: str) -> None:
        _require_path(self, key, self.path)
        for name in ("model", "pretrained"):
            require(bool(getattr(self, name)), f"{key}.{name} is empty; expected a name that open_clip knows or a file")
        require_at_least(self, key, 1, "batch_images")
        require_at_least(self, key, 0, "workers")


TextFeature = TfidfFeature | TransformersFeature
ImageFeature = PixelsFeature | OpenClipFeature
FeatureConfig = NpyFeature | TfidfFeature | PixelsFeature | TransformersFeature | OpenClipFeature


def _require_path(feature: NpyFeature | ImageFeature, key: str, path: str) -> None:
    require(bool(path), f"{key} has no path; source {feature.source!r} needs one")
