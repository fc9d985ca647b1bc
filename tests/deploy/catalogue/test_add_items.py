"""Items that come after training are as if they had been in the store that was exported; nothing else changes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fmrl_dist import add_items, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256
from fmrl_dist.checkpoint.export.files import ITEMS_FILE
from fmrl_dist.checkpoint.export.parts import ExportParts
from fmrl_dist.checkpoint.export.reading import read_export, read_export_parts
from fmrl_dist.checkpoint.export.writing import write_export
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.catalogue.encoded_items import EncodedItems, read_encoded
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.model import export_config
from fmrl_dist.model.embed_catalogue import embed_catalogue
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.stored_tensors import stored
from shards import encode
from tests.fixtures.catalogues import NUM_ITEMS, NUM_KNOWN, make_growing_shop
from tests.fixtures.exports import ids_of, random_export, random_model, vocabulary_bytes, write_random_export
from tests.fixtures.item_encoders import projection_of
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.stores import read_items
from tests.fixtures.training import evaluate_here, evaluation, run_here, run_module, train_here

NEW = [f"i{item}" for item in range(NUM_KNOWN, NUM_ITEMS)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_growing_shop(tmp_path_factory.mktemp("growing"))
    export_of(root, root / "export")
    run_here(encode.main, [root / "export", "--output", root / "encoded", *new_items(root, "title")])
    return root


def export_of(root: Path, output: Path, *words: object, run: str = "run") -> Path:
    run_here(export.main, ["--checkpoint", root / run, "--output", output, "--measure-users", 0, *words])
    return output


def new_items(root: Path, title: str = "") -> list[object]:
    """Options that name the new items' tables."""
    files = [("vector", "vector.npy"), ("image", "images.parquet")]
    named = [word for name, file in files for word in ("--feature", f"{name}={root / 'new' / file}")]
    return ["--items", root / "new" / "items.parquet", *named, *(["--title", title] if title else [])]


def added(root: Path, output: Path, *words: object, source: Path | None = None) -> Path:
    """The export with the items that are encoded already."""
    run_here(add_items.main, [source or root / "export", "--encoded", root / "encoded", "--output", output, *words])
    return output


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def test_as_if_they_had_been_there(shop: Path, tmp_path: Path) -> None:
    """Against an export of the same run on a store of all items; some items lack something."""
    before = hashes(shop / "export")
    ended = run_module("fmrl_dist.add_items", shop / "export", *new_items(shop), "--output", tmp_path / "more")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "feature image: 7 of 9 items have it, pixels" in ended.stdout
    assert "40 items, of which 40 are recommended" in ended.stdout
    assert hashes(shop / "export") == before
    whole = export_of(shop, tmp_path / "whole", "--store", shop / "raw-store")
    found, expected = read_export(tmp_path / "more"), read_export(whole)
    assert found.items.shape == (NUM_ITEMS, 8)
    torch.testing.assert_close(found.items, expected.items, rtol=1e-6, atol=1e-6)
    assert found.items.unique(dim=0).shape == found.items.shape
    assert torch.equal(found.items[:NUM_KNOWN], read_export(shop / "export").items)
    tables = [pq.read_table(folder / "vocab.parquet") for folder in (tmp_path / "more", whole)]
    assert tables[0].drop(["train_count"]).equals(tables[1].drop(["train_count"]))
    assert tables[0]["train_count"].to_pylist()[NUM_KNOWN:] == [0] * len(NEW)
    lists = [
        Recommender.from_pretrained(folder).recommend([["i2", "i33"]], k=40) for folder in (tmp_path / "more", whole)
    ]
    assert [item.item_id for item in lists[0][0]] == [item.item_id for item in lists[1][0]]
    assert lists[0][0][0].title is not None
    for folder in (tmp_path / "more", whole):
        evaluate_here(folder, "--store", shop / "raw-store", "--cutoffs", "10")
    figures = [
        json.loads(next(folder.glob("evaluation*.json")).read_text())["sizes"] for folder in (tmp_path / "more", whole)
    ]
    assert figures[0] == figures[1]
    assert "9 items were added, 0 updated and 0 removed" in (tmp_path / "more" / "README.md").read_text()


