"""Raw tables into a store: order, leave-one-out, packing, layouts, text, features, determinism."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.sections import StoreConfig
from fmrl_dist.data.store.reader import Store
from shards.build import main
from shards.encoders.item_images import MAX_PIXELS
from shards.encoders.item_text import UNTITLED, item_texts, template_columns
from shards.encoders.pixels import DIM, encode_image
from shards.inspect import main as inspect_main
from shards.store.builder import build_store
from shards.store.problems import store_problems
from tests.fixtures.stores import HISTORIES, ITEMS, png, tiny_config, write_histories, write_items, write_raw
from tests.fixtures.training import contents, refusal


def read_split(store: Store, split: str, field: str = "items") -> dict[int, list[int]]:
    """Slice of each user of a split, in the order they are stored."""
    slices = {}
    for block in store.manifest.splits[split]:
        arrays = store.read_block(block)
        for i, user in enumerate(arrays["users"].tolist()):
            assert user not in slices
            slices[user] = arrays[field][arrays["starts"][i] : arrays["starts"][i + 1]].tolist()
    return slices


def read_items(store: Store, field: str) -> np.ndarray:
    """A field of the item blocks, put back in the order of the ids."""
    blocks = [store.read_block(block) for block in store.manifest.items]
    order = np.argsort(np.concatenate([block["ids"] for block in blocks]))
    return np.concatenate([block[field] for block in blocks])[order]


def read_columns(store: Store, name: str) -> dict[str, list[Any]]:
    return pq.read_table(store.path / name).to_pydict()


def rows_of(items: list[str]) -> list[int]:
    return [ITEMS.index(item) for item in items]


def test_leave_one_out_ids_and_tables(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    manifest = store.manifest
    assert (manifest.num_items, manifest.num_users, manifest.num_dropped_users, manifest.num_events) == (6, 4, 1, 15)
    kept = ["u1", "u3", "u4", "u5"]  # u2 has one event
    assert read_columns(store, "users.parquet") == {"user": [0, 1, 2, 3], "external_id": kept}
    whole = [rows_of(HISTORIES[user]) for user in kept]
    assert read_split(store, "train") == {0: whole[0][:-2], 1: whole[1], 2: whole[2][:-2], 3: whole[3][:-2]}
    assert read_split(store, "valid") == {0: whole[0][:-1], 2: whole[2][:-1], 3: whole[3][:-1]}
    assert read_split(store, "test") == {0: whole[0], 2: whole[2], 3: whole[3]}
    vocab = read_columns(store, "vocab.parquet")
    assert (vocab["item"], vocab["external_id"]) == (list(range(6)), ITEMS)
    assert vocab["train_count"] == [2, 2, 1, 1, 2, 1]  # a b | e a | b | f e d c
    assert vocab["title"][1] == "Thing 1 of kind red"
    np.testing.assert_array_equal(read_items(store, "vector"), rows.astype(np.float16), strict=True)


def test_item_blocks_hold_a_permutation(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", [f"i{i:04d}" for i in range(1000)])
    write_histories(tmp_path / "sequences.parquet", {"u": ["i0001", "i0002"]})
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features={}))
    ids = np.concatenate([store.read_block(block)["ids"] for block in store.manifest.items])
    assert sorted(ids.tolist()) == list(range(1000))
    assert abs(ids[:100].mean() - 499.5) < 100  # a run of blocks samples the whole catalogue
    assert read_columns(store, "vocab.parquet")["external_id"][7] == "i0007"  # the ids themselves are not permuted


@settings(max_examples=25)
@given(
    histories=st.lists(st.lists(st.integers(0, 6), max_size=7), min_size=1, max_size=12),
    users_per_block=st.integers(1, 5),
    blocks_per_shard=st.integers(1, 3),
)
def test_any_histories_come_back(histories: list[list[int]], users_per_block: int, blocks_per_shard: int) -> None:
    histories = [*histories, [3, 3]]  # at least one is kept
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_items(root / "items.parquet", list(range(100, 107)))
        raw = {10 * i: [100 + item for item in history] for i, history in enumerate(histories)}
        times = {user: [50 + i for i in range(len(items))] for user, items in raw.items()}
        write_histories(root / "sequences.parquet", raw, times)
        config = tiny_config(root, root / "store", features={}, sequences={"times": "times"})
        sizes = StoreConfig(config.store.path, users_per_block, 2, blocks_per_shard)
        store, _ = build_store(dataclasses.replace(config, store=sizes))
        assert list(store_problems(store)) == []
        kept = [i for i, history in enumerate(histories) if len(history) >= 2]
        assert read_columns(store, "users.parquet")["external_id"] == [10 * i for i in kept]
        whole = dict(enumerate(histories[i] for i in kept))
        train = {user: items[:-2] if len(items) >= 3 else items for user, items in whole.items()}
        assert list(read_split(store, "train").items()) == list(train.items())
        assert read_split(store, "test") == {user: items for user, items in whole.items() if len(items) >= 3}
        assert read_split(store, "valid") == {user: items[:-1] for user, items in whole.items() if len(items) >= 3}
        assert read_split(store, "train", "times") == {u: [50 + i for i in range(len(x))] for u, x in train.items()}
        counts = [block.count for block in store.manifest.splits["train"]]
        assert all(count == users_per_block for count in counts[:-1])
        counted = np.bincount([item for items in train.values() for item in items], minlength=7)
        assert read_columns(store, "vocab.parquet")["train_count"] == counted.tolist()


def test_the_same_input_gives_the_same_store(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    features = {"vector": {"source": "npy", "path": "vectors.npy"}, "words": {"source": "tfidf", "dim": 3}}
    first, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "one", features=features))
    second, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "two", features=features))
    assert first.manifest.sha256 == second.manifest.sha256
    for path in first.path.iterdir():
        assert path.read_bytes() == (second.path / path.name).read_bytes(), path.name
    np.save(tmp_path / "raw" / "vectors.npy", np.zeros((len(ITEMS), 4), np.float32))
    third, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "three", features=features))
    assert third.manifest.sha256 != first.manifest.sha256


def test_csv_equals_parquet(tmp_path: Path) -> None:
    write_raw(tmp_path)
    text = ["{title}", "{price}", "{brand}"]
    features = {"words": {"source": "tfidf", "dim": 3, "text": text}}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    items = pq.read_table(tmp_path / "items.parquet").drop_columns(["categories"])
    pyarrow.csv.write_csv(items, tmp_path / "items.csv")
    for name, cells in (("spaces", " ".join), ("json", lambda items: str(items).replace("'", '"'))):
        table = {"user_id": list(HISTORIES), "item_ids": [cells(items) for items in HISTORIES.values()]}
        pyarrow.csv.write_csv(pa.table(table), tmp_path / f"{name}.csv")
        tables = {"items": {"path": "items.csv", "title": "title"}, "sequences": {"path": f"{name}.csv"}}
        again, _ = build_store(tiny_config(tmp_path, tmp_path / name, features=features, **tables))
        assert again.manifest.sha256 == store.manifest.sha256


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize("timestamps", [False, True])
def test_interactions_equal_sequences(tmp_path: Path, ending: str, timestamps: bool) -> None:
    """Integer ids; events of one time keep the table's order; users come in order of their first row."""
    histories = {7: [30, 10, 20], 3: [20], 9: [10, 10, 30, 20], 1: [40, 30]}
    times = {7: [5, 5, 8], 3: [1], 9: [2, 4, 4, 4], 1: [0, 9]}
    write_items(tmp_path / "items.parquet", [10, 20, 30, 40])
    write_histories(tmp_path / "sequences.parquet", histories, times)
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "one", features={}, sequences={"times": "times"}))
    events = [(user, item, time) for user in histories for item, time in zip(histories[user], times[user], strict=True)]
    late = [event for event in events if event[2] >= 5 and event[0] != 7]  # interleaved: these come last
    events = [event for event in events if event not in late] + late
    columns = dict(zip(("who", "what", "when"), map(list, zip(*events, strict=True)), strict=True))
    table = pa.table(columns)
    if timestamps:
        table = table.set_column(2, "when", pa.array(columns["when"], pa.timestamp("s")).cast(pa.timestamp("ms")))
    path = tmp_path / f"events.{ending}"
    pq.write_table(table, path) if ending == "parquet" else pyarrow.csv.write_csv(table, path)
    sequences = {"path": path.name, "layout": "interactions", "user": "who", "items": "what", "times": "when"}
    again, _ = build_store(tiny_config(tmp_path, tmp_path / "two", features={}, sequences=sequences))
    assert again.manifest.sha256 == store.manifest.sha256
    assert read_split(again, "test", "times")[1] == [2, 4, 4, 4]


