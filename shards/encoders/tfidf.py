"""Latent semantic vectors of the item texts: TF-IDF, then a truncated SVD (Deerwester et al. 1990). Needs no weights.

Holds a sparse matrix of items by at most ``MAX_TERMS`` terms in memory. Equal texts give equal vectors at the same
versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import sklearn
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from fmrl_dist.base.errors import UserError
from shards.encoders.item_feature import ItemFeature
from shards.encoders.item_text import ItemTexts

SVD_SEED = 0
MAX_TERMS = 100_000


def _digest(texts: Sequence[str]) -> str:
    """Names what the axes were fitted on: the vectors of another catalogue do not compare with these."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(data := text.encode()).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def encode_texts(name: str, dim: int, items: ItemTexts) -> ItemFeature:
    """L2-normalised vectors of the texts, fitted on the items that have one.

    An item whose text holds no term is absent.

    Raises:
        UserError: no words at all, or fewer items or terms than ``dim``.
    """
    chosen = np.flatnonzero(items.present)
    if len(chosen) == 0:
        raise UserError(f"feature {name!r}: no item has a text; check data.text against the item table")
    try:
        terms = TfidfVectorizer(sublinear_tf=True, max_features=MAX_TERMS).fit_transform(
            [items.texts[i] for i in chosen]
        )
    except ValueError:  # scikit-learn: "empty vocabulary"
        raise UserError(f"feature {name!r}: the item texts hold no words; check data.text") from None
    if dim > min(terms.shape):
        raise UserError(
            f"data.features.{name}.dim is {dim} but the texts give a matrix of {terms.shape[0]} items and "
            f"{terms.shape[1]} terms; expected at most {min(terms.shape)}"
        )
    dense = TruncatedSVD(dim, random_state=SVD_SEED).fit_transform(terms)
    norms = np.linalg.norm(dense, axis=1, keepdims=True)
    rows = np.zeros((len(items.texts), dim), np.float16)
    rows[chosen] = dense / np.where(norms > 0, norms, 1)
    present = np.zeros(len(rows), bool)
    present[chosen] = norms[:, 0] > 0
    revision = f"scikit-learn {sklearn.__version__}, fitted on {_digest([items.texts[i] for i in chosen])}"
    return ItemFeature(name, rows, present, encoder="tfidf+svd", revision=revision)
