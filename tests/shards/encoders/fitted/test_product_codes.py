"""Codes of another feature: the nearest centroids, exact in float16, the same by any threads, by the fit of another."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256
from fmrl_dist.config.parsing import build as build_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import fit_file
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.baselines import possible_baselines
from shards.encoders.fitted import product_codes
from shards.encoders.fitted.product_codes import ProductFit
from shards.store.builder import build_store
from shards.store.problems import store_problems
from shards.store_page.near_duplicates import near_duplicates
from tests.fixtures.optional import skip_module_without
from tests.fixtures.stores import read_items, tiny_config, tiny_values, write_raw

skip_module_without("faiss", "the extra ann")

OF = {"name": "vector", "recipe": {"source": "npy"}, "revision": ""}


def random_rows(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float16)


def plain_codes(fit: ProductFit, rows: np.ndarray) -> np.ndarray:
    """Row by row and part by part, 1 … K."""
    parts, _, width = fit.centroids.shape
    found = np.zeros((len(rows), parts))
    for n, row in enumerate(rows.astype(np.float64)):
        turned = fit.rotation.astype(np.float64) @ row
        for p in range(parts):
            away = ((fit.centroids[p].astype(np.float64) - turned[p * width : (p + 1) * width]) ** 2).sum(1)
            found[n, p] = 1 + away.argmin()
    return found


def test_codes_name_the_nearest_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is coded beside a row, and after the fit was written and read."""
    rows = random_rows(200, 12)
    fit = ProductFit.of_rows(rows, parts=3, codes=16, of=OF)
    np.testing.assert_allclose(fit.rotation @ fit.rotation.T, np.eye(12), atol=1e-5)
    codes = fit.encode(rows)
    assert codes.dtype == np.float16 and codes.shape == (200, 3)
    np.testing.assert_array_equal(codes, plain_codes(fit, rows))
    assert {len(np.unique(column)) for column in codes.T} == {16}
    monkeypatch.setattr(product_codes, "CODED_AT_ONCE", 7)
    again = ProductFit.from_bytes(fit.to_bytes())
    np.testing.assert_array_equal(again.encode(rows[::-1])[::-1], codes)
    assert again.to_bytes() == fit.to_bytes() and again.of == OF


def test_the_rotation_keeps_more_than_none() -> None:
    """Of rows whose channels go together across the parts."""
    import faiss

    mixed = (random_rows(600, 4).astype(np.float32) @ np.random.default_rng(1).standard_normal((4, 8))).astype(
        np.float16
    )
    fit = ProductFit.of_rows(mixed, parts=4, codes=8, of=OF)
    rows, chosen = mixed.astype(np.float32), fit.encode(mixed).astype(int) - 1
    kept = np.concatenate([fit.centroids[p][chosen[:, p]] for p in range(4)], 1) @ fit.rotation
    plain: Any = faiss.ProductQuantizer(8, 4, 3)
    plain.cp.min_points_per_centroid = 1
    plain.train(rows)
    unturned = plain.decode(plain.compute_codes(rows))
    assert np.square(kept - rows).mean() < 0.8 * np.square(unturned - rows).mean()


def test_the_largest_number_of_codes_is_exact() -> None:
    rows = random_rows(2100, 2)
    fit = ProductFit.of_rows(rows, parts=1, codes=2048, of=OF)
    codes = fit.encode(rows)
    assert codes.max() > 2040 and codes.min() >= 1 and len(np.unique(codes)) > 1900
    np.testing.assert_array_equal(codes[:50], plain_codes(fit, rows[:50]))


def test_a_fit_does_not_depend_on_the_number_of_threads() -> None:
    import faiss

    rows, fits, before = random_rows(900, 16), [], faiss.omp_get_max_threads()
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        with threadpool_limits(threads):
            fits.append(ProductFit.of_rows(rows, 4, 16, OF).to_bytes())
        assert faiss.omp_get_max_threads() == threads
    faiss.omp_set_num_threads(before)
    assert fits[0] == fits[1]


