"""Runs with UniSRec's and VQRec's item encoders: trained, evaluated, resumed, exported; and what they cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fmrl_dist import evaluate, export, plan, train
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import config_from_dict, load_config
from fmrl_dist.data.batches import Packed, SampledBatch
from fmrl_dist.data.item_table import ItemTable
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.losses.nested_cross_entropy import Negatives, nested_cross_entropy, sampled_cross_entropy
from fmrl_dist.losses.settings import LossSettings
from fmrl_dist.model.export_config import VERSION_WITH_KINDS
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.training.id_table.item_draws import ItemNoise
from fmrl_dist.training.id_table.rows import IdDropout, ModelIdTable
from fmrl_dist.training.item_columns import catalogue_columns
from fmrl_dist.training.module import TrainingModule
from shards.store.builder import build_store
from tests.fixtures.engines import DDP, train_under, zero
from tests.fixtures.optional import skip_module_without
from tests.fixtures.training import (
    STEPS_PER_EPOCH,
    evaluate_here,
    evaluation,
    figures,
    records,
    refusal,
    run_here,
    shop_values,
    train_here,
    write_shop,
)

skip_module_without("faiss", "the extra ann")

UNISREC = ["--model.item_encoder", "unisrec", "--model.experts", "3", "--model.features", "[vector, colour]"]
VQREC = ["--model.item_encoder", "vqrec", "--model.codes", "8", "--model.features", "[codes, shades]"]
KINDS = {"unisrec": UNISREC, "vqrec": VQREC}
FULL = ["--loss.softmax", "full"]
SAMPLED = ["--loss.softmax", "sampled", "--loss.negatives", "stratified", "--loss.num_negatives", "8"]
IDS = ["--model.id_table", "true", "--model.id_dropout", "0.1"]
NO_DROPOUT = ["--model.dropout", "0", "--model.lru_dropout", "0"]


def make_coded_shop(root: Path, **store: Any) -> Path:
    """The shop, in which some items lack features, with codes of both; returns the config's path."""
    write_shop(root / "raw")
    for name, lacking in (("vector", [2, 11]), ("colour", [2, 5])):
        rows = np.load(root / "raw" / f"{name}.npy")
        rows[lacking] = 0
        np.save(root / "raw" / f"{name}.npy", rows)
    values = shop_values(root)
    values["data"]["features"] |= {
        "codes": {"source": "pq", "of": "vector", "parts": 3, "codes": 8},
        "shades": {"source": "pq", "of": "colour", "parts": 1, "codes": 8},
    }
    values["store"] |= store
    config = root / "shop.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    build_store(load_config(config))
    return config


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coded_shop(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def inline_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coded_shop(tmp_path_factory.mktemp("inline"), feature_mode="inline")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softmax", [FULL + IDS, FULL, SAMPLED + IDS], ids=["full-ids", "full", "sampled-ids"])
def test_from_training_to_recommendations(kind: str, softmax: list[str], shop: Path, tmp_path: Path) -> None:
    """Every size of one run, whole and cut out, gives the figures of the run's own evaluation."""
    run = train_here(shop, tmp_path / "run", *KINDS[kind], *softmax)
    losses = [record["loss"] for record in records(run)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    sizes = evaluation(run)["sizes"]
    assert sizes.keys() == {"4", "8"}
    config = config_from_dict(load_checkpoint(run).config)
    assert config.model.item_encoder == kind
    for size in (4, 8):
        folder = tmp_path / f"export-{size}"
        words = [] if size == 8 else ["--size", size]
        run_here(export.main, ["--checkpoint", run, "--output", folder, "--measure-users", 0, *words])
        model = FMRLRec.from_pretrained(folder)
        assert model.arguments["item_encoder"] == kind and model.width == size
        assert json.loads((folder / "config.json").read_text())["format_version"] == VERSION_WITH_KINDS
        evaluate_here(folder)
        assert evaluation(folder)["sizes"][str(size)] == sizes[str(size)]
        found = Recommender.from_pretrained(folder).recommend([["i1", "i2"], []], k=3)
        assert [len(items) for items in found] == [3, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softmax", [FULL + IDS, SAMPLED + IDS], ids=["full", "sampled"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, softmax: list[str], shop: Path, tmp_path: Path) -> None:
    """Dropout and the gate's noise included."""
    words = [*KINDS[kind], *softmax, "--train.epochs", 2]
    whole = train_here(shop, tmp_path / "whole", *words)
    halved = train_here(shop, tmp_path / "halved", *words, "--train.max_steps", STEPS_PER_EPOCH)
    train_here(shop, halved, *words, "--resume", "auto")
    own = [[line for line in figures(run) if line["split"] == "train"] for run in (whole, halved)]
    assert own[0] == own[1]
    tensors = [load_checkpoint(run / "checkpoints" / "latest", "latest").model for run in (whole, halved)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_from_an_inline_store(kind: str, inline_shop: Path, tmp_path: Path) -> None:
    """Items are embedded from what comes with the batch, and ranked from the item shards."""
    words = [*KINDS[kind], *SAMPLED, "--model.id_table", "false", "--train.epochs", 1, *NO_DROPOUT]
    run = train_here(inline_shop, tmp_path / "run", *words)
    run_here(export.main, ["--checkpoint", run, "--output", tmp_path / "export", "--measure-users", 0])
    evaluate_here(tmp_path / "export")
    assert evaluation(tmp_path / "export")["sizes"] == evaluation(run)["sizes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softmax", [FULL, SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize("mixer", ["attention", "bidirectional"])
def test_with_another_mixer(mixer: str, softmax: list[str], kind: str, shop: Path, tmp_path: Path) -> None:
    words = [*KINDS[kind], *softmax, *IDS, "--model.mixer", mixer, "--model.head_width", 4, "--train.max_steps", 4]
    run = train_here(shop, tmp_path / "run", *words)
    assert np.isfinite([record["loss"] for record in records(run)]).all()
    assert evaluation(run)["sizes"].keys() == {"4", "8"}


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16(kind: str, shop: Path, tmp_path: Path) -> None:
    """Products are narrower, codes are not: those above 256 would be rounded."""
    run = train_here(shop, tmp_path / "run", *KINDS[kind], *FULL, "--train.precision", "bf16", "--train.max_steps", 3)
    assert np.isfinite([record["loss"] for record in records(run)]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["float16", "int8", "web", "onnx"])
def test_exports_of_every_kind(kind: str, form: str, shop: Path, tmp_path: Path) -> None:
    run = shop.parent / f"short-{kind}"
    if not run.exists():
        train_here(shop, run, *KINDS[kind], *IDS, "--train.max_steps", 5)
    words: list[object] = ["--checkpoint", run, "--output", tmp_path / "export", "--measure-users", 0]
    if form in ("web", "onnx"):
        if form == "onnx":
            pytest.importorskip("onnxruntime")
        run_here(export.main, [*words, "--format", form])  # which compares the graphs with the model
        assert form == "web" or (tmp_path / "export" / "item_encoder.onnx").is_file()
        return
    run_here(export.main, [*words, "--dtype", form])
    run_here(export.main, [*words[:3], tmp_path / "exact", *words[4:]])
    found, exact = (read_export(tmp_path / name).model.state_dict() for name in ("export", "exact"))
    name = "encoder.weight" if kind == "unisrec" else "encoder.code_table"
    assert not torch.equal(found[name], exact[name])
    torch.testing.assert_close(found[name], exact[name], rtol=0, atol=float(exact[name].abs().max()) / 100)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_every_dtype(kind: str, dtype: str, shop: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = shop.parent / f"short-{kind}"
    if not run.exists():
        train_here(shop, run, *KINDS[kind], *IDS, "--train.max_steps", 5)
    words: list[object] = ["--checkpoint", run, "--output", tmp_path / "export", "--measure-users", 0]
    run_here(export.main, [*words, "--format", "onnx", "--dtype", dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["full", "some", "sampled"])
def test_the_loss_is_a_softmax_over_embeddings(kind: str, loss: str) -> None:
    """Values and every gradient, of all items, of those that are scored, or of negatives."""
    torch.manual_seed(0)
    dims = {"codes": 3, "shades": 1}
    model = FMRLRec((4, 8), 1, dims, 20, item_encoder=kind, experts=3, codes=8).eval()
    encoder = model.encoder
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    table = ItemTable(dims, torch.randint(1, 9, (20, 4)).half(), torch.rand(20, 2) < 0.8)
    scored = torch.tensor([0, 1, 2, 4, 7, 9, 19]) if loss == "some" else None
    settings = LossSettings(sizes=(4, 8), temperatures=None, impl="tiled", dtype=None)
    columns = catalogue_columns(encoder, table, torch.float32)
    id_rows = ModelIdTable(encoder, IdDropout(0.0, seed=0))
    noise = ItemNoise(encoder.num_noises, 1, 7) if encoder.num_noises else None
    module = TrainingModule(model, columns, settings, id_rows=id_rows, scored=scored, noise=noise)
    module.begin_step(5)
    batch = Packed(
        users=torch.tensor([0, 1]),
        items=torch.tensor([1, 4, 9]),
        starts=torch.tensor([0, 2, 3]),
        from_start=torch.tensor([True, False]),
        targets=torch.tensor([1, 4, 9, 7]),
    )
    negatives = Negatives(torch.tensor([3, 4, 4, 17]), torch.tensor([0.5, -1.0, -1.0, 0.0]))
    if loss == "sampled":
        starts = {"position_starts": torch.tensor([0, 4]), "negative_starts": torch.tensor([0, 4])}
        drawn = {"negatives": negatives.ids, "log_expected": negatives.log_expected}
        batch = SampledBatch(**batch.tensors, **starts, **drawn)

    of_step = None if noise is None else noise(torch.arange(20))
    items = encoder(encoder.normalize(table.values, table.present), table.present, noise=of_step)
    z = model(items[batch.items], batch.starts, batch.from_start)
    plain = replace(settings, impl="plain")
    if loss == "sampled":
        own, others = items[batch.targets], items[negatives.ids]
        expected = sampled_cross_entropy(z, own, batch.targets, others, negatives, plain)
    else:
        rows = items if scored is None else items[scored]
        right = batch.targets if scored is None else torch.searchsorted(scored, batch.targets)
        expected = nested_cross_entropy(z, rows, right, plain)
    found = module(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    named = dict(model.named_parameters())
    pairs = zip(
        torch.autograd.grad(found.sum(), list(named.values())),
        torch.autograd.grad(expected.sum(), list(named.values())),
        strict=True,
    )
    for own_grad, wanted in pairs:
        torch.testing.assert_close(own_grad, wanted, rtol=1e-4, atol=1e-5)
    module.begin_step(6)
    assert torch.equal(module(batch), found) == (noise is None), "each step has noise of its own"


def assert_nearly_equal(run: Path, expected: Path) -> None:
    for found, wanted in zip(records(run), records(expected), strict=True):
        for name in ("loss", "loss@4", "loss@8", "grad_norm"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


@pytest.mark.multiproc
@pytest.mark.parametrize("engine", [DDP, zero(2), zero(3)], ids=["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("softmax", [FULL, SAMPLED], ids=["full", "sampled"])
def test_codes_under_every_engine(engine: dict[str, str], softmax: list[str], shop: Path, tmp_path: Path) -> None:
    """As in one process; at the end of an epoch, one of the two has an empty batch."""
    words = [*VQREC, *softmax, *IDS, *NO_DROPOUT, "--train.epochs", 1]
    one = train_here(shop, tmp_path / "one", *words)
    train_under(engine, shop, tmp_path / "two", *words)
    assert_nearly_equal(tmp_path / "two", one)


@pytest.mark.multiproc
@pytest.mark.parametrize("engine", [DDP, zero(3)], ids=["ddp", "zero3"])
@pytest.mark.parametrize("softmax", [FULL, SAMPLED], ids=["full", "sampled"])
def test_experts_under_every_engine(engine: dict[str, str], softmax: list[str], shop: Path, tmp_path: Path) -> None:
    """As in one process, the gate's noise included: it is drawn by item."""
    words = [*UNISREC, *softmax, *IDS, *NO_DROPOUT, "--train.epochs", 1]
    one = train_here(shop, tmp_path / "one", *words)
    train_under(engine, shop, tmp_path / "two", *words)
    assert_nearly_equal(tmp_path / "two", one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.item_encoder", "unisrec"],
            "'codes' holds codes, which model.item_encoder unisrec would read",
        ),
        ([], "feature 'codes' holds codes, which model.item_encoder projection would read as a vector; leave it out"),
        (["--model.item_encoder", "vqrec"], "feature 'vector' holds vectors; give model.features those of source pq: "),
        ([*VQREC, "--model.codes", "16"], "model.codes is 16, and feature 'codes' has 8 codes; make them the same"),
        ([*VQREC, "--loss.catalogue", "split"], "loss.catalogue is split, which needs items that are projected"),
        (
            [*UNISREC, "--model.features", "[]", *IDS],
            "item_encoder is unisrec, which embeds features, and ",
        ),
        (["--model.item_encoder", "bert"], "model.item_encoder is 'bert'; expected one of: projection, unisrec, vqrec"),
        ([*UNISREC, "--model.experts", "0"], "model.experts is 0; expected 1 <= value <= 1000"),
        ([*VQREC, "--model.codes", "4096"], "model.codes is 4096; expected 2 <= value <= 2048"),
    ],
)
def test_what_cannot_train_is_refused(words: list[str], message: str, shop: Path, tmp_path: Path) -> None:
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "run", *words)
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_encoder_of_a_run_is_fixed(shop: Path, tmp_path: Path) -> None:
    run = train_here(shop, tmp_path / "run", *UNISREC, "--train.max_steps", 2)
    for key, value in (("item_encoder", "projection"), ("experts", 4), ("codes", 16)):
        words = [*UNISREC, f"--model.{key}", str(value), "--resume", "auto"]
        assert f"has model.{key} " in refusal(train.main, "--config", shop, "--run.dir", run, *words)
    words = ["--train.init", str(run), "--model.features", "[vector, colour]"]
    line = refusal(train.main, "--config", shop, "--run.dir", tmp_path / "other", *words)
    assert "has model.item_encoder 'unisrec', this run 'projection': its weights mean something else" in line
    again = train_here(shop, tmp_path / "again", *UNISREC, "--train.init", run, "--train.max_steps", 1)
    assert (again / "checkpoints" / "latest").exists()


def test_a_run_of_before_has_a_projection(shop: Path, tmp_path: Path) -> None:
    """A checkpoint whose config has none of the keys."""
    run = train_here(shop, tmp_path / "run", "--model.features", "[vector, colour]", "--train.max_steps", 2)
    config = load_checkpoint(run).config
    assert config["model"]["item_encoder"] == "projection"
    older = {key: value for key, value in config["model"].items() if key not in ("item_encoder", "experts", "codes")}
    assert config_from_dict(config | {"model": older}).model == config_from_dict(config).model
    run_here(export.main, ["--checkpoint", run, "--output", tmp_path / "export", "--measure-users", 0])
    arguments = json.loads((tmp_path / "export" / "config.json").read_text())["model"]
    assert not {"item_encoder", "experts", "codes"} & arguments.keys()


def test_a_plan_is_refused(shop: Path) -> None:
    words = ["--config", shop, "--items", 1000, "--cpus", 1]
    line = refusal(plan.main, *words, *VQREC)
    assert "model.item_encoder is vqrec, whose cost is not predicted; choose projection to plan without it" in line
    line = refusal(plan.main, *words, *UNISREC, "--loss.softmax", "full")
    assert "model.item_encoder is unisrec and loss.softmax full, whose cost is not predicted; choose sampled" in line


def test_another_stores_codes_are_refused(shop: Path, tmp_path: Path) -> None:
    """Codes of another fit mean something else, of however many parts they are."""
    run = train_here(shop, tmp_path / "run", *VQREC, "--train.max_steps", 2)
    values = yaml.safe_load(shop.read_text())
    values["data"]["features"]["vector"]["path"] = "vector-2.npy"
    values["store"]["path"] = str(tmp_path / "other")
    np.save(shop.parent / "raw" / "vector-2.npy", -2 * np.load(shop.parent / "raw" / "vector.npy"))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    build_store(load_config(tmp_path / "other.yaml"))
    words = ["--checkpoint", run, "--store", tmp_path / "other"]
    with pytest.raises(UserError, match="was trained on another feature 'codes' .* with data.features.codes.fit: "):
        run_here(evaluate.main, [*words, "--threads", 1])
