"""An export is a slice: by itself it ranks like the large model at its sizes."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor

from fmrl_dist import evaluate, export
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.checkpoint.export import writing
from fmrl_dist.checkpoint.export.files import FILES, ITEMS_FILE
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts, Origin
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.checkpoint.export.writing import write_export
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.checkpoint.restore import build_recommender
from fmrl_dist.config.loading import config_from_dict, load_config
from fmrl_dist.data.batches import EvaluationBlock, evaluation_blocks
from fmrl_dist.data.item_table import load_item_table
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.rank_counts import RankCounts
from fmrl_dist.model.export_config import CONFIG_FILE
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from shards.store.builder import build_store
from tests.fixtures.ranking import target_ranks
from tests.fixtures.training import (
    contents,
    evaluate_here,
    evaluation,
    make_shop,
    refusal,
    run_here,
    run_module,
    shop_values,
    train_here,
    write_shop,
)

SIZES = (4, 8, 16)
MODEL_WORDS = ("--model.sizes", "[4, 8, 16]", "--model.width", 16, "--model.depth", 2, "--eval.size", 16)
ID_TABLE = ("--model.id_table", "true")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop whose items have titles, and colours that standardize must shift and scale."""
    root = tmp_path_factory.mktemp("export")
    write_shop(root / "raw")
    np.save(root / "raw" / "colour.npy", 5 * np.load(root / "raw" / "colour.npy") + 3)
    values = shop_values(root)
    values["data"]["items"] = {"title": "title"}
    (root / "shop.yaml").write_text(yaml.safe_dump(values))
    build_store(load_config(root / "shop.yaml"))
    return root / "shop.yaml"


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    return train_here(shop, shop.parent / "run", *MODEL_WORDS)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def exported(run: Path) -> Path:
    """The export of size 8."""
    export_here(run, 8)
    return run / "export-8"


def export_here(run: Path, size: int, *words: object) -> None:
    run_here(export.main, ["--checkpoint", run, "--size", size, *words])


# The same figures as the large model


@pytest.mark.parametrize("words", [(), ("--mask-seen",), ("--split", "valid")], ids=["test", "masked", "valid"])
def test_every_size_evaluates_as_that_size_of_the_run(run: Path, words: tuple[str, ...]) -> None:
    name = {(): "evaluation", ("--mask-seen",): "evaluation-masked"}.get(words, "evaluation-valid")
    evaluate_here(run, *words, "--no-cut-vectors")  # which are of the whole network
    for size in SIZES:
        export_here(run, size)
        evaluate_here(run / f"export-{size}", *words, "--no-cut-vectors")
        found, expected = evaluation(run / f"export-{size}", name), evaluation(run, name)
        assert list(found["sizes"]) == [str(m) for m in SIZES if m <= size]
        assert up_to(size, found) == up_to(size, expected)
    assert len({json.dumps(row) for row in evaluation(run, name)["sizes"].values()}) == len(SIZES)


def up_to(size: int, figures: Any) -> Any:
    """An evaluation's figures without those of larger sizes."""
    if not isinstance(figures, dict):
        return figures
    is_kept = {name: not name.isdigit() or int(name) <= size for name in figures}
    return {name: up_to(size, value) for name, value in figures.items() if is_kept[name]}


