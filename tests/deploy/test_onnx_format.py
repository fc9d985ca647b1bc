"""ONNX exports compute in onnxruntime what the model computes, or are not written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fmrl_dist import evaluate, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import file_sha256
from fmrl_dist.checkpoint.export.parts import ExportedModel, ExportParts, Origin, as_stored
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.deploy import onnx_format
from fmrl_dist.deploy.onnx_format import OPSET, write_onnx_export
from fmrl_dist.model.export_config import CONFIG_FILE
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.nested import nested_mask
from tests.fixtures.item_encoders import projection_of
from tests.fixtures.training import contents, make_shop, refusal, run_here, train_here

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = (4, 8, 20)
DIMS = {"text": 5, "price": 1}
PARTS = ExportParts(b"unused here", {}, {})


def make_exported(size: int, depth: int = 2, dims: dict[str, int] | None = None, **options: Any) -> ExportedModel:
    """Every tensor drawn, as large as trained ones are, cut to ``size``."""
    torch.manual_seed(1)
    model = FMRLRec(SIZES, depth, DIMS if dims is None else dims, 30, **options).eval()
    for name, values in model.state_dict().items():
        values.normal_(0, 0.5)
        if name.rpartition(".")[2] in ("B", "C") or ".ffn." in name and values.ndim == 2:
            values.mul_(nested_mask(SIZES))
    projection_of(model).feature_scale.abs_()
    model = model.truncate(size)
    return ExportedModel(
        model, torch.randn(30, size), 50, True, Origin("0", 1, "a", "b", "c"), rotation=torch.eye(size)
    )


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("depth", "norms"), [(1, False), (2, True)])
def test_a_step_is_the_models(size: int, dtype: str, depth: int, norms: bool, tmp_path: Path) -> None:
    """From the start position on, over several events, for one history and for seven."""
    exported = make_exported(size, depth, input_norm=norms, output_norm=norms)
    write_onnx_export(exported, tmp_path / "export", replace(PARTS, dtype=dtype), overwrite=False)
    step, expected = session(tmp_path / "export" / "step.onnx"), as_stored(exported, dtype)
    items = read_items(tmp_path / "export")
    np.testing.assert_array_equal(items, expected.items)
    start = np.load(tmp_path / "export" / "start.npy")
    for batch in (1, 7):
        events = torch.randint(30, (5, batch), generator=torch.Generator().manual_seed(batch))
        state, z = step.run(
            None,
            {
                "state": np.zeros((batch, depth, 2, size), np.float32),
                "embeddings": np.repeat(start[None], batch, 0),
            },
        )
        alone = torch.zeros(0, size), torch.tensor([0, 0]), torch.tensor([True])
        with torch.no_grad():
            assert_near(z, expected.model(*alone).expand(batch, -1))
        state = np.zeros_like(state)  # the recurrence resets after the start position
        for number in range(len(events)):
            state, z = step.run(None, {"state": state, "embeddings": items[events[number].numpy()]})
            assert_near(z, whole_pass(expected, events[: number + 1]))


@torch.no_grad()
def whole_pass(exported: ExportedModel, events: Tensor) -> Tensor:
    """Outputs after the last event of each history, from a pass over all of them; events [K, B]."""
    length, batch = events.shape
    starts = torch.arange(batch + 1) * length
    z = exported.model(exported.items[events.T.flatten()], starts, torch.zeros(batch, dtype=torch.bool))
    return z[starts[1:] - 1]


def assert_near(found: np.ndarray, wanted: Tensor) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def read_items(folder: Path) -> np.ndarray:
    items: np.ndarray = np.load(folder / "item_embeddings.npy").astype(np.float32)
    return items * np.load(folder / "item_scales.npy")[:, None] if (folder / "item_scales.npy").exists() else items


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_new_items_are_embedded_as_the_model_does(dtype: str, tmp_path: Path) -> None:
    exported = make_exported(8)
    write_onnx_export(exported, tmp_path / "export", replace(PARTS, dtype=dtype), overwrite=False)
    graph, encoder = session(tmp_path / "export" / "item_encoder.onnx"), as_stored(exported, dtype).model.encoder
    for count in (1, 7):
        features, present = torch.randn(count, 6), torch.arange(count * 2).view(count, 2) % 3 != 0
        features[:, :5][~present[:, 0]] = torch.nan  # of a missing feature, nothing is read
        (found,) = graph.run(None, {"features": features.numpy(), "present": present.numpy()})
        with torch.no_grad():
            wanted = encoder(encoder.normalize(features, present), present, torch.zeros(count, dtype=torch.int64))
            assert encoder.id_table is not None
            assert_near(found, wanted - encoder.id_table[:1, :8])


def test_a_model_without_features_has_no_item_encoder(tmp_path: Path) -> None:
    write_onnx_export(make_exported(8, dims={}), tmp_path / "export", PARTS, overwrite=False)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {
        *("config.json", "README.md", "vocab.parquet"),
        *("step.onnx", "item_embeddings.npy", "start.npy", "rotation.npy"),
    }


def test_graphs_are_valid_and_say_their_opset(tmp_path: Path) -> None:
    write_onnx_export(make_exported(8), tmp_path / "export", PARTS, overwrite=False)
    config = json.loads((tmp_path / "export" / CONFIG_FILE).read_text())
    assert (config["format"], config["opset"]) == ("onnx", OPSET)
    assert config["sha256_of"] == {
        path.name: file_sha256(path) for path in (tmp_path / "export").iterdir() if path.name != CONFIG_FILE
    }
    for name in ("step.onnx", "item_encoder.onnx"):
        graph = onnx.load(tmp_path / "export" / name)
        onnx.checker.check_model(graph, full_check=True)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", OPSET)]
        batch = {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.graph.input, *graph.graph.output)}
        assert batch == {"B"} if name == "step.onnx" else batch == {"N"}


@pytest.mark.parametrize("wrong", ["_lru_step", "_feed_forward", "encoder_graph"])
def test_a_wrong_graph_is_not_written(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime computed something else: a graph of a model that differs a little from the one to write."""
    original = getattr(onnx_format, wrong)

    def graph(first: Any, second: Any, *others: Any) -> Any:
        changed = second if wrong != "encoder_graph" else first
        with torch.no_grad():
            parameter = {"_lru_step": "theta", "_feed_forward": "w_2.bias", "encoder_graph": "stand_ins"}[wrong]
            changed.get_parameter(parameter).add_(1e-3)
            made = original(first, second, *others)
            changed.get_parameter(parameter).sub_(1e-3)
        return made

    monkeypatch.setattr(onnx_format, wrong, graph)
    with pytest.raises(
        UserError, match=r"(step|item_encoder)\.onnx in onnxruntime .* is not the model \(it differs by"
    ):
        write_onnx_export(make_exported(8), tmp_path / "export", PARTS, overwrite=False)
    assert not list(tmp_path.iterdir())


