"""TF-IDF vectors: unit length, similar for similar texts, absent without one; and by the fit of another catalogue."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256
from fmrl_dist.config.parsing import build as build_config
from fmrl_dist.config.sections import Config
from fmrl_dist.data.store.manifest import fit_file
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders.fitted import tfidf
from shards.encoders.fitted.tfidf import TfidfFit
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.stores import ITEMS, as_older_version, read_items, tiny_config, tiny_values, write_raw
from tests.fixtures.text_model import random_texts
from tests.fixtures.training import refusal

TEMPLATE = {"text": ["{title}"], "text_separator": "\n"}


def test_tfidf_rows_are_unit_and_absent_where_there_is_no_text(tmp_path: Path) -> None:
    write_raw(tmp_path)
    titles = ["red lamp", "red lamp", None, "blue chair", "blue chair oak", "!"]
    pq.write_table(pa.table({"item_id": ITEMS, "title": titles}), tmp_path / "items.parquet")
    features = {"words": {"source": "tfidf", "dim": 2, "text": ["{title}"]}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    assert store.manifest.features[0].present == 4 and store.manifest.features[0].masked
    rows, mask = read_items(store, "words").astype(np.float64), read_items(store, "words.mask")
    assert mask.tolist() == [True, True, False, True, True, False]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), mask, atol=1e-3)
    assert rows[0] @ rows[1] > 0.999 and rows[3] @ rows[4] > 0.9 and abs(rows[0] @ rows[3]) < 0.1


def test_a_row_is_a_function_of_its_text_and_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: whatever is encoded beside it, and after the fit was written and read."""
    texts = random_texts(60)
    fit = TfidfFit.of_texts(texts, 5, TEMPLATE)
    rows, present = fit.encode(texts)
    again = TfidfFit.from_bytes(fit.to_bytes())
    assert again.template == TEMPLATE and again.terms == fit.terms == sorted(fit.terms)
    assert again.to_bytes() == fit.to_bytes()
    monkeypatch.setattr(tfidf, "BATCH_TEXTS", 7)
    others = ["", "unheard of words", *texts[::-1], "red"]
    found, known = again.encode(others)
    np.testing.assert_array_equal(found[2:-1][::-1], rows, strict=True)
    np.testing.assert_array_equal(known, [False, True, *present[::-1], True], strict=True)
    assert "of" in fit.terms and not found[0].any()
    np.testing.assert_allclose(np.linalg.norm(found[known].astype(np.float64), axis=1), 1, atol=1e-3)


def test_rows_are_those_of_scikit_learn() -> None:
    texts = random_texts(60)
    fit = TfidfFit.of_texts(texts, 5, TEMPLATE)
    matrix = tfidf.TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    dense = tfidf.TruncatedSVD(5, random_state=tfidf.SVD_SEED).fit(matrix).transform(matrix)
    expected = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(fit.encode(texts)[0].astype(np.float64), expected, rtol=0, atol=5e-4)


def test_a_fit_does_not_depend_on_the_number_of_threads() -> None:
    texts = [f"{text} word{i % 400} other{i % 77}" for i, text in enumerate(random_texts(900))]
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            fits.append(TfidfFit.of_texts(texts, 64, TEMPLATE).to_bytes())
    assert fits[0] == fits[1]


def words_config(root: Path, store: str, fit: str = "", **feature: Any) -> Config:
    """The tiny shop in ``root`` with TF-IDF of its titles."""
    words = {"source": "tfidf", "dim": 3, "text": ["{title}"], "fit": fit, **feature}
    return tiny_config(root / "raw", root / store, features={"words": words})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of raw tables and of a store, which must not be changed."""
    root = tmp_path_factory.mktemp("fitted")
    write_raw(root / "raw")
    build_store(words_config(root, "store"))
    return root


def test_a_store_keeps_its_fit(fitted: Path, tmp_path: Path) -> None:
    store = Store.open(fitted / "store")
    assert store.manifest.fits == {"words": file_sha256(store.path / "fit-words.safetensors")}
    assert store.manifest.fits["words"] == store.manifest.features[0].revision
    assert list(store_problems(store)) == []
    for damage, words in (
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "fit-words.safetensors is damaged: its sha256 is not"),
        (Path.unlink, "has no fit-words.safetensors; build the store again"),
    ):
        broken = Path(shutil.copytree(store.path, tmp_path / "broken", dirs_exist_ok=True))
        damage(broken / fit_file("words"))
        (problem,) = store_problems(Store.open(broken))
        assert words in problem
        with pytest.raises(UserError, match=words):
            build_store(words_config(fitted, "other", str(broken)))
    assert not (fitted / "other").exists()


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_same_catalogue_by_its_own_fit_is_the_same_store(fitted: Path, tmp_path: Path, prefix: str) -> None:
    config = words_config(fitted, "store", f"{prefix}{fitted / 'store'}")
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, path=str(tmp_path / "again")))
    again, _ = build_store(config)
    assert again.manifest.sha256 == Store.open(fitted / "store").manifest.sha256
    assert again.manifest.built_from is not None
    fit = again.manifest.fits["words"]
    assert again.manifest.built_from.files["data.features.words.fit"] == fit


def test_a_store_by_another_fit_is_not_kept(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one that was fitted anew where the config names a fit, or the other way round."""
    path = tmp_path / "config.yaml"
    path.write_text(words_config(fitted, "store").to_yaml())
    raw = Path(shutil.copytree(fitted / "raw", tmp_path / "raw"))
    titles = pa.array([f"Item number{i} of kind {'blue' * (i % 3)}" for i in range(len(ITEMS))])
    pq.write_table(pa.table({"item_id": ITEMS, "title": titles}), raw / "items.parquet")
    other, _ = build_store(words_config(tmp_path, "other"))
    line = refusal(main, "--config", path, "--keep", "--data.features.words.fit", other.path)
    assert "what data.features.words.fit names has the sha256 none, the config's " in line
    by_fit = ["--config", path, "--store.path", tmp_path / "by-fit"]
    main([*map(str, by_fit), "--data.features.words.fit", str(other.path)])
    assert ", the config's none; build it again" in refusal(main, *by_fit, "--keep")
    capsys.readouterr()
    main([*map(str, by_fit), "--data.features.words.fit", str(other.path), "--keep"])
    assert capsys.readouterr().out.startswith("kept ")


