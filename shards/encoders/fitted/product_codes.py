"""Codes of a feature's rows by optimised product quantisation (Jégou et al. 2011, Ge et al. 2013), as VQRec reads them.

A row is turned by a rotation, cut into P equal parts, and of each part the nearest of K centroids is kept: P numbers
from 1 to K, 0 for an item that lacks the feature. Rotation and centroids are fitted by faiss, to at most ``MAX_ROWS``
rows; coding needs NumPy alone. The codes mean nothing without their fit, a file of the store. It is safetensors:

    rotation     float32 [dim, dim], orthogonal: a row x becomes rotation · x
    centroids    float32 [P, K, dim / P]
    metadata     "fit": JSON of ``version`` and ``of``, what made the rows: name, encoder, revision, recipe
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.urls import hide_credentials
from fmrl_dist.base.yaml_text import shown
from fmrl_dist.config.features import PqFeature
from shards.encoders.fitted.stored_fit import read_fit
from shards.encoders.item_feature import ItemFeature

FIT_VERSION = 1  # raise it when a row gets other codes: neither fits nor stores of another version are taken
SEED = 0
MAX_ROWS = 65_536  # that a fit is made of
CODED_AT_ONCE = 4096  # rows


@dataclass(frozen=True)
class ProductFit:
    """What rows are coded with."""

    rotation: np.ndarray  # float32 [dim, dim]
    centroids: np.ndarray  # float32 [P, K, dim / P]
    of: dict[str, Any]  # what made the rows

    @classmethod
    def of_rows(cls, rows: np.ndarray, parts: int, codes: int, of: dict[str, Any]) -> ProductFit:
        """Fitted to ``rows`` [n, dim], or to a random sample of them.

        Raises:
            ValueError: fewer rows than ``codes``, or ``parts`` does not divide dim; says what there is.
        """
        dim = rows.shape[1]
        if dim % parts:
            raise ValueError(f"its parts are {parts}, which does not divide the {dim} channels of {of['name']!r}")
        if len(rows) < codes:
            raise ValueError(f"its codes are {codes}, but only {len(rows)} items have {of['name']!r} to fit them to")
        chosen = np.sort(np.random.default_rng(SEED).permutation(len(rows))[:MAX_ROWS])
        sample = np.ascontiguousarray(rows[chosen], np.float32)
        rotation, centroids = _fit(sample, parts, codes)
        return cls(rotation, centroids, of)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Codes 1 … K, float16 [n, P], each a function of its row alone; of equally near centroids the first."""
        parts, codes, width = self.centroids.shape
        centroids = self.centroids.astype(np.float64)
        lengths = (centroids**2).sum(2)  # [P, K]
        result = np.empty((len(rows), parts), np.float16)
        for low in range(0, len(rows), CODED_AT_ONCE):
            batch = slice(low, low + CODED_AT_ONCE)
            rotated = (rows[batch].astype(np.float64) @ self.rotation.T).reshape(-1, parts, width)
            for part in range(parts):
                distances = lengths[part] - 2 * rotated[:, part] @ centroids[part].T
                result[batch, part] = 1 + distances.argmin(1)
        return result

    def to_bytes(self) -> bytes:
        about = {"version": FIT_VERSION, "of": self.of}
        return save(
            {"rotation": self.rotation, "centroids": self.centroids}, {"fit": json.dumps(about, sort_keys=True)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> ProductFit:
        """What :meth:`to_bytes` wrote.

        Raises:
            ValueError: something else, or another version.
        """
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["fit"])
            rotation, centroids = tensors["rotation"], tensors["centroids"]
            version, of = about["version"], dict(about["of"])
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"is no fit ({' '.join(str(error).split())[:200]})") from None
        if version != FIT_VERSION:
            raise ValueError(f"is a fit of version {shown(version)}; expected {FIT_VERSION}")
        is_whole = (
            rotation.dtype == centroids.dtype == np.float32
            and centroids.ndim == 3
            and rotation.shape == (centroids.shape[0] * centroids.shape[2],) * 2
        )
        if not is_whole:
            raise ValueError(
                f"is no fit (rotation {list(rotation.shape)}, centroids {list(centroids.shape)} do not fit)"
            )
        if not (np.isfinite(rotation).all() and np.isfinite(centroids).all()):
            raise ValueError("holds numbers that are not finite")
        return cls(rotation, centroids, of)