def test_by_codes_of_another_feature(shop: Path, tmp_path: Path) -> None:
    """The export keeps what the codes are of, and its fit too; an item without it has the stand-in."""
    plain, whole = (
        export_of(shop, tmp_path / name, "--store", shop / f"{store}-store", run="codes-run")
        for name, store in (("plain", "known"), ("whole", "raw"))
    )
    assert {path.name for path in plain.glob("fit-*")} == {"fit-terms.safetensors", "fit-codes.safetensors"}
    words = ["--items", shop / "new" / "items.parquet", "--title", "title"]
    run_here(encode.main, [plain, *words, "--output", tmp_path / "encoded"])
    rows = load_file(tmp_path / "encoded" / "features.safetensors")
    assert set(rows) == {"codes", "codes.mask"} and rows["codes.mask"].tolist() == [i != 4 for i in range(9)]
    run_here(add_items.main, [plain, "--encoded", tmp_path / "encoded", "--output", tmp_path / "more"])
    assert torch.equal(read_export(tmp_path / "more").items, read_export(whole).items)
    run_here(encode.main, [plain, *words, "--without", "terms", "--output", tmp_path / "none"])
    assert not load_file(tmp_path / "none" / "features.safetensors")["codes.mask"].any()
    with pytest.raises(UserError, match="reads no feature 'image'; it reads: codes, terms"):
        run_here(encode.main, [plain, *words, "--without", "image", "--output", tmp_path / "other"])


def test_by_a_text_encoder(shop: Path, tmp_path: Path) -> None:
    """Its rows round by the batch that a text is in; a model that has moved is found, another one refused."""
    plain, whole = (
        export_of(shop, tmp_path / name, "--store", shop / f"{store}-store", run="text-run")
        for name, store in (("plain", "known"), ("whole", "raw"))
    )
    words = [plain, "--items", shop / "new" / "items.parquet", "--title", "title", "--output", tmp_path / "encoded"]
    run_here(encode.main, words)
    run_here(add_items.main, [plain, "--encoded", tmp_path / "encoded", "--output", tmp_path / "more"])
    card = (tmp_path / "more" / "README.md").read_text()
    assert "| transformers:model " in card and str(shop) not in card
    assert 'from_pretrained("more")' in card
    found, expected = read_export(tmp_path / "more").items, read_export(whole).items
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    rows = load_file(tmp_path / "encoded" / "features.safetensors")["words"]
    same = (rows == torch.from_numpy(read_items(Store.open(shop / "raw-store"), "words")[NUM_KNOWN:])).all(1)
    assert same.any()
    torch.testing.assert_close(found[NUM_KNOWN:][same], expected[NUM_KNOWN:][same], rtol=1e-6, atol=1e-6)

    moved = Path(shutil.move(shop / "model", tmp_path / "moved"))
    words[-1] = tmp_path / "again"
    try:
        with pytest.raises(UserError, match="a folder that is not here; say where it is with --encoder words=FOLDER"):
            run_here(encode.main, words)
        run_here(encode.main, [*words, "--encoder", f"words={moved}"])
        config = json.loads((moved / "tokenizer_config.json").read_text())
        (moved / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 30}))
        words[-1] = tmp_path / "other"
        run_here(encode.main, [*words, "--encoder", f"words={moved}"])
    finally:
        shutil.move(moved, shop / "model")
    with pytest.raises(
        UserError, match="'words' of the new items is not the one .*: revision was .*; max_tokens was 48, now 30"
    ):
        run_here(add_items.main, [plain, "--encoded", tmp_path / "other", "--output", tmp_path / "other-export"])
    assert not (tmp_path / "other-export").exists()
    assert torch.equal(load_file(tmp_path / "again" / "features.safetensors")["words"], rows)


