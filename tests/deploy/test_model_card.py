"""The model card: its header is what the Hub's own reader understands, its figures are the run's, its code runs."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fmrl_dist import add_items, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.export.reading import intact_files, read_export, read_export_parts
from fmrl_dist.checkpoint.export.writing import write_export
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.batches import evaluation_blocks
from fmrl_dist.data.store.reader import Store
from fmrl_dist.model.stored_tensors import restored
from shards.store.builder import build_store
from tests.fixtures.checkpoints import flip
from tests.fixtures.training import contents, evaluate_here, evaluation, make_shop, refusal, run_here, train_here

SIZES = ["4", "8", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With figures of both deployments."""
    root = tmp_path_factory.mktemp("card")
    words = ["--model.sizes", "[4, 8, 16]", "--model.width", 16, "--eval.size", 16, "--eval.cut_vectors", "true"]
    return train_here(make_shop(root), root / "run", *words, "--train.max_steps", 2)


def card_of(run: Path, output: Path, *words: object) -> tuple[dict[str, Any], str]:
    """Header and text of the card of an export."""
    run_here(export.main, ["--checkpoint", run, "--output", output, *words])
    empty, header, text = (output / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(header), text


def values_of(header: dict[str, Any]) -> dict[str, float]:
    (model,) = header["model-index"]
    return {metric["name"]: metric["value"] for result in model["results"] for metric in result["metrics"]}


def test_the_results_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    header, text = card_of(run, tmp_path / "export")
    figures = evaluation(run)
    masked, expected = figures["masked"], {}
    for name, key in {"cut network": "sizes", "cut vectors": "vectors"}.items():
        for size in figures[key]:
            for metric, spelled in {"ndcg@10": "NDCG@10", "recall@10": "Recall@10"}.items():
                expected[f"{spelled}, all items, size {size}, {name}"] = figures[key][size][metric]
                expected[f"{spelled}, seen items masked, size {size}, {name}"] = masked[key][size][metric]
    assert len(expected) == 4 * (3 + 2)
    assert values_of(header) == pytest.approx(expected)
    dataset = header["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"type": "custom", "name": "store, 100 users", "config": "size 4, cut network", "split": "test"}
    row = f"| 16 | cut network | {figures['sizes']['16']['ndcg@10']:.4f} | {masked['sizes']['16']['ndcg@10']:.4f} |"
    assert row in text
    assert f"Trained on {num_training_events(run):,} events of 113 users; the catalogue has 40 items." in text
    assert "| vector | 6 | npy |" in text
    assert "README.md" in intact_files(tmp_path / "export")


def num_training_events(run: Path) -> int:
    """Events whose items count as trained on: neither the test target of a user nor the validation target."""
    return int(pc.sum(pq.read_table(run.parent / "store" / "vocab.parquet")["train_count"]).as_py())


def test_figures_of_another_catalogue_are_not_quoted(run: Path, tmp_path: Path) -> None:
    make_shop(tmp_path / "larger", num_items=41)
    words = ["--store", tmp_path / "larger" / "store", "--measure-users", 0]
    header, text = card_of(run, tmp_path / "export", *words)
    assert "model-index" not in header and "NDCG" not in text and "Trained on" not in text
    assert "Quality on test users was not measured on this catalogue" in text
    run_here(export.main, ["--checkpoint", run, "--format", "web", "--output", tmp_path / "web", *words])
    page = json.loads((tmp_path / "web" / "model.json").read_text())
    assert page["num_items"] == 41 and page["figures"] is None


def test_a_run_of_other_cutoffs(tmp_path: Path) -> None:
    words = ["--train.max_steps", 1, "--eval.cutoffs", "[5, 20]", "--eval.metric", "ndcg@20"]
    run = train_here(make_shop(tmp_path), tmp_path / "run", *words)
    header, text = card_of(run, tmp_path / "export")
    figures = evaluation(run)
    row = [figures["sizes"]["4"], figures["masked"]["sizes"]["4"]]
    shown = [f"{part[metric]:.4f}" for metric in ("recall@20", "ndcg@20", "mrr@20") for part in row]
    assert f"| 4 | cut network | {' | '.join(shown)} |" in text
    assert "| size | deployment | Recall@20, all items | Recall@20, seen items masked | NDCG@20" in text
    assert values_of(header)["MRR@20, all items, size 4, cut network"] == row[0]["mrr@20"]
    run_here(export.main, ["--checkpoint", run, "--format", "web", "--output", tmp_path / "web"])
    assert json.loads((tmp_path / "web" / "model.json").read_text())["figures"] is None


def test_the_hubs_reader_understands_it(run: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card_of(run, tmp_path / "export", "--license", "other", "--license-name", "house rules")
    data = hub.ModelCard.load(tmp_path / "export" / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("fmrl-dist", "other", "other")
    assert data.license_name == "house rules"
    assert len(data.eval_results) == 4 * (3 + 2)
    assert {result.metric_type for result in data.eval_results} == {"ndcg_at_10", "recall_at_10"}


def test_a_smaller_size_has_figures_of_its_own_sizes(run: Path, tmp_path: Path) -> None:
    """Cut vectors are of the whole network."""
    header, text = card_of(run, tmp_path / "export", "--size", 8)
    sizes = {re.search(r"size (\d+), (.*)", name).groups() for name in values_of(header)}  # type: ignore[union-attr]
    assert sizes == {("4", "cut network"), ("8", "cut network")}
    assert "for each *m* of 4, 8." in text


def test_no_figure_and_no_licence_is_invented(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    for spoil in (lambda figures: figures["checkpoint"].update(sha256="another"), lambda figures: figures.clear()):
        figures = json.loads((run / "evaluation.json").read_text())
        spoil(figures)
        (tmp_path / "run" / "evaluation.json").write_text(json.dumps(figures))
        header, text = card_of(tmp_path / "run", tmp_path / "export", "--overwrite")
        assert "model-index" not in header and "No evaluation on test users was at hand" in text
        assert "license" not in header and "None has been stated." in text


def test_the_split_is_the_stores(run: Path, tmp_path: Path) -> None:
    """As its manifest says it; a card once told of leave-one-out whatever had been held out."""
    _, text = card_of(run, tmp_path / "one")
    assert "Of each user with at least three events the last one is the test target" in text
    shop = load_config(run / "config.yaml")
    raw = Path(shutil.copytree(shop.data.root, tmp_path / "raw"))
    table = pq.read_table(raw / "sequences.parquet")
    times = [list(range(10**9, 10**9 + len(items))) for items in table["item_ids"].to_pylist()]
    pq.write_table(table.append_column("times", pa.array(times)), raw / "sequences.parquet")
    split = ["--data.sequences.times", "times", "--data.split.by", "time", "--data.split.valid_quantile", "0.6"]
    places = ["--data.root", str(raw), "--store.path", str(tmp_path / "store")]
    config = load_config(run / "config.yaml", [*split, *places])
    build_store(config)
    (tmp_path / "shop.yaml").write_text(config.to_yaml())
    other = train_here(tmp_path / "shop.yaml", tmp_path / "other", "--train.max_steps", 1)
    _, text = card_of(other, tmp_path / "two")
    assert "at least three events" not in text
    assert f"The split: {Store.open(config.store.path).manifest.split_rule}. No event of validation or test" in text


def test_a_licence_is_named(run: Path, tmp_path: Path) -> None:
    header, text = card_of(run, tmp_path / "export", "--license", "apache-2.0")
    assert header["license"] == "apache-2.0" and text.endswith("## Licence\n\napache-2.0\n")
    for words in (["--license", "other"], ["--license-name", "mine"], ["--license", "mit", "--license-name", "mine"]):
        line = refusal(export.main, "--checkpoint", run, "--output", tmp_path / "new", *words)
        assert "--license other needs the licence's name, --license-name NAME" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [(), ("--format", "onnx"), ("--format", "onnx", "--dtype", "int8")])
def test_its_code_runs(run: Path, tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if words:
        pytest.importorskip("onnxruntime")
    _, text = card_of(run, tmp_path / "export", *words)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    with contextlib.chdir(tmp_path):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed.split()) >= 10


def test_removed_items_are_left_out_by_the_code_for_onnxruntime(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder with another name that ``add_items`` writes."""
    pytest.importorskip("onnxruntime")
    card_of(run, tmp_path / "export", "--format", "onnx")
    rows = printed_rows(tmp_path / "export", capsys)
    ids = pq.read_table(tmp_path / "export" / "vocab.parquet")["external_id"].to_pylist()
    (tmp_path / "ids.txt").write_text("".join(f"{ids[row]}\n" for row in rows[:3]))
    run_here(add_items.main, [tmp_path / "export", "--remove", tmp_path / "ids.txt", "--output", tmp_path / "less"])
    shutil.rmtree(tmp_path / "export")
    assert printed_rows(tmp_path / "less", capsys)[:7] == rows[3:]


def printed_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """What the code of a card prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    with contextlib.chdir(folder.parent):
        exec(compile(code, "README.md", "exec"), {})
    return [int(word) for word in re.findall(r"\d+", capsys.readouterr().out)]


def test_what_int8_costs_is_measured_as_an_evaluation_would(run: Path, tmp_path: Path) -> None:
    _, text = card_of(run, tmp_path / "int8", "--dtype", "int8")
    quality = json.loads((tmp_path / "int8" / "config.json").read_text())["quality"]
    run_here(export.main, ["--checkpoint", run, "--output", tmp_path / "float32"])
    for dtype in ("float32", "int8"):
        evaluate_here(tmp_path / dtype, "--split", "valid")
        figures = evaluation(tmp_path / dtype, "evaluation-valid")
        for name, part in {"all_items": figures, "masked": figures["masked"]}.items():
            expected = {size: part["sizes"][size]["ndcg@10"] for size in SIZES}
            assert quality[name][dtype] == expected
    assert (quality["users"], quality["items"], quality["split"]) == (100, 40, "valid")
    before, after = quality["masked"]["float32"]["16"], quality["masked"]["int8"]["16"]
    assert f"16: {before - after:+.5f} of {before:.4f}." in text


def test_a_loss_may_be_left_unmeasured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = card_of(run, tmp_path / "export", "--dtype", "float16", "--measure-users", 0)
    assert "NDCG@10 of dtype float16 was not measured: it was not asked for" in capsys.readouterr().out
    assert "What float16 costs was not measured: it was not asked for." in text
    card_of(run, tmp_path / "some", "--dtype", "float16", "--measure-users", 7)
    assert json.loads((tmp_path / "some" / "config.json").read_text())["quality"]["users"] == 7
    assert "--measure-users is -1" in refusal(export.main, "--checkpoint", run, "--measure-users", -1)


def test_the_loss_of_cut_vectors_is_measured_as_well(run: Path, tmp_path: Path) -> None:
    """With the very vectors that are written."""
    words = ["--dtype", "int8", "--vectors", 8]
    card_of(run, tmp_path / "int8", *words)
    quality = json.loads((tmp_path / "int8" / "config.json").read_text())["quality"]
    for dtype, export_folder in {"float32": "float32", "int8": "int8"}.items():
        if dtype == "float32":
            card_of(run, tmp_path / "float32")
        exported = read_export(tmp_path / export_folder)
        assert exported.rotation is not None
        vectors = exported.items @ exported.rotation[:, :8]
        if dtype == "int8":
            vectors = restored(load_file(tmp_path / "int8" / "item_vectors.safetensors"), "int8")["item_vectors"]
        found = {name: quality["vectors"][name][dtype] for name in ("all_items", "masked")}
        assert found == {name: {"8": pytest.approx(value)} for name, value in ndcg_of(exported, vectors).items()}


def ndcg_of(exported: ExportedModel, vectors: Tensor) -> dict[str, float]:
    """NDCG@10 of validation users among all items and among unseen ones, user by user."""
    store = Store.open(exported.origin.store)
    gains: dict[str, list[float]] = {"all_items": [], "masked": []}
    for block in evaluation_blocks(store, "valid", 50, range(len(store.manifest.splits["valid"]))):
        with torch.no_grad():
            z = exported.model(exported.items[block.items], block.starts, block.from_start)[block.starts[1:] - 1]
        scores = (z @ exported.rotation)[:, :8] @ vectors.T
        for user, target in enumerate(block.targets.tolist()):
            seen = block.seen[block.seen_starts[user] : block.seen_starts[user + 1]]
            for name, hidden in {"all_items": seen[:0], "masked": seen[seen != target]}.items():
                others = scores[user].clone()
                others[hidden] = -torch.inf
                rank = 1 + int((others > scores[user, target]).sum())
                gains[name].append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
    return {name: sum(values) / len(values) for name, values in gains.items()}


@pytest.mark.parametrize("words", [("--dtype", "int8", "--vectors", "8"), ("--format", "onnx")])
def test_the_parts_of_an_export_are_read_back(run: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """To write it again, changed."""
    if "onnx" in words:
        pytest.importorskip("onnxruntime")
    card_of(run, tmp_path / "export", *words)
    parts = read_export_parts(tmp_path / "export")
    before = contents(tmp_path / "export")
    assert parts.vocab == before["vocab.parquet"] and parts.card.encode() == before["README.md"]
    if "onnx" not in words:
        write_export(read_export(tmp_path / "export"), tmp_path / "again", parts, overwrite=False)
        again = contents(tmp_path / "again")
        assert again.keys() == before.keys()
        for name in ("README.md", "vocab.parquet", "rotation.safetensors"):
            assert again[name] == before[name], name
        found, expected = read_export(tmp_path / "again"), read_export(tmp_path / "export")
        torch.testing.assert_close(found.items, expected.items, rtol=1e-6, atol=0)
    flip(tmp_path / "export" / "README.md", 100)
    with pytest.raises(UserError, match="is damaged"):
        read_export_parts(tmp_path / "export")
