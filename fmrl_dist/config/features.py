"""Where a frozen item feature comes from: one dataclass per ``data.features.<name>.source``.

The three sources without pretrained weights (``npy``, ``tfidf``, ``pixels``), the two encoders (``transformers``,
``open_clip``) and the codes of another feature (``pq``) each have the keys that they read and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fmrl_dist.base.errors import require
from fmrl_dist.config.parsing import Limits, NonNegativeInt, PositiveInt

MAX_CODES = 2048  # whole numbers up to there are exact in float16, in which a store keeps them
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class NpyFeature:
    """A precomputed array [V, dim], row = internal id, taken as it is."""

    source: Literal["npy"] = "npy"  # a precomputed array
    path: str = ""  # .npy file, relative to data.root; required
    dim: NonNegativeInt = 0  # columns of the array, checked; 0: as many as the file has

    def check(self, key: str) -> None:
        """Refuse an impossible combination; ``key`` is this feature's place in the config."""
        _require_path(self, key, self.path)


@dataclass(frozen=True)
class TfidfFeature:
    """TF-IDF and a truncated SVD of the item text. Needs no pretrained weights."""

    source: Literal["tfidf"] = "tfidf"  # TF-IDF and SVD
    dim: NonNegativeInt = 0  # dimensions that the SVD keeps, at least 1; required
    text: tuple[str, ...] = ()  # parts of the item text; [] for data.text
    # store (folder or URL), run or export whose fit of this feature is taken, so that its axes are theirs; "": fit anew
    fit: str = ""

    def check(self, key: str) -> None:
        require(self.dim > 0, f"{key} has no dim; source 'tfidf' needs the dimensions that its SVD keeps, at least 1")


@dataclass(frozen=True)
class PixelsFeature:
    """A descriptor of an image's colour, layout and edges (``shards.encoders.pixels``). Needs no pretrained weights."""

    source: Literal["pixels"] = "pixels"  # the pixel descriptor
    path: str = ""  # Parquet file of item ids and images, relative to data.root; required
    id: str = "item_id"  # its column of item ids
    image: str = "image"  # its column of images: encoded bytes, or file names relative to the table's folder

    def check(self, key: str) -> None:
        _require_path(self, key, self.path)


@dataclass(frozen=True)
class TransformersFeature:
    """A text encoder through ``transformers`` (paper section 5.3: BGE-large, the [CLS] token)."""

    source: Literal["transformers"] = "transformers"  # a pretrained text encoder
    model: str = "BAAI/bge-large-en-v1.5"  # hub id, local folder, or package:NAME/PATH inside an installed package
    revision: str = ""  # revision of a hub model; "" for its default branch
    pooling: Literal["cls", "mean"] = "cls"  # from token states to a row: the first token's, or the mean
    max_tokens: Annotated[int, Limits(3)] = 512  # a longer text is cut; 3 hold [CLS], a word and [SEP]
    batch_tokens: int = 16_384  # tokens of one forward pass, padding included; at least max_tokens
    precision: Precision = "auto"  # auto: bf16 where the device multiplies it fast, else fp32; the manifest says which
    text: tuple[str, ...] = ()  # parts of the item text; [] for data.text

    def check(self, key: str) -> None:
        require(bool(self.model), f"{key}.model is empty; expected a hub id, a folder or package:NAME/PATH")
        require(
            self.batch_tokens >= self.max_tokens,
            f"{key}.batch_tokens is {self.batch_tokens}; expected at least {self.max_tokens}",
        )


@dataclass(frozen=True)
class OpenClipFeature:
    """An image encoder through ``open_clip`` (paper section 5.3: SigLIP ViT-L/16 at 256 pixels)."""

    source: Literal["open_clip"] = "open_clip"  # a pretrained image encoder
    path: str = ""  # Parquet file of item ids and images, relative to data.root; required
    id: str = "item_id"  # its column of item ids
    image: str = "image"  # its column of images: encoded bytes, or file names relative to the table's folder
    model: str = "ViT-L-16-SigLIP-256"  # a name that open_clip knows, or a JSON file of an open_clip model config
    pretrained: str = "webli"  # a tag that open_clip knows for the model, or a file of weights
    batch_images: PositiveInt = 64  # images of one forward pass
    workers: NonNegativeInt = 2  # processes that decode; 0: decode in the main process
    precision: Precision = "auto"  # auto: bf16 where the device multiplies it fast, else fp32; the manifest says which

    def check(self, key: str) -> None:
        _require_path(self, key, self.path)
        for name in ("model", "pretrained"):
            require(bool(getattr(self, name)), f"{key}.{name} is empty; expected a name that open_clip knows or a file")


@dataclass(frozen=True)
class PqFeature:
    """Codes of another feature, by optimised product quantisation, for ``model.item_encoder: vqrec``."""

    source: Literal["pq"] = "pq"  # product quantisation
    of: str = ""  # the feature whose vectors are quantised; required
    parts: PositiveInt = 32  # equal parts that a rotated vector is cut into, a code each; they divide its dim
    codes: Annotated[int, Limits(2, MAX_CODES)] = 256  # numbers that a code can be: a power of 2
    # store (folder or URL), run or export whose fit of this feature is taken, so that its codes mean the same; "": fit
    # anew, which needs as many items as codes
    fit: str = ""

    def check(self, key: str) -> None:
        require(bool(self.of), f"{key}.of is empty; source 'pq' needs the feature that it quantises")
        require(
            self.codes & (self.codes - 1) == 0,
            f"{key}.codes is {self.codes}; expected a power of 2, at most {MAX_CODES}",
        )


TextFeature = TfidfFeature | TransformersFeature
ImageFeature = PixelsFeature | OpenClipFeature
FeatureConfig = NpyFeature | TfidfFeature | PixelsFeature | TransformersFeature | OpenClipFeature | PqFeature


def _require_path(feature: NpyFeature | ImageFeature, key: str, path: str) -> None:
    require(bool(path), f"{key} has no path; source {feature.source!r} needs one")