def test_evaluation_on_the_training_store_is_what_it_was(shop: Path, tmp_path: Path) -> None:
    """The new items are no candidates of a store that does not have them."""
    plain = shutil.copytree(shop / "export", tmp_path / "plain")
    more = added(shop, tmp_path / "more")
    for folder in (plain, more):
        evaluate_here(folder)
    assert evaluation(plain)["sizes"] == evaluation(more)["sizes"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_other_rows_keep_their_bytes(shop: Path, tmp_path: Path, dtype: str) -> None:
    plain = export_of(shop, tmp_path / "plain", "--dtype", dtype, "--vectors", 4)
    more = added(shop, tmp_path / "more", source=plain)
    for name in (ITEMS_FILE, "item_vectors.safetensors"):
        before, after = load_file(plain / name), load_file(more / name)
        assert before.keys() == after.keys() and len(before) == (2 if dtype == "int8" else 1)
        for key, tensor in before.items():
            assert torch.equal(after[key][:NUM_KNOWN], tensor) and len(after[key]) == NUM_ITEMS
    exact, rounded = read_export(more), read_export(added(shop, tmp_path / "exact"))
    apart = {"float32": 1e-6, "float16": 4e-3, "int8": 0.06}[dtype]
    torch.testing.assert_close(exact.items, rounded.items, rtol=0, atol=apart * float(rounded.items.abs().max()))
    assert stored({"item_embeddings": exact.items}, dtype).keys() == load_file(more / ITEMS_FILE).keys()
    unchanged = ["model.safetensors", "rotation.safetensors", "fit-terms.safetensors"]
    assert [file_sha256(more / name) for name in unchanged] == [file_sha256(plain / name) for name in unchanged]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_for_onnxruntime(shop: Path, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("onnxruntime")
    plain = export_of(shop, tmp_path / "plain", "--format", "onnx", "--dtype", dtype)
    more = added(shop, tmp_path / "more", source=plain)
    items = np.load(more / "item_embeddings.npy").astype(np.float32)
    assert np.array_equal(np.load(more / "item_embeddings.npy")[:NUM_KNOWN], np.load(plain / "item_embeddings.npy"))
    if dtype == "int8":
        items *= np.load(more / "item_scales.npy")[:, None]
    expected = read_export(added(shop, tmp_path / "exact")).items.numpy()
    np.testing.assert_allclose(items, expected, rtol=0, atol=(1e-5 if dtype == "float32" else 0.06) * expected.max())


def test_onnxruntime_has_no_ids_to_lend(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    words = ["--model.id_table", "true", "--model.features", "[vector, terms, image]"]
    run = train_here(shop / "known.yaml", tmp_path / "run", "--train.max_steps", 3, *words)
    onnx = added(shop, tmp_path / "more-onnx", source=export_of(tmp_path, tmp_path / "onnx", "--format", "onnx"))
    assert "note: the model has ids, of which an export of format onnx holds none" in capsys.readouterr().out
    whole = added(shop, tmp_path / "more", source=export_of(tmp_path, tmp_path / "plain", run=run.name))
    assert "note:" not in capsys.readouterr().out
    borrowed = read_export(whole).items[NUM_KNOWN:].numpy() - np.load(onnx / "item_embeddings.npy")[NUM_KNOWN:]
    ids = read_export(whole).model.encoder.id_table
    assert ids is not None
    of_items = np.abs(borrowed[:, None] - 0.8 * ids.detach().numpy()[None]).max(2).min(1)  # how near to any item's
    assert (of_items < 1e-5).all() and (np.abs(borrowed).max(1) > 1e-3).all()


def test_removed_items_are_never_recommended(shop: Path, tmp_path: Path) -> None:
    """Their rows and ids stay: in histories they mean what they meant."""
    (tmp_path / "ids.txt").write_text("i3\n\n i3 \n")
    folder = added(shop, tmp_path / "more", "--remove", tmp_path / "ids.txt")
    pq.write_table(pa.table({"item_id": ["i7", "i33", "i3"]}), tmp_path / "ids.parquet")
    run_here(add_items.main, [folder, "--remove", tmp_path / "ids.parquet", "--in-place"])
    gone = {"i3", "i7", "i33"}
    whole = Recommender.from_pretrained(added(shop, tmp_path / "all"))
    choices: list[dict[str, Any]] = [{}, {"size": 4}, {"vectors": 4}]
    for options in choices:
        recommender = Recommender.from_pretrained(folder, **options)
        all_items = Recommender.from_pretrained(tmp_path / "all", **options)
        assert recommender.item_ids == whole.item_ids and recommender.removed.tolist() == [3, 7, 33]
        histories: list[list[int | str]] = [["i3", "i33"], ["i5"], []]
        lists: list[dict[str, Any]] = [{}, {"allow": ["i3", "i4"]}, {"deny": [["i4"], None, []]}, {"deny": ["i4"]}]
        for filters in [*lists, {"deny": []}]:
            found = recommender.recommend(histories, 50, False, **filters)
            expected = all_items.recommend(histories, 50, False, **filters)
            for one, other in zip(found, expected, strict=True):
                kept = [item for item in other if item.item_id not in gone]
                assert [item[:2] for item in one] == [item[:2] for item in kept]
                assert [item.score for item in one] == pytest.approx([item.score for item in kept], rel=1e-5, abs=1e-6)
        session = recommender.session(["i3"])
        assert gone.isdisjoint(item.item_id for item in session.recommend(50, deny=["i4"]))
        together = recommender.sessions(2)
        assert all(gone.isdisjoint(item.item_id for item in items) for items in together.recommend(50))
        restored = recommender.session()
        restored.restore(all_items.session(["i3", "i33"]).state())
        assert restored.seen.tolist() == [3, 33]
    popular = recommender.model.popular(1, 50)[0]
    assert not {3, 7, 33} & set(popular.tolist()[0])
    config = json.loads((folder / "config.json").read_text())
    assert (config["format_version"], config["num_removed"], config["num_items"]) == (4, 3, NUM_ITEMS)
    assert config["catalogue_changes"] == {"added": 9, "updated": 0, "removed": 3}


@pytest.mark.parametrize("method", ["exact", "funnel", "ann"])
def test_no_search_finds_a_removed_item(tmp_path: Path, method: str) -> None:
    """Those that most users would have got first."""
    if method == "ann":
        pytest.importorskip("faiss")
    torch.manual_seed(0)
    folder = write_random_export(tmp_path / "export", random_export(num_items=5000))
    before = Recommender.from_pretrained(folder)
    histories = [[before.item_ids[17 * user], before.item_ids[user]] for user in range(40)]
    gone = {item.item_id for items in before.recommend(histories, 3) for item in items}
    (tmp_path / "ids.txt").write_text("\n".join(map(str, gone)))
    run_here(add_items.main, [folder, "--remove", tmp_path / "ids.txt", "--in-place"])
    after = Recommender.from_pretrained(folder, retrieval=method, recall=0.9)
    found = after.recommend(histories, 10)
    assert all(len(items) == 10 and gone.isdisjoint(item.item_id for item in items) for items in found)
    expected = before.recommend(histories, 10, deny=sorted(map(str, gone)))
    pairs = zip(found, expected, strict=True)
    shared = np.mean([len({item.item_id for item in a} & {item.item_id for item in b}) / 10 for a, b in pairs])
    assert shared > (0.85 if method != "exact" else 0.999)


def test_an_export_that_is_written_again_keeps_its_removals(tmp_path: Path) -> None:
    folder = write_random_export(tmp_path / "export")
    (tmp_path / "ids.txt").write_text("i4")
    run_here(add_items.main, [folder, "--remove", tmp_path / "ids.txt", "--in-place"])
    write_export(read_export(folder), tmp_path / "again", replace(read_export_parts(folder), dtype="int8"), False)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again")]
    for key in ("format_version", "num_removed", "catalogue_changes", "num_items"):
        assert configs[0][key] == configs[1][key]
    assert Recommender.from_pretrained(tmp_path / "again").removed.tolist() == [4]


def test_exports_of_older_versions(tmp_path: Path) -> None:
    """The first version had no hashes; what is written is of today's."""
    folder = write_random_export(tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    newer = ("format", "dtype", "quality", "feature_encoders", "sha256", "sha256_of")
    older = {key: value for key, value in config.items() if key not in newer} | {"format_version": 1}
    (folder / "config.json").write_text(json.dumps(older))
    (folder / "README.md").unlink()
    (folder / "evaluation.json").write_text("{}")
    (tmp_path / "ids.txt").write_text("i4")
    with pytest.raises(UserError, match="does not record what made its feature 'text': it is of an older version"):
        run_here(add_items.main, [folder, "--in-place", "--encoded", tmp_path])
    run_here(add_items.main, [folder, "--remove", tmp_path / "ids.txt", "--in-place"])
    assert Recommender.from_pretrained(folder).removed.tolist() == [4]
    assert sorted(json.loads((folder / "config.json").read_text())["sha256_of"]) == [
        path.name for path in sorted(folder.iterdir()) if path.name != "config.json"
    ]
    assert not (folder / "evaluation.json").exists()


def test_older_versions_refuse_an_export_with_removed_items(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.txt").write_text("i3")
    run_here(add_items.main, [shop / "export", "--remove", tmp_path / "ids.txt", "--output", tmp_path / "less"])
    with pytest.raises(
        UserError, match="does not recommend 1 of the items of store .*, such as 'i3': evaluate it before"
    ):
        evaluate_here(tmp_path / "less")
    monkeypatch.setattr(export_config, "READ_VERSIONS", (1, 2, 3))
    with pytest.raises(UserError, match="format_version 4; this fmrl_dist reads 1 to 3: update fmrl_dist"):
        Recommender.from_pretrained(tmp_path / "less")


def test_an_update_replaces_features_and_brings_back(shop: Path, tmp_path: Path) -> None:
    """New items' features given to old ones: their embeddings are those of the new items."""
    (tmp_path / "ids.txt").write_text("i2")
    less = tmp_path / "less"
    run_here(add_items.main, [shop / "export", "--remove", tmp_path / "ids.txt", "--output", less])
    known = ["i5", "i2", "i30"]
    encoded = renamed(shop, tmp_path / "encoded", known)
    run_here(add_items.main, [less, "--encoded", encoded, "--update", "--in-place"])
    before, after = read_export(shop / "export").items, read_export(less).items
    new = read_export(added(shop, tmp_path / "more")).items[NUM_KNOWN : NUM_KNOWN + 3]
    torch.testing.assert_close(after[[5, 2, 30]], new, rtol=1e-6, atol=1e-6)
    others = [row for row in range(NUM_KNOWN) if row not in (5, 2, 30)]
    assert torch.equal(after[others], before[others])
    recommender = Recommender.from_pretrained(less)
    assert recommender.removed.tolist() == [] and recommender.titles is not None
    assert [recommender.titles[row] for row in (5, 2, 30)] == [f"new title {number}" for number in range(3)]
    assert json.loads((less / "config.json").read_text())["format_version"] == 3


def renamed(shop: Path, folder: Path, ids: list[str] | list[int]) -> Path:
    """The first of the encoded items, under other ids."""
    shutil.copytree(shop / "encoded", folder)
    table = {
        "item": range(len(ids)),
        "external_id": ids,
        "train_count": [0] * len(ids),
        "title": [f"new title {number}" for number in range(len(ids))],
    }
    pq.write_table(pa.table(table), folder / "vocab.parquet")
    tensors = {name: rows[: len(ids)].contiguous() for name, rows in load_file(folder / "features.safetensors").items()}
    save_file(tensors, folder / "features.safetensors")
    return folder


def refused(shop: Path, target: Path, *words: object) -> str:
    """The complaint of a command that must change nothing."""
    before, beside = hashes(target), sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(UserError) as complaint:
        run_here(add_items.main, [target, "--in-place", *words])
    assert hashes(target) == before
    left = sorted(path.name for path in target.parent.iterdir())
    assert [name for name in left if not name.endswith(".lock")] == beside
    return str(complaint.value)


def test_refusals(shop: Path, tmp_path: Path) -> None:
    """One clear line, and the export is as it was."""
    folder = tmp_path / "exports"
    target = shutil.copytree(shop / "export", folder / "export")
    (tmp_path / "ids.txt").write_text("i3\nnone\n")
    (tmp_path / "all.txt").write_text("\n".join(f"i{item}" for item in range(NUM_KNOWN)))
    pq.write_table(pa.table({"item_id": [3]}), tmp_path / "numbers.parquet")
    for words, complaint in [
        ((), "nothing to do"),
        (("--update",), "nothing to do"),
        (("--remove", tmp_path / "ids.txt"), "1 items to remove are not in the catalogue: 'none'"),
        (("--remove", tmp_path / "all.txt"), "no item would be left"),
        (("--remove", tmp_path / "nothing.txt"), "nothing.txt does not exist"),
        (("--remove", tmp_path / "numbers.parquet"), "1 items to remove are not in the catalogue: '3'"),
        (("--remove", tmp_path / "numbers.parquet", "--id", "x"), "has no column 'x'"),
        (("--encoded", tmp_path), "does not hold new items of this model"),
        (("--encoded", shop / "encoded", "--update"), "9 of 9 items to update are not in the catalogue: 'i31'"),
        (
            ("--encoded", renamed(shop, tmp_path / "a", ["i40", "i3"])),
            "1 of 2 new items are in the catalogue already: 'i3'",
        ),
        (("--encoded", renamed(shop, tmp_path / "b", [1, 2])), "are integers, such as 1; those of the export are text"),
        (
            (*("--encoded", renamed(shop, tmp_path / "c", ["i4"]), "--update"), "--remove", tmp_path / "four.txt"),
            "'i4' are to be updated and removed",
        ),
        (
            ("--encoded", shop / "encoded", "--feature", "a=b", "--image-columns", "a", "b", "--id", "a"),
            "--feature, --image-columns, --id: options of --items TABLE, without which they do nothing; give them to",
        ),
        (("--encoded", shop / "encoded", "--title", "name"), "--title: options of --items TABLE"),
        (("--encoded", shop / "encoded", "--encoder", "a=b", "--without", "a"), "--without, --encoder: options of"),
        (("--remove", tmp_path / "ids.txt", "--title", ""), "do nothing; leave them out with --remove alone"),
    ]:
        (tmp_path / "four.txt").write_text("i4")
        assert complaint in refused(shop, target, *words), words


def test_rows_without_an_id_are_said(shop: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "new.parquet", tmp_path / "more"
    words = ["--items", table, "--title", "title", "--without", "vector", "--without", "image", "--output", output]
    for blank in (1, 3):
        ids, texts = [" "] * blank + [f"n{item}" for item in range(150 - blank)], ["a brush"] * 150
        pq.write_table(pa.table({"item_id": ids, "title": texts, "words": texts}), table)
        ended = run_module("fmrl_dist.add_items", shop / "export", *words, *(["--overwrite"] if blank > 1 else []))
        if blank == 1:
            assert ended.returncode == 0, ended.stderr
            assert f"left out 1 rows of {table} that cannot be used (no id: 1)" in ended.stdout
            assert "added 149, updated 0" in ended.stdout
    why = "3 of 150 rows cannot be used (no id: 3), more than a share of 0.01; mend the table, or check --id"
    assert ended.returncode == 2 and why in ended.stderr


def test_other_encoders_are_refused(shop: Path, tmp_path: Path) -> None:
    target = shutil.copytree(shop / "export", tmp_path / "exports" / "export")
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {"revision": "0" * 64},
            "feature 'terms' of the new items is not the one that the model was trained on: revision",
        ),
        ({"recipe": {"text": ["{title}"]}}, "text was ['{words}'], now ['{title}']"),
    ]
    for change, complaint in changes:
        other = shutil.copytree(shop / "encoded", tmp_path / "other", dirs_exist_ok=True)
        encoders = json.loads((shop / "encoded" / "encoders.json").read_text())
        recipe = encoders["terms"]["recipe"] | change.get("recipe", {})
        encoders["terms"] |= change | {"recipe": recipe}
        (other / "encoders.json").write_text(json.dumps(encoders))
        assert complaint in refused(shop, target, "--encoded", other)
    damaged = target / "vocab.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert "is damaged (ValueError: vocab.parquet is not what" in refused(shop, target, "--encoded", shop / "encoded")


def test_killed_midway(shop: Path, tmp_path: Path) -> None:
    """The old export is whole, and the next change clears away what was left."""
    target = shutil.copytree(shop / "export", tmp_path / "exports" / "export")
    before = hashes(target)
    script = (
        "import os, signal, sys\n"
        "from fmrl_dist import add_items\n"
        "from fmrl_dist.deploy.catalogue import changes\n"
        "changes.export_config_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "add_items.main(sys.argv[1:])\n"
    )
    words = [str(target), "--in-place", "--encoded", str(shop / "encoded")]
    command = [sys.executable, "-c", script, *words]
    killed = subprocess.run(command, cwd=REPOSITORY, env=clean_environment(), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert hashes(target) == before and len(list(target.parent.iterdir())) > 1
    run_here(add_items.main, words)
    assert len(read_export(target).items) == NUM_ITEMS
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_an_evaluation_that_ends_meanwhile_is_of_the_catalogue_before(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that ends while items are encoded, and one between the last look and the replacement."""
    target = shutil.copytree(shop / "export", tmp_path / "export")
    listing = add_items.evaluations_in

    def read_slowly(*arguments: Any) -> EncodedItems:
        (target / "evaluation.json").write_text("{}")
        (target / "notes.txt").write_text("mine")
        return read_encoded(*arguments)

    def list_early(folder: Path) -> list[str]:
        found = listing(folder)
        (target / "evaluation-valid.json").write_text("{}")
        return found

    monkeypatch.setattr(add_items, "read_encoded", read_slowly)
    monkeypatch.setattr(add_items, "evaluations_in", list_early)
    run_here(add_items.main, [target, "--in-place", "--encoded", shop / "encoded"])
    assert sorted(hashes(target)) == sorted([*hashes(shop / "export"), "notes.txt"])
    assert "note: evaluation.json were of the catalogue before" in capsys.readouterr().out


def test_an_export_that_changes_meanwhile(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--output`` does not lock what it reads: rows of one export beside those of another would be no export."""
    source, other = (shutil.copytree(shop / "export", tmp_path / name) for name in ("source", "other"))
    (tmp_path / "ids.txt").write_text("i3")
    run_here(add_items.main, [other, "--remove", tmp_path / "ids.txt", "--in-place"])

    def read_slowly(*arguments: Any) -> EncodedItems:
        shutil.rmtree(source)
        shutil.copytree(other, source)
        return read_encoded(*arguments)

    monkeypatch.setattr(add_items, "read_encoded", read_slowly)
    with pytest.raises(UserError, match="source was changed or removed meanwhile; nothing is written: begin again"):
        added(shop, tmp_path / "more", source=source)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("name", ["mine.npy", "item_embeddings.npy", "mine.onnx", "fit-mine.safetensors"])
def test_arrays_of_others_are_not_removed(shop: Path, tmp_path: Path, name: str) -> None:
    """An export's own files are those that its config lists."""
    target = shutil.copytree(shop / "export", tmp_path / "exports" / "export")
    (target / name).write_text("mine")
    assert f"export holds {name}, which an export does not have" in refused(shop, target, "--encoded", shop / "encoded")


def test_changes_are_not_undone_by_an_export(shop: Path, tmp_path: Path) -> None:
    target = shutil.copytree(shop / "export", tmp_path / "export")
    (tmp_path / "ids.txt").write_text("i3")
    run_here(add_items.main, [target, "--remove", tmp_path / "ids.txt", "--in-place"])
    before = hashes(target)
    with pytest.raises(UserError, match=r"was changed by .*add_items \(items: 0 added, 0 updated, 1 removed\), which"):
        export_of(shop, target, "--overwrite")
    exported, parts = read_export(target), read_export_parts(target)
    with pytest.raises(UserError, match="which --overwrite would undo; choose another --output, or remove the folder"):
        write_export(exported, target, replace(parts, changes={}), True)
    assert hashes(target) == before
    write_export(exported, target, parts, True)  # with its changes
    assert Recommender.from_pretrained(target).removed.tolist() == [3]


def write_encoded(folder: Path, ids: list[str], values: torch.Tensor) -> Path:
    """What shards.encode makes of a precomputed feature "text"."""
    folder.mkdir()
    made_by = {"encoder": "npy", "revision": "b", "recipe": {"source": "npy"}}
    (folder / "encoders.json").write_text(json.dumps({"text": made_by}))
    mask = values.any(1)
    save_file({"text": values.half(), "text.mask": mask}, folder / "features.safetensors")
    (folder / "vocab.parquet").write_bytes(vocabulary_bytes(ids, titles=False))
    return folder


def test_learned_ids_stay(tmp_path: Path) -> None:
    """An update moves an item by what its features moved; a later one borrows the id of the item nearest to it."""
    model = random_model(num_items=30, id_width=8)
    features, present = torch.randn(30, 3).half(), torch.ones(30, 1, dtype=torch.bool)
    items = embed_catalogue(model.encoder, features, present).detach()
    exported = replace(random_export(model), items=items)
    made_by = {"text": {"encoder": "npy", "revision": "a", "recipe": {"source": "npy"}}}
    write_export(exported, tmp_path / "export", ExportParts(vocabulary_bytes(ids_of(30)), made_by, {}), False)
    words = [tmp_path / "export", "--in-place", "--encoded"]
    first = write_encoded(tmp_path / "first", ["new", "newer"], torch.randn(2, 3))
    with pytest.raises(UserError, match=r"first holds no titles, and the items of .* have some; encode again with"):
        run_here(add_items.main, [*words, first])
    run_here(add_items.main, [*words, first, "--title", ""])
    values = torch.stack((torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3), torch.zeros(3)))
    run_here(add_items.main, [*words, write_encoded(tmp_path / "second", ["newer", "i7", "new"], values), "--update"])
    after, encoder = read_export(tmp_path / "export").items, projection_of(model)
    with torch.no_grad():
        moved = encoder.normalize(values[:1], present[:1]) @ encoder.weight.T + encoder.bias
        of_seven = (encoder.bias + encoder.stand_ins[0]).clone()
        assert encoder.id_table is not None
        unknown = of_seven.clone()  # without features it is like no other item
        of_seven[:8] += encoder.id_table[7]
        of_features = encoder.normalize(features, present) @ encoder.weight.T + encoder.bias
        nearest = int(F.cosine_similarity(of_features, moved).argmax())
        moved[0, :8] += 0.8 * encoder.id_table[nearest]
    torch.testing.assert_close(after[30], unknown, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after[31], moved[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after[7], of_seven, rtol=1e-6, atol=1e-6)
    assert len(after) == 32 and torch.equal(after[:7], items[:7]) and torch.equal(after[8:30], items[8:])
    assert Recommender.from_pretrained(tmp_path / "export").titles[30:] == [None, None]  # type: ignore[index]


def test_an_item_that_does_not_fit_the_dtype(tmp_path: Path) -> None:
    model = random_model(num_items=30)
    with torch.no_grad():
        projection_of(model).weight.fill_(60.0)
    made_by = {"text": {"encoder": "npy", "revision": "a", "recipe": {"source": "npy"}}}
    parts = ExportParts(vocabulary_bytes(ids_of(30), titles=False), made_by, {}, dtype="float16")
    write_export(random_export(model), tmp_path / "export", parts, False)
    encoded = write_encoded(tmp_path / "encoded", ["new"], torch.full((1, 3), 60_000.0))
    with pytest.raises(
        UserError, match="^the items cannot be stored as float16: .*65,504.*; export the run as float32, and"
    ):
        run_here(add_items.main, [tmp_path / "export", "--in-place", "--encoded", encoded])


def test_a_model_of_ids_alone_has_nothing_for_new_items(tmp_path: Path) -> None:
    model = FMRLRec((4, 8), 1, {}, num_items=30).eval()
    write_random_export(tmp_path / "export", random_export(model))
    with pytest.raises(UserError, match="reads no features: nothing tells it what a new item is; train again"):
        run_here(add_items.main, [tmp_path / "export", "--in-place", "--encoded", tmp_path])
