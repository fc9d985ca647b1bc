"""Latent semantic vectors of the item texts: TF-IDF, then a truncated SVD (Deerwester et al. 1990). Needs no weights.

The axes are those of the catalogue that they were fitted on. The fit is a file of the store, so that another catalogue
can be encoded on the same axes: equal texts then give equal bytes. It is safetensors:

    terms        uint8, UTF-8: the T terms, sorted, one a line
    idf          float64 [T], inverse document frequency of each term
    projection   float32 [T, dim], right singular vectors
    metadata     "fit": JSON of ``version`` and the template of the texts, ``text`` and ``text_separator``

Fitting holds a sparse matrix of items by at most ``MAX_TERMS`` terms in memory, encoding only that of a batch of items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.urls import hide_credentials
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import TfidfFeature
from shards.encoders.fitted.stored_fit import read_fit
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts

FIT_VERSION = 1  # raise it when a text gives other rows: neither fits nor stores of another version are taken
SVD_SEED = 0
MAX_TERMS = 100_000
BATCH_TEXTS = 8192
# All that says how a text becomes terms and weights, so that another version's defaults change nothing.
ANALYSIS: dict[str, Any] = {
    "lowercase": True,
    "token_pattern": r"(?u)\b\w\w+\b",
    "ngram_range": (1, 1),
    "strip_accents": None,
    "stop_words": None,
    "norm": "l2",
    "use_idf": True,
    "smooth_idf": True,
    "sublinear_tf": True,
}


@dataclass(frozen=True)
class TfidfFit:
    """What texts are encoded with; ``T`` terms."""

    terms: list[str]  # sorted
    idf: np.ndarray  # float64 [T]
    projection: np.ndarray  # float32 [T, dim]
    template: dict[str, Any]  # text, text_separator: how an item's text was made

    @classmethod
    def of_texts(cls, texts: Sequence[str], dim: int, template: dict[str, Any]) -> TfidfFit:
        """Fitted on ``texts``.

        Raises:
            ValueError: fewer texts or terms than ``dim``, or no term at all; says how many there are.
        """
        vectorizer = TfidfVectorizer(max_features=MAX_TERMS, **ANALYSIS)
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError:  # scikit-learn: "empty vocabulary"
            raise ValueError("the item texts hold no words; check data.text") from None
        if dim > min(matrix.shape):
            raise ValueError(
                f"its dim is {dim} but the texts give a matrix of {matrix.shape[0]} items and {matrix.shape[1]} terms; "
                f"expected at most {min(matrix.shape)}"
            )
        with threadpool_limits(1):  # so that the fit's last bits, and its hash, do not depend on the number of threads
            svd = TruncatedSVD(dim, random_state=SVD_SEED).fit(matrix)
        terms = [str(term) for term in vectorizer.get_feature_names_out()]
        return cls(terms, vectorizer.idf_, np.ascontiguousarray(svd.components_.T, np.float32), template)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """L2-normalised rows float16 [n, dim], each a function of its text alone, and bool [n], true where not zero."""
        vectorizer = TfidfVectorizer(vocabulary={term: i for i, term in enumerate(self.terms)}, **ANALYSIS)
        vectorizer.idf_ = self.idf
        projection = self.projection.astype(np.float64)
        rows, present = np.zeros((len(texts), projection.shape[1]), np.float16), np.zeros(len(texts), bool)
        for low in range(0, len(texts), BATCH_TEXTS):
            batch = slice(low, low + BATCH_TEXTS)
            dense = vectorizer.transform(texts[batch]) @ projection
            norms = np.sqrt((dense * dense).sum(axis=1))
            rows[batch] = dense / np.where(norms > 0, norms, 1)[:, None]
            present[batch] = norms > 0
        return rows, present

    def to_bytes(self) -> bytes:
        terms = np.frombuffer("\n".join(self.terms).encode(), np.uint8)
        about = {"version": FIT_VERSION, **self.template}
        tensors = {"terms": terms, "idf": self.idf, "projection": self.projection}
        return save(tensors, {"fit": json.dumps(about, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> TfidfFit:
        """What :meth:`to_bytes` wrote.

        Raises:
            ValueError: something else, or another version.
        """
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["fit"])
            terms, idf, projection = tensors["terms"], tensors["idf"], tensors["projection"]
            words = terms.tobytes().decode().split("\n")
            version = about.pop("version")
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is no fit ({' '.join(str(error).split())[:200]})") from None
        if version != FIT_VERSION:
            raise ValueError(f"is a fit of version {shown(version)}; expected {FIT_VERSION}")
        right_types = (terms.dtype, idf.dtype, projection.dtype) == (np.uint8, np.float64, np.float32)
        right_shapes = idf.shape == (len(words),) and projection.ndim == 2 and len(projection) == len(words)
        if not right_types or not right_shapes or len(set(words)) < len(words):
            raise ValueError(
                f"is no fit (terms, idf {list(idf.shape)}, projection {list(projection.shape)} do not fit)"
            )
        if not (np.isfinite(idf).all() and np.isfinite(projection).all()):
            raise ValueError("holds numbers that are not finite")
        return cls(words, idf, projection, about)


def encode_texts(
    name: str, config: TfidfFeature, items: ItemTexts, template: dict[str, Any], fitted: np.ndarray | None = None
) -> ItemFeature:
    """L2-normalised vectors of the texts, by ``config.fit`` or a fit to the items that have a text.

    An item whose text holds no term of the fit is absent.

    Args:
        name: of the feature.
        config: its settings.
        items: texts of all items.
        template: text, text_separator: how these texts were made.
        fitted: which items to fit to, bool [V]; None: all.

    Raises:
        UserError: no words at all, fewer items or terms than ``config.dim``, or a fit that cannot be read, or has
            another dim or template.
    """
    chosen = np.flatnonzero(items.present)
    require(len(chosen) > 0, f"feature {name!r}: no item has a text; check data.text against the item table")
    texts = [items.texts[i] for i in chosen]
    if config.fit:
        data = read_fit(name, config.fit)
        fit = _checked(name, config, data, template)
    else:
        try:
            sample = texts if fitted is None else [items.texts[i] for i in chosen[fitted[chosen]]]
            fit = TfidfFit.of_texts(sample, config.dim, template)
        except ValueError as error:
            raise UserError(f"feature {name!r}: {error}") from None
        data = fit.to_bytes()
    rows = np.zeros((len(items.texts), config.dim), np.float16)
    present = np.zeros(len(rows), bool)
    rows[chosen], present[chosen] = fit.encode(texts)
    revision = hashlib.sha256(data).hexdigest()
    return ItemFeature(name, rows, present, encoder="tfidf+svd", revision=revision, recipe={}, fit=data)


def _checked(name: str, config: TfidfFeature, data: bytes, template: dict[str, Any]) -> TfidfFit:
    """The fit in ``data``, if it is one of this dim and for such texts."""
    where = f"feature {name!r}: what data.features.{name}.fit names, {hide_credentials(config.fit)},"
    try:
        fit = TfidfFit.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{where} {error}; name a store, run or export of this version") from None
    dim = fit.projection.shape[1]
    require(dim == config.dim, f"{where} has dim {dim}, the config {config.dim}; set data.features.{name}.dim to {dim}")
    for key, value in template.items():
        require(
            fit.template.get(key) == value,
            f"{where} was fitted to texts with {key} {shown(fit.template.get(key))}, the config has {shown(value)}; "
            "make them the same",
        )
    return fit