def test_shuffled_interactions_are_ordered_by_time(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet")
    events = {"user": [1, 2, 1, 2, 1], "item": ["c", "f", "a", "e", "b"], "t": [30, 2, 10, 1, 20]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    sequences = {"path": "events.parquet", "layout": "interactions", "user": "user", "items": "item", "times": "t"}
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "timed", features={}, sequences=sequences))
    assert read_split(store, "test") == {0: rows_of(["a", "b", "c"])}
    assert read_split(store, "train")[1] == rows_of(["e", "f"])
    store, _ = build_store(tiny_config(tmp_path, tmp_path / "as-is", features={}, sequences=sequences | {"times": ""}))
    assert read_split(store, "test") == {0: rows_of(["c", "a", "b"])}


def test_item_text_is_the_papers() -> None:
    table = pa.table(
        {
            "title": ["Comb", None, "  ", "Brush", None],
            "price": pa.array([9.99, 12, None, float("nan"), None], pa.float32()),
            "brand": ["Acme", "", None, None, None],
            "categories": [[["Beauty", "Hair"], ["Sale"]], [["Beauty"]], [], None, [[]]],
        }
    )
    parts = ("Title: {title}", "Price: {price}", "Brand: {brand}", "Categories: {categories}")
    texts, present = item_texts(table, parts, "\n")
    assert texts == [
        "Title: Comb\nPrice: 9.99\nBrand: Acme\nCategories: Beauty, Hair",
        "Price: 12.0\nCategories: Beauty",
        UNTITLED,
        "Title: Brush",
        UNTITLED,
    ]
    assert present.tolist() == [True, True, False, True, False]
    assert item_texts(table, ("{title} for {price:.2f}",), " ")[0][:2] == ["Comb for 9.99", UNTITLED]
    assert template_columns(("{a} {b}", "{a}")) == ["a", "b"]


