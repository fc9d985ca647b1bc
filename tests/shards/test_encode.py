"""New items are encoded as an export says, or not at all. What is encoded is compared in tests/deploy/catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from fmrl_dist.base.errors import UserError
from shards import encode
from tests.fixtures.stores import FEATURE_DIM, write_items
from tests.fixtures.training import run_here

NPY = {"encoder": "npy", "revision": "a", "recipe": {"source": "npy"}}
PIXELS = {"encoder": "pixels", "revision": "2", "recipe": {"source": "pixels", "pixels": "2", "decoding": 2}}
TEXT = {"source": "tfidf", "tfidf": 1, "text": ["Title: {title}"], "text_separator": " "}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Three new items with an array."""
    write_items(tmp_path / "items.parquet", ["x", "y", "z"])
    np.save(tmp_path / "vectors.npy", np.eye(3, FEATURE_DIM, dtype=np.float32))
    return tmp_path


def write_config(folder: Path, dims: dict[str, int], encoders: dict[str, Any] | None) -> Path:
    """What is read of an export."""
    export = folder / "export"
    export.mkdir(exist_ok=True)
    config = {"model": {"feature_dims": dims}} | ({} if encoders is None else {"feature_encoders": encoders})
    (export / "config.json").write_text(json.dumps(config))
    return export


def encoded(tables: Path, export: Path, *words: object) -> Path:
    output = tables / "encoded"
    run_here(encode.main, [export, "--items", tables / "items.parquet", "--output", output, *words])
    return output


def test_arrays_and_what_is_missing(tables: Path) -> None:
    """A row of zeros is an item without the feature; ``--without`` says that none has one."""
    rows = np.load(tables / "vectors.npy")
    rows[1] = 0
    np.save(tables / "vectors.npy", rows)
    export = write_config(tables, {"vector": FEATURE_DIM, "image": 464}, {"vector": NPY, "image": PIXELS})
    output = encoded(tables, export, "--feature", f"vector={tables / 'vectors.npy'}", "--without", "image")
    found = load_file(output / "features.safetensors")
    assert np.array_equal(found["vector"], rows.astype(np.float16))
    assert found["vector.mask"].tolist() == [True, False, True]
    assert found["image"].shape == (3, 464) and not found["image"].any() and not found["image.mask"].any()
    assert json.loads((output / "encoders.json").read_text())["image"] == PIXELS
    assert pq.read_table(output / "vocab.parquet").to_pydict() == {
        "item": [0, 1, 2],
        "external_id": ["x", "y", "z"],
        "train_count": [0, 0, 0],
        "title": ["Thing 0 of kind blue", "Thing 1 of kind red", "Thing 2 of kind blue"],
    }


def test_ids_in_a_csv(tables: Path) -> None:
    """They are of the kind that the export's are; text, where its vocabulary is not at hand."""
    export = write_config(tables, {"vector": FEATURE_DIM}, {"vector": NPY})
    (tables / "items.csv").write_text("item_id\n1\n2\n3\n")
    cases: list[tuple[tuple[str, ...], pa.Array | None, list[object]]] = [
        ((), None, ["1", "2", "3"]),
        (("--ids", "integer"), None, [1, 2, 3]),
        ((), pa.array([7]), [1, 2, 3]),
        ((), pa.array(["7"]), ["1", "2", "3"]),
    ]
    for number, (words, known, ids) in enumerate(cases):
        output = tables / f"encoded-{number}"
        if known is not None:
            pq.write_table(pa.table({"external_id": known}), export / "vocab.parquet")
        arguments = ["--items", tables / "items.csv", "--feature", f"vector={tables / 'vectors.npy'}", *words]
        arguments += ["--title", ""]
        run_here(encode.main, [export, *arguments, "--output", output])
        assert pq.read_table(output / "vocab.parquet")["external_id"].to_pylist() == ids


def test_refusals(tables: Path) -> None:
    dims, array = {"vector": FEATURE_DIM}, f"vector={tables / 'vectors.npy'}"
    np.save(tables / "wide.npy", np.ones((3, 5), np.float32))
    np.save(tables / "long.npy", np.ones((4, FEATURE_DIM), np.float32))
    write_items(tables / "twice.parquet", ["x", "y", "x"])
    text = {"vector": {"encoder": "tfidf+svd", "revision": "a", "recipe": TEXT}}
    other_template = {"vector": text["vector"] | {"recipe": TEXT | {"text": ["{colour}"]}}}
    cases: list[tuple[dict[str, Any] | None, tuple[object, ...], str]] = [
        ({"vector": NPY}, (), "needs an array, a row for each new item: FILE.npy; give it with --feature vector=FILE"),
        ({"vector": NPY}, ("--feature", f"vector={tables / 'none.npy'}"), "none.npy does not exist"),
        ({"vector": NPY}, ("--feature", f"vector={tables / 'wide.npy'}"), "has 5 channels, the model reads 4"),
        ({"vector": NPY}, ("--feature", f"vector={tables / 'long.npy'}"), "has 4 rows but there are 3 items"),
        ({"vector": NPY}, ("--feature", f"other={tables / 'long.npy'}"), "reads no feature 'other'; it reads: vector"),
        ({"vector": NPY}, ("--feature", "vector"), "is not of the form NAME=VALUE"),
        ({"vector": NPY}, ("--feature", array, "--id", "ident"), "has no column 'ident'"),
        ({"vector": NPY}, ("--feature", array, "--title", "name"), "has no column 'name'"),
        ({"vector": NPY}, ("--feature", array, "--items", tables / "twice.parquet"), "1 ids more than once"),
        ({"vector": PIXELS}, (), "needs a table of item ids and images: FILE.parquet"),
        (other_template, (), "has no column 'colour'"),
        (text, (), "expected a folder with fit-vector.safetensors"),
        ({"vector": text["vector"] | {"recipe": TEXT | {"tfidf": 0}}}, (), "revision 0 of tfidf, this version has 1"),
        ({"vector": {"encoder": "x", "revision": "a"}}, (), "does not record how its feature 'vector' was made"),
        (None, (), "does not record how its feature 'vector' was made"),
        ({"vector": {"encoder": "x", "revision": "a", "recipe": {"source": "magic"}}}, (), "from a source 'magic'"),
    ]
    for encoders, words, complaint in cases:
        with pytest.raises(UserError) as refused:
            encoded(tables, write_config(tables, dims, encoders), *words)
        assert complaint in str(refused.value), words
        assert not (tables / "encoded").exists()
    with pytest.raises(UserError, match="nowhere is not an export: it has no config.json"):
        encoded(tables, tables / "nowhere")