@pytest.mark.parametrize(
    "words", [(), ("--model.id_table", "true"), ("--model.features", "[]", "--model.id_table", "true")]
)
def test_ranks_are_those_of_the_large_model(shop: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    run = train_here(shop, tmp_path / "run", *MODEL_WORDS, *words, "--train.max_steps", 6)
    checkpoint = load_checkpoint(run)
    config = config_from_dict(checkpoint.config)
    store = Store.open(config.store.path)
    large = build_recommender(checkpoint, config, store, CPU)
    blocks = list(evaluation_blocks(store, "test", config.data.max_length, range(len(store.manifest.splits["test"]))))
    for size in SIZES:
        export_here(run, size)
        small = read_export(run / f"export-{size}")
        assert small.model.sizes == tuple(m for m in SIZES if m <= size)
        for block in blocks:
            assert_same_ranks(large, small, block)


@torch.no_grad()
def assert_same_ranks(large: ExportedModel, small: ExportedModel, block: EvaluationBlock) -> None:
    """Scores equal to 1e-6 of the summed magnitudes; target ranks equal except for scores that near to the target's."""
    z, z_small = (
        r.model(r.items[block.items], block.starts, block.from_start)[block.starts[1:] - 1] for r in (large, small)
    )
    sizes = small.model.sizes
    ranks = target_ranks(z_small, small.items, block, sizes, mask_seen=False)
    for j, size in enumerate(sizes):
        scores = z[:, :size] @ large.items[:, :size].T
        near = 1e-6 * (z[:, :size].abs() @ large.items[:, :size].abs().T).amax().clamp_min(1)
        assert (z_small[:, :size] @ small.items[:, :size].T - scores).abs().max() <= near
        target = scores.gather(1, block.targets[:, None])
        best, worst = 1 + (scores > target + near).sum(1), (scores >= target - near).sum(1)
        found = ranks[j]
        assert bool(((best <= found) & (found <= worst)).all())


@st.composite
def models(draw: st.DrawFn) -> tuple[FMRLRec, int, int]:
    """A model with every tensor drawn, the number of its items, and one of its sizes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    sizes = list(itertools.accumulate(draw(st.lists(st.integers(4, 12), min_size=1, max_size=4))))
    names = draw(st.sets(st.sampled_from(["text", "image", "price"])))
    dims = {name: draw(st.integers(1, 6)) for name in sorted(names)}
    num_items = draw(st.integers(1, 60))
    id_rows = num_items if draw(st.booleans()) or not dims else 0
    options: dict[str, Any] = {"input_norm": draw(st.booleans()), "output_norm": draw(st.booleans())}
    options |= {"id_width": draw(st.sampled_from([0, *sizes]))}
    model = FMRLRec(sizes, draw(st.integers(1, 3)), dims, id_rows, dropout=0.3, **options).eval()
    for values in itertools.chain(model.parameters(), model.buffers()):
        values.data.normal_(0, 0.5)
    return model, num_items, draw(st.sampled_from(sizes))


def recommender_of(model: FMRLRec, values: Tensor, present: Tensor) -> ExportedModel:
    with torch.no_grad():
        items = model.encoder(model.encoder.normalize(values, present), present)
    width = items.shape[1]
    rotation = torch.eye(width)
    search = (torch.eye(width).flip(0), rotation, None)[len(items) % 3]  # one may be both; older exports have one only
    rotations: dict[str, Any] = {"rotation": rotation, "search_rotation": search}
    return ExportedModel(model, items, 50, False, Origin("0", 1, "a", "b", "c"), **rotations)


@settings(max_examples=40)
@given(case=models(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_an_export_of_any_model_ranks_like_the_model(case: tuple[FMRLRec, int, int], lengths: list[int]) -> None:
    """Any width, sizes, depth, features (some missing, all scaled and shifted), with an id table or without."""
    model, num_items, size = case
    values = torch.randn(num_items, sum(model.encoder.feature_dims.values()))
    present = torch.rand(num_items, len(model.encoder.feature_dims)) < 0.7
    small = recommender_of(model.truncate(size), values, present)
    with tempfile.TemporaryDirectory() as folder:
        write_export(small, Path(folder) / "export", ExportParts(b"unused here", {}, {}), overwrite=False)
        found = read_export(Path(folder) / "export")
    assert_same_recommender(found, small)
    events = torch.randint(num_items, (sum(lengths),))
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    block = EvaluationBlock(
        users=torch.arange(len(lengths)),
        items=events,
        starts=starts,
        from_start=torch.ones(len(lengths), dtype=torch.bool),  # an empty history is served by its start position
        targets=torch.randint(num_items, (len(lengths),)),
        seen=events,
        seen_starts=starts,
    )
    assert_same_ranks(recommender_of(model, values, present), found, block)


def assert_same_recommender(found: ExportedModel, expected: ExportedModel) -> None:
    rotations: dict[str, Any] = {"rotation": expected.rotation, "search_rotation": expected.search_rotation}
    assert replace(found, model=expected.model, items=expected.items, **rotations) == expected
    for name, matrix in rotations.items():
        assert torch.equal(*(torch.tensor([]) if each is None else each for each in (getattr(found, name), matrix)))
    assert torch.equal(found.items, expected.items)
    assert found.model.arguments == expected.model.arguments
    tensors, wanted = found.model.state_dict(), expected.model.state_dict()
    assert list(tensors) == list(wanted)
    assert all(tensors[name].dtype == torch.float32 and torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert [n for n, p in found.model.named_parameters() if p.requires_grad] == [
        n for n, _ in found.model.named_parameters()
    ]
    assert not found.model.training


# The folder


def test_the_command_prints_what_it_wrote(run: Path) -> None:
    result = run_module("fmrl_dist.export", "--checkpoint", run, "--size", 8)
    assert (result.returncode, result.stderr) == (0, "")
    folder = run / "export-8"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert len({(folder / name).stat().st_mode for name in FILES}) == 1
    num_bytes = {name: (folder / name).stat().st_size for name in FILES}
    num_parameters = sum(parameter.numel() for parameter in FMRLRec.from_pretrained(folder).parameters())
    first, *lines, last = result.stdout.splitlines()
    assert first == f"size 8: {num_parameters:,} parameters, 40 items"
    assert lines[0].startswith("NDCG@10 on validation (100 users, 40 items, leave-one-out, ties count half)")
    assert [row.split() for row in lines if " bytes " in row] == [
        *([f"{count:,}", "bytes", name] for name, count in sorted(num_bytes.items())),
        [f"{sum(num_bytes.values()):,}", "bytes", "total"],
    ]
    assert last == f"written: {folder}"


@pytest.mark.parametrize("size", SIZES)
def test_files_hold_the_slice(run: Path, shop: Path, size: int) -> None:
    export_here(run, size)
    folder = run / f"export-{size}"
    checkpoint = load_checkpoint(run)
    config = config_from_dict(checkpoint.config)
    store = Store.open(config.store.path)
    large = build_recommender(checkpoint, config, store, CPU)
    small = large.model.truncate(size)
    tensors = load_file(folder / MODEL_FILE)
    assert set(tensors) == set(small.state_dict())
    assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in small.state_dict().items())
    ((name, items),) = load_file(folder / ITEMS_FILE).items()
    assert name == "item_embeddings" and items.dtype == np.float32 and items.shape == (40, size)
    np.testing.assert_allclose(items, large.items[:, :size], rtol=0, atol=1e-6)
    assert (folder / "vocab.parquet").read_bytes() == (store.path / "vocab.parquet").read_bytes()
    assert pq.read_table(folder / "vocab.parquet").column_names == ["item", "external_id", "train_count", "title"]
    found = json.loads((folder / CONFIG_FILE).read_text())
    assert found.pop("sha256") == json_sha256(found)
    assert found.pop("sha256_of") == {name: file_sha256(folder / name) for name in FILES if name != CONFIG_FILE}
    assert found.pop("quality")["users"] == 100
    assert found == {
        "format_version": 3,
        "format": "safetensors",
        "dtype": "float32",
        "model": {
            "sizes": [m for m in SIZES if m <= size],
            "depth": 2,
            "feature_dims": {"vector": 6, "colour": 4},
            "num_items": 0,
            "id_width": 0,
            "dropout": 0.2,
            "lru_dropout": 0.2,
            "r_min": 0.0,
            "r_max": 0.1,
            "input_norm": False,
            "output_norm": False,
        },
        "num_items": 40,
        "max_length": 50,
        "predict_first": True,
        "normalize": False,
        "feature_encoders": {
            name: {"encoder": "npy", "revision": file_sha256(shop.parent / "raw" / f"{name}.npy"), "recipe": recipe}
            for name, recipe in {"vector": {"source": "npy"}, "colour": {"source": "npy"}}.items()
        },
        "origin": {
            "fmrl_dist_version": "0.1.0",
            "step": checkpoint.state.best_step,
            "training_manifest_sha256": store.manifest.sha256,
            "manifest_sha256": store.manifest.sha256,
            "store": str(store.path),
        },
    }


def test_the_model_needs_two_files_and_no_random_numbers(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in (CONFIG_FILE, MODEL_FILE):
        shutil.copy(exported / name, tmp_path / "two")
    before = torch.get_rng_state()
    model = FMRLRec.from_pretrained(str(tmp_path / "two"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.width == 8 and not model.training
    z = model(torch.zeros(0, 8), torch.tensor([0, 0]), torch.tensor([True]))
    z.sum().backward()  # it can be trained further
    assert model.encoder.bias.grad is not None


def test_another_stores_catalogue(run: Path, tmp_path: Path) -> None:
    """A model without an id table is exported with a new catalogue; it is evaluated on stores of its items only."""
    store = make_shop(tmp_path / "other", num_items=50).parent / "store"
    export_here(run, 8, "--store", store, "--output", tmp_path / "new")
    recommender = read_export(tmp_path / "new")
    assert len(recommender.items) == 50 and recommender.origin.store == str(store)
    assert recommender.origin.manifest_sha256 != recommender.origin.training_manifest_sha256
    evaluate_here(tmp_path / "new")
    run_here(evaluate.main, ["--checkpoint", tmp_path / "new", "--store", shop_store(run), "--threads", 1])
    assert len(list((tmp_path / "new").glob("evaluation-on-*.json"))) == 1  # its items are all among the 50
    export_here(run, 8)
    before = contents(run / "export-8")
    line = refusal(evaluate.main, "--checkpoint", run / "export-8", "--store", store)
    assert f"store {store} has 10 items that export {run / 'export-8'} does not know" in line
    assert contents(run / "export-8") == before


@pytest.mark.parametrize("part", [(), ("--part", "1/2")])
def test_an_export_that_changes_while_it_is_evaluated(
    exported: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[str, ...]
) -> None:
    """Figures of one are not written as those of the other."""
    rank = evaluate.count_deployments

    def rank_slowly(*arguments: Any) -> RankCounts:
        found = rank(*arguments)
        text = (exported / CONFIG_FILE).read_text()
        (exported / CONFIG_FILE).write_text(f"{text} ")
        return found

    monkeypatch.setattr(evaluate, "count_deployments", rank_slowly)
    before = sorted(path.name for path in exported.iterdir())
    line = refusal(evaluate.main, "--checkpoint", exported, "--threads", 1, *part)
    assert line == (
        f"error: export {exported} was changed or removed while it was evaluated; nothing is written: evaluate it again"
    )
    assert sorted(path.name for path in exported.iterdir()) == before


def shop_store(run: Path) -> str:
    return load_config(run / "config.yaml").store.path


def test_an_export_is_replaced_only_when_asked(run: Path, exported: Path) -> None:
    (exported / "evaluation.json").write_text("of the previous export")
    before = contents(exported)
    line = refusal(export.main, "--checkpoint", run, "--size", 8)
    assert line == f"error: export {exported} exists; keep it, or replace it with --overwrite"
    assert contents(exported) == before
    export_here(run, 4, "--output", exported, "--overwrite")
    assert sorted(path.name for path in exported.iterdir()) == sorted(FILES)
    assert FMRLRec.from_pretrained(exported).width == 4
    left = {path.name for path in run.iterdir() if path.name.startswith((".", "export"))}
    assert left == {".lock", "export-8"}


@pytest.mark.parametrize(("module", "moment"), [(export, "build_recommender"), (writing, "save_tensors")])
def test_an_export_that_another_process_has_written_meanwhile_stays(
    module: ModuleType, moment: str, run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock, or, where a file system has no locks, while this process writes."""
    output, before, original = tmp_path / "new", contents(exported), getattr(module, moment)

    def end_other_export(*arguments: object) -> object:
        shutil.copytree(exported, output, dirs_exist_ok=True)
        return original(*arguments)

    monkeypatch.setattr(module, moment, end_other_export)
    words = ["--checkpoint", run, "--size", 4, "--output", output]
    assert f"export {output} exists; keep it, or replace it with --overwrite" in refusal(export.main, *words)
    assert contents(output) == before


def test_nothing_but_an_export_is_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    before = contents(tmp_path)
    line = refusal(export.main, "--checkpoint", run, "--size", 8, "--output", tmp_path / "mine", "--overwrite")
    assert line == f"error: {tmp_path / 'mine'} exists and is not an export; choose another --output"
    assert contents(tmp_path) == before


def test_refusals_write_nothing(run: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(shop_store(run), store)
    (store / "vocab.parquet").unlink()
    best = (run / "checkpoints" / "best").resolve()
    other = next(path for path in (run / "checkpoints").resolve().glob("step-*") if path != best)
    load_item_table(Store.open(tmp_path / "store"), None)  # unpacked beside the store on first use
    before = contents(tmp_path)
    for words, complaint in {
        (run, "--size", 48): "error: size 48 was not trained; the trained sizes are [4, 8, 16]",
        (run, "--size", 8, "--store", store): f"store {store} has no vocab.parquet",
        (run, "--size", 8, "--store", tmp_path / "gone"): "gone does not exist; build it",
        (other, "--size", 8): f"checkpoint {other} is not the best of its run; choose a folder with --output",
        (tmp_path / "nowhere", "--size", 8): "nowhere holds no checkpoint; expected a run folder",
        (run, "--size", "small"): "invalid int value: 'small'",
    }.items():
        assert complaint in refusal(export.main, "--checkpoint", *words)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_is_not_the_best(run: Path, tmp_path: Path) -> None:
    latest = (run / "checkpoints" / "latest").resolve()
    export_here(latest, 8, "--output", tmp_path / "latest")
    assert read_export(tmp_path / "latest").origin.step == load_checkpoint(latest).state.step


@pytest.mark.parametrize("config", ['{"model_type": "bert"}', "[]", "not JSON"])
def test_a_model_folder_of_others_is_never_replaced(config: str, run: Path, tmp_path: Path) -> None:
    """Any model of the Hub has a config.json."""
    others = tmp_path / "bert"
    others.mkdir()
    (others / "config.json").write_text(config)
    (others / "model.safetensors").write_bytes(b"theirs")
    before = contents(others)
    line = refusal(export.main, "--checkpoint", run, "--size", 8, "--output", others, "--overwrite")
    assert f"{others} exists and is not an export; choose another --output" in line
    assert contents(others) == before


def test_an_export_with_a_file_of_others_is_not_replaced(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "export"
    export_here(run, 8, "--output", exported)
    run_here(evaluate.main, ["--checkpoint", exported, "--threads", 1])
    (exported / f".evaluation.json.{'0a' * 8}").touch()  # of an evaluation that was killed
    export_here(run, 4, "--output", exported, "--overwrite")  # an evaluation's files are ours
    assert not list(exported.glob(".*"))
    (exported / f".notes.md.{'0a' * 8}").touch()
    (exported / "notes.md").write_text("mine")
    before = contents(exported)
    line = refusal(export.main, "--checkpoint", run, "--size", 8, "--output", exported, "--overwrite")
    assert f"{exported} holds .notes.md.{'0a' * 8}, notes.md, which an export does not have; move it away" in line
    assert contents(exported) == before