@pytest.mark.parametrize(
    "part", ["{title.__class__}", "{title[0]}", "{title!r}", "{title:{price}}", "{}", "{0.real}", "no field", "{title"]
)
def test_templates_reach_columns_only(part: str) -> None:
    with pytest.raises(UserError, match="data.text part"):
        template_columns((part,))


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


def test_pixels_skip_what_cannot_be_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path)
    red = png((200, 0, 0))
    images = {"a": red, "b": png((0, 0, 200)), "c": red[: len(red) // 2], "d": None, "e": b"no image", "zz": red}
    pq.write_table(pa.table({"item_id": list(images), "image": list(images.values())}), tmp_path / "images.parquet")
    features = {"image": {"source": "pixels", "path": "images.parquet"}}
    store, rows = build_store(tiny_config(tmp_path, tmp_path / "store", features=features))
    assert rows[0].note == "3 images unreadable, 1 of unknown items"
    assert read_items(store, "image.mask").tolist() == [True, True, False, False, False, False]
    assert read_items(store, "image").shape == (6, DIM)
    assert not read_items(store, "image")[2:].any()


def test_pixel_descriptor_tells_images_apart() -> None:
    red, also_red, blue = (encode_image(png(colour)) for colour in ((200, 0, 0), (190, 10, 5), (0, 0, 200)))
    assert red is not None and also_red is not None and blue is not None
    assert red.shape == (DIM,) and abs(np.linalg.norm(red) - 1) < 1e-5
    assert red @ also_red > red @ blue + 0.2
    for mode in ("L", "P", "RGBA", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (9, 5)).save(buffer, "PNG")
        assert np.isfinite(encode_image(buffer.getvalue())).all()  # type: ignore[arg-type]


def test_a_decompression_bomb_is_not_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    assert encode_image(buffer.getvalue()) is None


def test_a_store_is_replaced_only_when_asked(tmp_path: Path) -> None:
    rows = write_raw(tmp_path / "raw")
    config = tiny_config(tmp_path / "raw", tmp_path / "store")
    before = build_store(config)[0].manifest.sha256
    with pytest.raises(UserError, match="exists; keep it, or build it again with --overwrite"):
        build_store(config)
    np.save(tmp_path / "raw" / "vectors.npy", rows + 1)
    assert build_store(config, overwrite=True)[0].manifest.sha256 != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "store"]
    with pytest.raises(UserError, match="exists and is not a store"):
        build_store(tiny_config(tmp_path / "raw", tmp_path / "raw"), overwrite=True)


def test_a_whole_store_of_the_config_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--keep`` builds what is not there, keeps what is, and refuses what is damaged or another config's."""
    write_raw(tmp_path / "raw")
    config, store = tmp_path / "config.yaml", tmp_path / "store"
    config.write_text(tiny_config(tmp_path / "raw", store).to_yaml())
    main(["--config", str(config), "--keep"])
    assert capsys.readouterr().out.startswith(f"built {store}")
    before = contents(store)
    main(["--config", str(config), "--keep"])
    assert capsys.readouterr().out.startswith(f"kept {store}: ")
    another = ["--data.features.other.source", "npy", "--data.features.other.path", "vectors.npy"]
    assert "not the config's ['other']; build it again with --overwrite" in refusal(
        main, "--config", config, "--keep", *another
    )
    assert "not allowed with" in refusal(main, "--config", config, "--keep", "--overwrite")
    assert contents(store) == before
    shard = next(iter(sorted(store.glob("train-*"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard.name} has {shard.stat().st_size} bytes, the manifest says" in refusal(
        main, "--config", config, "--keep"
    )
    shard.unlink()
    assert f"{shard.name} has 0 bytes, the manifest says" in refusal(main, "--config", config, "--keep")


def test_the_commands_on_the_demo(tmp_path: Path) -> None:
    """Real processes: missing demo data are drawn, built, verified and described."""
    data = {
        "root": str(tmp_path / "data"),
        "demo": {"users": 60, "items": 100},
        "sequences": {"path": "demo/sequences.parquet"},
        "items": {"path": "demo/items.parquet", "title": "title"},
        "features": {"image": {"source": "pixels", "path": "demo/images.parquet"}},
    }
    config = tmp_path / "demo.yaml"
    config.write_text(yaml.safe_dump({"data": data}))
    store = str(tmp_path / "store")
    outputs = []
    for words in (["build", "--config", str(config), "--store.path", store], ["verify", store], ["inspect", store]):
        done = subprocess.run([sys.executable, "-m", f"shards.{words[0]}", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "60 users, 100 items" in outputs[0] and f"feature image: {DIM} x float16" in outputs[0]
    assert outputs[1].startswith("ok: ")
    assert Store.open(store).manifest.sha256 in outputs[2]


def test_inspect_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(tmp_path / "raw")
    store, _ = build_store(tiny_config(tmp_path / "raw", tmp_path / "store"))
    inspect_main([str(store.path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    assert any(line.split()[:3] == ["train", "1", "2"] for line in lines)


@pytest.mark.real_data
def test_beauty(tmp_path: Path, shared_data: Path) -> None:
    root = shared_data / "amazon2014_beauty"
    features = {"text": {"source": "npy", "path": "text_minilm_384.npy", "dim": 384}}
    config = tiny_config(root, tmp_path / "store", features=features)
    store, _ = build_store(dataclasses.replace(config, store=StoreConfig(path=config.store.path)))
    assert list(store_problems(store)) == []
    manifest = store.manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (22_363, 12_101, 198_502)
    raw = [[item - 1 for item in items] for items in pq.read_table(root / "sequences.parquet")["item_ids"].to_pylist()]
    assert read_split(store, "test") == dict(enumerate(raw))  # ids are 1-based in item order; no history is short
    assert read_split(store, "train") == {user: items[:-2] for user, items in enumerate(raw)}
    train_count = read_columns(store, "vocab.parquet")["train_count"]
    assert sum(train_count[items[-1]] == 0 for items in raw) == 138  # cold test targets, as the data's README counts
    stored = np.load(root / "text_minilm_384.npy")
    np.testing.assert_array_equal(read_items(store, "text"), stored, strict=True)