def codes_config(root: Path, store: str, of: str = "vector", **codes: Any) -> Config:
    """The tiny shop in ``root`` with codes of one of its features."""
    features = {
        "codes": {"source": "pq", "of": of, "parts": 2, "codes": 2, **codes},
        "vector": {"source": "npy", "path": "vectors.npy"},
        "words": {"source": "tfidf", "dim": 2, "text": ["{title}"]},
    }
    return tiny_config(root / "raw", root / store, features=features)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of raw tables, where an item lacks the array, and of a store, which must not be changed."""
    root = tmp_path_factory.mktemp("coded")
    rows = write_raw(root / "raw")
    rows[3] = 0
    np.save(root / "raw" / "vectors.npy", rows)
    build_store(codes_config(root, "store"))
    return root


def test_a_store_keeps_codes_and_their_fit(coded: Path) -> None:
    store = Store.open(coded / "store")
    feature = store.manifest.features[0]
    assert [one.name for one in store.manifest.features] == ["codes", "vector", "words"]
    assert (feature.dim, feature.present, feature.masked, feature.encoder, feature.num_codes) == (2, 5, True, "opq", 2)
    assert feature.recipe == {"source": "pq", "pq": 1, "of": "vector", "dim": 4, "parts": 2, "codes": 2}
    assert store.manifest.fits["codes"] == file_sha256(store.path / "fit-codes.safetensors") == feature.revision
    fit = ProductFit.from_bytes(store.read_fit("codes"))
    expected = plain_codes(fit, read_items(store, "vector"))
    expected[3] = 0
    np.testing.assert_array_equal(read_items(store, "codes"), expected)
    assert read_items(store, "codes.mask").tolist() == [True, True, True, False, True, True]
    assert list(store_problems(store)) == []
    assert store.manifest.built_from is not None and "faiss-cpu" in store.manifest.built_from.made_with


def test_codes_are_no_vectors_to_whoever_compares_them(coded: Path) -> None:
    store = Store.open(coded / "store")
    assert possible_baselines(store, each_feature=True) == (
        *("popularity", "cosine", "cosine:vector", "cosine:words"),
        "item_knn",
    )
    assert [found.feature for found in near_duplicates(store)] == ["vector", "words"]


def test_by_the_fit_of_another_store(coded: Path, tmp_path: Path) -> None:
    """The same rows get the same codes, in a catalogue whose own fit would be another."""
    shutil.copytree(coded / "raw", tmp_path / "raw")
    rows = np.load(tmp_path / "raw" / "vectors.npy")
    rows[4:] = 9 - rows[4:]
    np.save(tmp_path / "raw" / "vectors.npy", rows)
    store, _ = build_store(codes_config(tmp_path, "by-fit", fit=str(coded / "store")))
    own, _ = build_store(codes_config(tmp_path, "own"))
    first = Store.open(coded / "store")
    assert store.manifest.fits["codes"] == first.manifest.fits["codes"] != own.manifest.fits["codes"]
    np.testing.assert_array_equal(read_items(store, "codes")[:4], read_items(first, "codes")[:4])
    assert store.manifest.built_from is not None
    assert store.manifest.built_from.files["data.features.codes.fit"] == first.manifest.fits["codes"]


def test_fits_that_do_not_match_are_refused(coded: Path, tmp_path: Path) -> None:
    fit = str(coded / "store")
    (tmp_path / "empty").mkdir()
    for config, words in (
        (codes_config(coded, "other", fit=fit, parts=4), "has 2 parts of 2 codes, the config 4 of 2; make them"),
        (codes_config(coded, "other", fit=fit, codes=4), "has 2 parts of 2 codes, the config 2 of 4; make them"),
        (codes_config(coded, "other", fit=fit, of="words"), "was fitted to a feature with name 'vector', the config's"),
        (codes_config(coded, "other", fit=str(tmp_path / "empty")), "is no store, run or export with a fit"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            build_store(config)
        assert "\n" not in str(refused.value)
    assert not (coded / "other").exists()


def rewritten(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        about = {"version": product_codes.FIT_VERSION, "of": OF}
        save_file(tensors | {name: np.ascontiguousarray(change(tensors[name]))}, path, {"fit": json.dumps(about)})

    return spoil


BAD_FITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not safetensors": (lambda path: path.write_bytes(b"PK\3\4"), "is no fit"),
    "no metadata": (lambda path: save_file(load_file(path), path), "is no fit"),
    "metadata that is a list": (lambda path: save_file(load_file(path), path, {"fit": "[]"}), "is no fit"),
    "another version": (
        lambda path: save_file(load_file(path), path, {"fit": '{"version": 9, "of": {}}'}),
        "is a fit of version 9; expected 1",
    ),
    "a centroid less": (rewritten("centroids", lambda c: c[:, :, :1]), "do not fit"),
    "a rotation of float16": (rewritten("rotation", lambda r: r.astype(np.float16)), "do not fit"),
    "NaN": (rewritten("centroids", lambda c: c * np.float32("nan")), "not finite"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_a_fit_that_cannot_be_read_is_refused(name: str, coded: Path, tmp_path: Path) -> None:
    """Even if its hash is right."""
    spoil, words = BAD_FITS[name]
    store = Store.open(shutil.copytree(coded / "store", tmp_path / "bad"))
    spoil(store.path / fit_file("codes"))
    fits = store.manifest.fits | {"codes": file_sha256(store.path / fit_file("codes"))}
    (store.path / "manifest.json").write_text(dataclasses.replace(store.manifest, fits=fits).to_json())
    with pytest.raises(UserError, match=words) as refused:
        build_store(codes_config(coded, "other", fit=str(store.path)))
    assert "\n" not in str(refused.value) and not (coded / "other").exists()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"parts": 3}, "feature 'codes': its parts are 3, which does not divide the 4 channels of 'vector'"),
        ({"codes": 8}, "feature 'codes': its codes are 8, but only 5 items have 'vector' to fit them to"),
        ({"codes": 12}, "data.features.codes.codes is 12; expected a power of 2, at most 2048"),
        ({"codes": 4096}, "data.features.codes.codes is 4096; expected 2 <= value <= 2048"),
        ({"of": ""}, "data.features.codes.of is empty; source 'pq' needs the feature that it quantises"),
        ({"of": "image"}, "of is 'image'; expected another feature that holds vectors: vector, words"),
        ({"of": "codes"}, "of is 'codes'; expected another feature that holds vectors: vector, words"),
    ],
)
def test_what_gives_no_codes_is_refused(codes: dict[str, Any], message: str, coded: Path) -> None:
    with pytest.raises(UserError) as refused:
        build_store(codes_config(coded, "other", **codes))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (coded / "other").exists()


def test_codes_of_nothing_else(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, tmp_path / "store")
    values["data"]["features"] = {"codes": {"source": "pq", "of": "vector"}}
    with pytest.raises(UserError, match="expected another feature that holds vectors: there is none"):
        build_config(Config, values, "")


def test_a_fit_needs_faiss_and_codes_do_not(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(coded / "raw", tmp_path / "raw")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="feature 'codes': it needs faiss; install it with pip install -e "):
        build_store(codes_config(tmp_path, "own"))
    store, _ = build_store(codes_config(tmp_path, "by-fit", fit=str(coded / "store")))
    expected = read_items(Store.open(coded / "store"), "codes")
    np.testing.assert_array_equal(read_items(store, "codes"), expected)
