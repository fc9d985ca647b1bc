"""Bad input to ``shards.build`` is refused in one line that names what is wrong, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fmrl_dist.base.errors import UserError
from shards.build import main as build_main
from shards.verify import main as verify_main
from tests.fixtures.stores import HISTORIES, ITEMS, tiny_values, write_histories, write_items, write_raw

Values = dict[str, Any]
Spoil = Callable[[Path, Values], object]


def command_line(tmp_path: Path, spoil: Spoil | None = None) -> list[str]:
    """Write sound raw data and a config, and spoil them; returns the arguments for ``shards.build``."""
    write_raw(tmp_path / "raw")
    values = tiny_values(tmp_path / "raw", tmp_path / "store")
    if spoil is not None:
        spoil(tmp_path / "raw", values)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(tmp_path / "config.yaml")]


def vectors(rows: np.ndarray) -> Spoil:
    return lambda root, values: np.save(root / "vectors.npy", rows)


def one_value(value: float) -> np.ndarray:
    rows = np.ones((len(ITEMS), 4), np.float32)
    rows[3, 1] = value
    return rows


def histories(histories: dict[Any, Any], times: Any = None) -> Spoil:
    def spoil(root: Path, values: Values) -> None:
        write_histories(root / "sequences.parquet", histories, times)
        if times is not None:
            values["data"]["sequences"] = {"times": "times"}

    return spoil


def data(**keys: Any) -> Spoil:
    return lambda root, values: values["data"].update(keys)


def model(**keys: Any) -> Spoil:
    return lambda root, values: values.update(model=keys)


def file(name: str, content: bytes) -> Spoil:
    return lambda root, values: (root / name).write_bytes(content)


def empty_table(name: str) -> Spoil:
    return lambda root, values: pq.write_table(pq.read_table(root / name).slice(0, 0), root / name)


def text_feature(*parts: str, dim: int = 2) -> Spoil:
    return data(features={"words": {"source": "tfidf", "dim": dim, "text": list(parts)}})


def image_table(column: pa.Array) -> Spoil:
    def spoil(root: Path, values: Values) -> None:
        pq.write_table(pa.table({"item_id": ITEMS, "image": column}), root / "images.parquet")
        values["data"]["features"] = {"image": {"source": "pixels", "path": "images.parquet"}}

    return spoil


def column(table: str, name: str, values: pa.Array) -> Spoil:
    """A column of a raw table is replaced, or added."""

    def spoil(root: Path, values_: Values) -> None:
        whole = pq.read_table(root / table)
        whole = whole.drop_columns([name]) if name in whole.column_names else whole
        pq.write_table(whole.append_column(name, values), root / table)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(root: Path, values: Values) -> None:
        for each in spoils:
            each(root, values)

    return spoil


N = len(ITEMS)
STRUCTS, BYTES = pa.array([{"a": 1}] * N), pa.array([b"x"] * N)
MAPS = pa.array([[("a", 1)]] * N, pa.map_(pa.string(), pa.int64()))
U1 = HISTORIES["u1"]
CASES: dict[str, tuple[Spoil, str]] = {
    "missing items": (data(items={"path": "no.parquet"}), "no.parquet does not exist; check data.root"),
    "missing sequences": (data(sequences={"path": "no.csv"}), "no.csv does not exist"),
    "missing feature": (lambda root, values: (root / "vectors.npy").unlink(), "vectors.npy does not exist"),
    "unknown ending": (
        data(items={"path": "vectors.npy"}),
        "ends in '.npy'; expected .parquet, .csv, .tsv, .jsonl or .json",
    ),
    "not Parquet": (file("items.parquet", b"something else"), "items.parquet cannot be read"),
    "cut Parquet": (
        lambda root, values: (root / "items.parquet").write_bytes((root / "items.parquet").read_bytes()[:200]),
        "items.parquet cannot be read",
    ),
    "missing column": (
        data(items={"id": "asin"}),
        "no column 'asin'; it has: item_id, title, price, brand, categories",
    ),
    "missing history column": (data(sequences={"items": "basket"}), "no column 'basket'; it has: user_id, item_ids"),
    "empty items": (empty_table("items.parquet"), "items.parquet is empty"),
    "empty sequences": (empty_table("sequences.parquet"), "sequences.parquet is empty"),
    "unknown item": (histories({"u1": [*U1, "zebra"]}), "not in the item table, the first is 'zebra'"),
    "unknown item of another type": (histories({1: [1, 2, 3]}), "not in the item table, the first is '1'"),
    "duplicate items": (
        lambda root, values: write_items(root / "items.parquet", ["a", "b", "c", "d", "e", "b"]),
        "more than once, the first is 'b'",
    ),
    "null item id": (
        lambda root, values: write_items(root / "items.parquet", ["a", "b", None, "d", "e", "f"]),
        r"1 of 6 rows cannot be used \(no id: 1\), more than a share of 0.01; .*data.dirt.max_bad_rows",
    ),
    "an array beside a row without an id": (
        both(
            lambda root, values: write_items(root / "items.parquet", ["a", "b", None, "d", "e", "f"]),
            vectors(np.ones((N - 1, 4), np.float32)),
            data(dirt={"max_bad_rows": 0.5}, on_unknown_item="drop"),
        ),
        r"items.parquet has rows that cannot be used \(1 no id\), and feature vector is an array with a row for each",
    ),
    "users as floats": (
        histories({"1.0": U1, "12.0": U1}),
        "column 'user_id' of .* holds ids such as '1.0': whole numbers that were written as floats",
    ),
    "users as floats, prepared": (
        both(histories({"1.0": U1, "12.0": U1}), data(interactions={"min_user_events": 2})),
        "column of users of .*sequences.parquet holds ids such as '1.0': whole numbers",
    ),
    "items as floats": (
        lambda root, values: write_items(root / "items.parquet", [f"{i}.0" for i in range(6)]),
        "column 'item_id' of .* holds ids such as '0.0': whole numbers",
    ),
    "null in a history": (histories({"u1": ["a", None, "b"]}), "column 'item_ids' of .* holds 1 null ids"),
    "null user": (histories({"u1": U1, None: U1}), "column 'user_id' of .* holds 1 null ids"),
    "null history": (histories({"u1": U1, "u2": None}), "holds 1 null lists"),
    "real ids": (
        lambda root, values: write_items(root / "items.parquet", [0.5 * i for i in range(6)]),
        "ids of type double; expected integers or text",
    ),
    "duplicate users": (
        lambda root, values: pq.write_table(
            pa.table({"user_id": ["u", "v", "u"], "item_ids": [U1, U1, U1]}), root / "sequences.parquet"
        ),
        "more than once, the first is 'u'",
    ),
    "users that are not UTF-8": (
        lambda root, values: pq.write_table(
            pa.table({"user_id": pa.array([b"\xff", b"v"]).view(pa.string()), "item_ids": [U1, U1]}),
            root / "sequences.parquet",
        ),
        r"sequences\.parquet is not UTF-8 text .*; write its texts as UTF-8",
    ),
    "items that are not UTF-8": (
        lambda root, values: pq.write_table(
            pa.table({"item_id": pa.array([b"\xff%d" % row for row in range(6)]).view(pa.string()), "title": ITEMS}),
            root / "items.parquet",
        ),
        r"items\.parquet is not UTF-8 text .*; write its texts as UTF-8",
    ),
    "events that are not UTF-8": (
        lambda root, values: pq.write_table(
            pa.table(
                {
                    "user_id": ["u"],
                    "item_ids": pa.array([[b"a", b"\xff"]])
                    .cast(pa.list_(pa.binary()))
                    .cast(pa.list_(pa.string()), safe=False),
                }
            ),
            root / "sequences.parquet",
        ),
        r"sequences\.parquet is not UTF-8 text .*; write its texts as UTF-8",
    ),
    "no lists": (data(sequences={"items": "user_id"}), "not in the item table|expected lists"),
    "only short histories": (histories({"u1": ["a"], "u2": []}), "none of its 2 histories has 2 events"),
    "other number of times": (histories({"u1": U1}, {"u1": [1, 2]}), "lists of other lengths"),
    "null times": (histories({"u1": U1, "u2": U1}, {"u1": [1, 2, 3, 4], "u2": None}), "null lists"),
    "null time": (histories({"u1": U1}, {"u1": [1, None, 3, 4]}), "holds 1 null times"),
    "times of another type": (histories({"u1": U1}, {"u1": [True, True, False, True]}), "times of type bool"),
    "feature rows": (vectors(np.ones((5, 4), np.float32)), "5 rows but there are 6 items"),
    "feature shape": (vectors(np.ones(6, np.float32)), r"float32 \[6\]; expected floats \[items, dim\]"),
    "feature of integers": (vectors(np.ones((6, 4), np.int64)), "holds int64"),
    "feature of objects": (
        lambda root, values: np.save(root / "vectors.npy", np.array([[{}]] * 6, object), allow_pickle=True),
        "not a plain .npy array",
    ),
    "feature archive": (
        lambda root, values: np.savez((root / "vectors.npy").open("wb"), rows=np.ones((6, 4))),
        "holds an archive",
    ),
    "cut feature": (
        lambda root, values: (root / "vectors.npy").write_bytes((root / "vectors.npy").read_bytes()[:-8]),
        "not a plain .npy array",
    ),
    "NaN": (vectors(one_value(np.nan)), "row 3 holds NaN or infinity"),
    "infinity": (vectors(one_value(-np.inf)), "row 3 holds NaN or infinity"),
    "float16 underflow": (vectors(np.full((len(ITEMS), 4), 1e-6)), "row 0 holds at most 1e-06, too small for float16"),
    "float16 overflow": (vectors(one_value(-65_505)), "row 3 holds 65505, which overflows float16"),
    "wrong dim": (
        data(features={"vector": {"source": "npy", "path": "vectors.npy", "dim": 8}}),
        "has 4 columns but its dim is 8",
    ),
    "a key of another source": (
        data(features={"image": {"source": "pixels", "path": "images.parquet", "dim": 8}}),
        "unknown config key 'data.features.image.dim'; known keys: source, path, id, image",
    ),
    "unknown source": (
        data(features={"image": {"source": "pixel"}}),
        "features.image.source is 'pixel'; expected one of: npy, tfidf, pixels, transformers, open_clip, pq",
    ),
    "images that are numbers": (image_table(pa.array(range(6))), "is of type int64; expected encoded image bytes"),
    "images that are not there": (image_table(pa.array(ITEMS)), r"6 of 6 images cannot be used \(6 missing\)"),
    "no image at all": (image_table(pa.array([b""] * 6)), "no item has it"),
    "title of lists": (
        column("items.parquet", "title", pa.array([[["a"]]] * N)),
        "'title' of .* is of type list.*; expected",
    ),
    "title of structs": (column("items.parquet", "title", STRUCTS), "'title' of .* is of type struct"),
    "title of maps": (column("items.parquet", "title", MAPS), "'title' of .* is of type map"),
    "title of a type that extends Arrow's": (
        column("items.parquet", "title", pa.array([1] * N, pa.bool8())),
        "'title' of .* is of type extension<arrow.bool8>; expected text",
    ),
    "title of a far date": (
        column("items.parquet", "title", pa.array([10**18] * N, pa.timestamp("us"))),
        "column 'title' of .* holds the title .'<value out of range: 1000000000000000000>'.: a date of no calendar",
    ),
    "title of bytes": (column("items.parquet", "title", BYTES), "'title' of .* is of type binary"),
    "item ids that are lists": (column("items.parquet", "item_id", pa.array([["a"]] * N)), "ids of type list"),
    "item ids that are bytes": (column("items.parquet", "item_id", BYTES), "ids of type binary"),
    "user ids that are structs": (
        column("sequences.parquet", "user_id", pa.array([{"a": 1}] * 5)),
        "ids of type struct",
    ),
    "lists of lists of items": (column("sequences.parquet", "item_ids", pa.array([[["a"]]] * 5)), "ids of type list"),
    "lists of real items": (column("sequences.parquet", "item_ids", pa.array([[0.5]] * 5)), "ids of type double"),
    "times that are no lists": (
        both(column("sequences.parquet", "t", pa.array(range(5))), data(sequences={"times": "t"})),
        "'t' of .* is of type int64; expected lists",
    ),
    "text of structs": (
        both(column("items.parquet", "brand", STRUCTS), text_feature("{brand}")),
        "'brand' of .* is of type struct.*; a text template takes text, numbers, dates and lists of them",
    ),
    "text of bytes": (
        both(column("items.parquet", "brand", BYTES), text_feature("{brand}")),
        "'brand' of .* is of type binary; a text template takes",
    ),
    "text of lists of structs": (
        both(column("items.parquet", "brand", pa.array([[{"a": 1}]] * N)), text_feature("{brand}")),
        "'brand' of .* is of type list<.*struct.*; a text template takes",
    ),
    "no column of the default text": (
        both(
            lambda root, values: pq.write_table(
                pq.read_table(root / "items.parquet", columns=["item_id"]), root / "items.parquet"
            ),
            data(features={"words": {"source": "tfidf", "dim": 2}}, items={}),
        ),
        "has none of the columns title, price, brand, categories, .* it has: item_id: name yours with data.text",
    ),
    "two columns of one name": (
        lambda root, values: pq.write_table(
            pa.Table.from_arrays([pa.array(ITEMS)] * 2, names=["item_id", "item_id"]), root / "items.parquet"
        ),
        "has several columns 'item_id'|no column 'title'",
    ),
    "images in a folder": (
        both(
            image_table(BYTES),
            lambda root, values: (root / "parts").mkdir(),
            lambda root, values: values["data"]["features"]["image"].update(path="parts"),
        ),
        "parts is a folder; expected one Parquet file of images",
    ),
    "tfidf dim": (text_feature("{title}", dim=100), "dim is 100 but the texts give a matrix of 6 items"),
    "text column": (text_feature("{colour}"), "no column 'colour'; it has: item_id, title"),
    "text attribute": (text_feature("{title.__class__}"), "may hold only a column name"),
    "text format": (text_feature("{title:.2f}"), "does not fit the value"),
    "no words": (text_feature("{item_id}"), "hold no words"),
    "feature name": (data(features={"ids": {"source": "npy", "path": "vectors.npy"}}), "feature name 'ids'"),
    "layout": (data(sequences={"layout": "wide"}), "data.sequences.layout is 'wide'"),
    "unknown key": (data(itmes={}), "unknown config key 'data.itmes'; did you mean 'data.items'"),
    "sizes do not rise": (model(sizes=[8, 8, 16], width=16), "do not increase"),
    "last size": (model(sizes=[8, 16], width=32), "last of model.sizes is 16 but model.width is 32"),
    "narrow chunk": (model(sizes=[8, 11], width=11), "chunk of 3 channels"),
}


LOOKED_AT = ("images that are not there", "no image at all")  # what images are is kept, for the build that follows


@pytest.mark.parametrize("name", CASES)
def test_build_refuses(name: str, tmp_path: Path) -> None:
    spoil, message = CASES[name]
    words = command_line(tmp_path, spoil)
    with pytest.raises(UserError, match=message) as caught:
        build_main(words)
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.iterdir()} - {"config.yaml", "raw"}
    assert left == ({"store.build"} if name in LOOKED_AT else set()), "something else was left behind"


def test_the_same_data_unspoilt_are_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_main(command_line(tmp_path))
    assert "4 users, 6 items, 15 events, 1 users dropped" in capsys.readouterr().out


def test_a_failed_overwrite_keeps_the_old_store(tmp_path: Path) -> None:
    words = command_line(tmp_path)
    build_main(words)
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()
    write_histories(tmp_path / "raw" / "sequences.parquet", {"u1": ["a", "zebra"]})
    with pytest.raises(UserError, match="zebra"):
        build_main([*words, "--overwrite"])
    assert (tmp_path / "store" / "manifest.json").read_bytes() == manifest
    verify_main([str(tmp_path / "store")])


def test_nothing_is_encoded_before_all_columns_are_checked(tmp_path: Path) -> None:
    """Of two features and the histories the last is wrong: an encoder that takes hours must not have begun."""
    words = command_line(tmp_path)
    first = ["--data.features.words", "{source: transformers, model: none}"]
    image = ["--data.features.image", "{source: pixels, path: images.parquet}"]
    with pytest.raises(UserError, match=r"images.parquet does not exist"):
        build_main([*words, *first, *image])
    with pytest.raises(UserError, match=r"no column 'basket'"):
        build_main([*words, *first, "--data.sequences.items", "basket"])
    with pytest.raises(UserError, match=r"vectors.npy has 4 columns but its dim is 9"):
        build_main([*words, *first, "--data.features.other", "{source: npy, path: vectors.npy, dim: 9}"])