def rewritten(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        fit = TfidfFit.from_bytes(path.read_bytes())
        about = {"version": tfidf.FIT_VERSION, **fit.template}
        save_file(tensors | {name: change(tensors[name])}, path, {"fit": tfidf.json.dumps(about)})

    return spoil


def first_term_twice(terms: np.ndarray) -> np.ndarray:
    first, _, *others = terms.tobytes().split(b"\n")
    return np.frombuffer(b"\n".join([first, first, *others]), np.uint8)


BAD_FITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not safetensors": (lambda path: path.write_bytes(b"PK\3\4"), "is no fit"),
    "empty": (lambda path: path.write_bytes(b""), "is no fit"),
    "no metadata": (lambda path: save_file(load_file(path), path), "is no fit"),
    "metadata that is no JSON": (lambda path: save_file(load_file(path), path, {"fit": "{"}), "is no fit"),
    "metadata that is a list": (lambda path: save_file(load_file(path), path, {"fit": "[]"}), "is no fit"),
    "another version": (
        lambda path: save_file(load_file(path), path, {"fit": '{"version": 9}'}),
        "is a fit of version 9; expected 1",
    ),
    "a tensor less": (lambda path: save_file({"idf": np.ones(3)}, path, {"fit": '{"version": 1}'}), "is no fit"),
    "fewer numbers": (rewritten("idf", lambda idf: idf[1:]), "do not fit"),
    "a projection of float16": (rewritten("projection", lambda p: p.astype(np.float16)), "do not fit"),
    "NaN": (rewritten("projection", lambda p: p * np.float32("nan")), "not finite"),
    "terms twice": (rewritten("terms", first_term_twice), "do not fit"),
    "terms that are not UTF-8": (rewritten("terms", lambda t: t | np.uint8(128)), "is no fit"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_a_fit_that_cannot_be_read_is_refused(name: str, fitted: Path, tmp_path: Path) -> None:
    """Even if its hash is right."""
    spoil, words = BAD_FITS[name]
    store = Store(
        Store.open(shutil.copytree(fitted / "store", tmp_path / "bad")).files, Store.open(tmp_path / "bad").manifest
    )
    spoil(store.path / fit_file("words"))
    fits = {"words": file_sha256(store.path / fit_file("words"))}
    (store.path / "manifest.json").write_text(dataclasses.replace(store.manifest, fits=fits).to_json())
    with pytest.raises(UserError, match=words) as refused:
        build_store(words_config(fitted, "other", str(store.path)))
    assert "\n" not in str(refused.value) and not (fitted / "other").exists()


def test_fits_that_do_not_match_are_refused(fitted: Path, tmp_path: Path) -> None:
    store = str(fitted / "store")
    older = as_older_version(Path(shutil.copytree(store, tmp_path / "older")))
    (tmp_path / "empty").mkdir()
    for config, words in (
        (words_config(fitted, "other", store, dim=2), "has dim 3, the config 2; set data.features.words.dim to 3"),
        (words_config(fitted, "other", store, text=["{brand}"]), "was fitted to texts with text .* make them the same"),
        (words_config(fitted, "other", str(older.path)), "keeps no fit of a feature 'words'"),
        (words_config(fitted, "other", str(tmp_path / "empty")), "is no store, run or export with a fit"),
        (words_config(fitted, "other", str(tmp_path / "nowhere")), "is no store, run or export with a fit"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            build_store(config)
        assert "\n" not in str(refused.value)
    assert not (fitted / "other").exists()


def test_the_password_of_a_fits_url_is_not_recorded(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, tmp_path / "store")
    values["data"]["features"] = {
        "words": {"source": "tfidf", "dim": 3, "fit": "https://me:secret@host/store?key=secret"}
    }
    config: Config = build_config(Config, values, "")
    assert "secret" not in config.to_yaml() and "https://***@host/store" in config.to_yaml()