def _fit(sample: np.ndarray, parts: int, codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and centroids of float32 rows [n, dim], by one thread, whose last bits do not depend on the machine."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise ValueError("it needs faiss; install it with pip install -e '.[ann]'") from None
    dim, bits = sample.shape[1], codes.bit_length() - 1
    quantizer, while_turning = (faiss.ProductQuantizer(dim, parts, bits) for _ in range(2))
    for one in (quantizer, while_turning):
        one.cp.seed, one.cp.min_points_per_centroid = SEED, 1  # 1: no warning, whoever calls has counted the rows
    turn = faiss.OPQMatrix(dim, parts)
    turn.pq = while_turning  # with as many centroids as are wanted, not the usual 256
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            turn.train(sample)
            quantizer.train(turn.apply(sample))
    finally:
        faiss.omp_set_num_threads(threads)
    rotation = faiss.vector_to_array(turn.A).reshape(dim, dim).copy()
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(parts, codes, dim // parts).copy()
    return rotation, centroids


def encode_rows(name: str, config: PqFeature, base: ItemFeature, fitted: np.ndarray | None = None) -> ItemFeature:
    """Codes of the rows of ``base``, by ``config.fit`` or a fit to the items that have it.

    Args:
        name: of the feature.
        config: its settings.
        base: the feature that is quantised.
        fitted: which items to fit to, bool [V]; None: all.

    Raises:
        UserError: too few items, parts that do not divide the dim, faiss is missing, or a fit that cannot be read, or
            is of another feature or has other settings.
    """
    of = made_by(base)
    chosen = np.flatnonzero(base.present)
    if config.fit:
        data = read_fit(name, config.fit)
        fit = _checked(name, config, data, of)
    else:
        to_fit = chosen if fitted is None else chosen[fitted[chosen]]
        try:
            fit = ProductFit.of_rows(_rows(base, to_fit), config.parts, config.codes, of)
        except ValueError as error:
            raise UserError(f"feature {name!r}: {error}") from None
        data = fit.to_bytes()
    rows = np.zeros((len(base.present), config.parts), np.float16)
    for low in range(0, len(chosen), CODED_AT_ONCE):
        batch = chosen[low : low + CODED_AT_ONCE]
        rows[batch] = fit.encode(_rows(base, batch))
    dim = fit.rotation.shape[1]
    recipe = {"of": config.of, "dim": dim, "parts": config.parts, "codes": config.codes}
    revision = hashlib.sha256(data).hexdigest()
    return ItemFeature(name, rows, base.present, encoder="opq", revision=revision, recipe=recipe, fit=data)


def made_by(feature: ItemFeature) -> dict[str, Any]:
    """What a row of a feature depends on, as a fit to it records it; of an array, which is another for each catalogue,
    no revision."""
    is_array = feature.recipe.get("source") == "npy"
    about = {"name": feature.name, "recipe": feature.recipe, "revision": "" if is_array else feature.revision}
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def _rows(feature: ItemFeature, items: np.ndarray) -> np.ndarray:
    """Rows float16 [n, dim] of some items, as the store has them."""
    return feature.block_fields(items)[feature.name]


def _checked(name: str, config: PqFeature, data: bytes, of: Mapping[str, Any]) -> ProductFit:
    """The fit in ``data``, if it is one of these settings and rows."""
    where = f"feature {name!r}: what data.features.{name}.fit names, {hide_credentials(config.fit)},"
    try:
        fit = ProductFit.from_bytes(data)
    except ValueError as error:
        raise UserError(f"{where} {error}; name a store, run or export of this version") from None
    parts, codes, _ = fit.centroids.shape
    require(
        (parts, codes) == (config.parts, config.codes),
        f"{where} has {parts} parts of {codes} codes, the config {config.parts} of {config.codes}; make them the same",
    )
    for key, value in of.items():
        require(
            fit.of.get(key) == value,
            f"{where} was fitted to a feature with {key} {shown(fit.of.get(key))}, the config's has {shown(value)}; "
            "make them the same, a fitted feature by its own fit",
        )
    return fit