def test_the_command_and_what_reads_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_here(make_shop(tmp_path), tmp_path / "run", "--train.max_steps", 2, "--model.id_table", "true")
    words = ["--checkpoint", run, "--format", "onnx", "--dtype", "int8"]
    run_here(export.main, words)
    folder = run / "export-8-onnx-int8"
    with pytest.raises(UserError, match="is of format onnx, for onnxruntime; this needs one of format safetensors"):
        read_export(folder)
    assert f"export {folder} is of format onnx" in refusal(evaluate.main, "--checkpoint", folder)
    before = contents(folder)
    assert f"export {folder} exists; keep it, or replace it" in refusal(export.main, *words)
    assert "--vectors is written with --format safetensors only" in refusal(
        export.main, *words, "--overwrite", "--vectors", 4
    )
    assert contents(folder) == before
    run_here(export.main, [*words, "--overwrite"])
    run_here(export.main, ["--checkpoint", run, "--output", folder, "--overwrite"])  # of another format
    assert not list(folder.glob("*.onnx")) and read_export(folder).model.width == 8
    monkeypatch.setattr(onnx_format.importlib.util, "find_spec", lambda name: None)
    line = refusal(export.main, *words, "--overwrite")
    assert "--format onnx needs onnx and onnxruntime; install the extra: pip install" in line
