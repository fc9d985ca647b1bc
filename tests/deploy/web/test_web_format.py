"""The folder of a web export: what is in its file, who may replace it, and that installations have the page."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmrl_dist import export
from fmrl_dist.base.errors import UserError
from fmrl_dist.checkpoint.export.parts import ExportedModel, as_stored
from fmrl_dist.deploy.web.nested_file import pack
from fmrl_dist.deploy.web.page_files import PAGE_FILES, SERVICE_WORKER
from fmrl_dist.deploy.web.web_format import FILES, MODEL_BIN, MODEL_JSON, web_files, write_web_export
from fmrl_dist.model.mixers.lru import LRU
from fmrl_dist.model.nested import chunks
from fmrl_dist.model.stored_tensors import DTYPES
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import contents, make_shop, refusal, run_here, run_module, train_here
from tests.fixtures.web_exports import evaluation_of, parts_of, random_model, titles_of, write_shop_page

SIZES = (4, 8, 16)


@pytest.fixture
def exported() -> ExportedModel:
    return random_model(SIZES, num_items=30)


def tensor(data: bytes, section: dict[str, Any], name: str) -> np.ndarray:
    """A tensor of a section, by docs/web.md alone."""
    entry = section["tensors"][name]
    start, length = section["offset"] + entry["offset"], int(np.prod(entry["shape"]))
    values = np.frombuffer(data, np.dtype(entry["dtype"]).newbyteorder("<"), length, start).astype(np.float32)
    values = values.reshape(entry["shape"])
    if f"{name}.scale" in section["tensors"]:
        values = values * tensor(data, section, f"{name}.scale")[:, None]
    return values


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_is_the_stored_model_and_every_size_is_its_beginning(exported: ExportedModel, dtype: str) -> None:
    file, stored = pack(exported, dtype), as_stored(exported, dtype)
    assert sum(section["bytes"] for section in file.sections) == len(file.data)
    state = stored.model.state_dict()
    recurrent = [module for module in stored.model.modules() if isinstance(module, LRU)]
    scales = tensor(file.data, file.sections[0], "items.scale")[:, None] if dtype == "int8" else 1
    for (low, high), section in zip(chunks(SIZES), file.sections, strict=True):
        items = tensor(file.data, {**section, "tensors": {"items": section["tensors"]["items"]}}, "items") * scales
        np.testing.assert_array_equal(items, stored.items[:, low:high])
        for block in range(2):
            lru, ffn = f"blocks.{block}.lru", f"blocks.{block}.ffn"
            expected = {f"blocks.{block}.gamma": torch.exp(state[f"{lru}.gamma_log"][low:high])}
            for index, part in enumerate(("re", "im")):
                expected[f"blocks.{block}.b.{part}.weight"] = state[f"{lru}.B"][index, low:high, :high]
                expected[f"blocks.{block}.c.{part}.weight"] = state[f"{lru}.C"][index, low:high, :high]
                expected[f"blocks.{block}.b.{part}.bias"] = state[f"{lru}.b"][index, low:high]
                expected[f"blocks.{block}.decay.{part}"] = recurrent[block].decay()[index, low:high]
            for name in ("gate", "w_1", "w_2"):
                expected[f"blocks.{block}.{name}.weight"] = state[f"{ffn}.{name}.weight"][low:high, :high]
                expected[f"blocks.{block}.{name}.bias"] = state[f"{ffn}.{name}.bias"][low:high]
            for name, values in expected.items():
                np.testing.assert_array_equal(tensor(file.data, section, name), values.detach(), err_msg=name)


def test_a_smaller_exports_file_is_the_beginning_of_a_larger_ones(exported: ExportedModel) -> None:
    """But for int8, whose scales are of whole rows: there it is a cut of the stored model, not of the trained one."""
    file = pack(exported, "float16")
    small = ExportedModel(exported.model.truncate(8), exported.items[:, :8], 10, True, exported.origin)
    of_small = pack(small, "float16")
    assert of_small.data == file.data[: len(of_small.data)] and of_small.sections == file.sections[:2]


def test_hashes_lead_from_the_page_to_every_byte(exported: ExportedModel, tmp_path: Path) -> None:
    write_shop_page(tmp_path / "web", exported)
    files = {path.name: path.read_bytes() for path in (tmp_path / "web").iterdir()}
    assert sorted(files) == sorted(FILES)
    manifest = json.loads(files[MODEL_JSON])
    export = manifest["export"].encode()
    assert f'content="{manifest["export"]}"'.encode() in files["index.html"]
    data = files[MODEL_BIN]
    for section in manifest["sections"]:
        part = data[section["offset"] : section["offset"] + section["bytes"]]
        assert hashlib.sha256(part).hexdigest() == section["sha256"]
    worker = files[SERVICE_WORKER]
    kept = re.search(rb"const FILES = (\{.*?\});", worker, re.DOTALL)
    assert kept is not None and json.loads(kept[1]) == {
        n: hashlib.sha256(files[n]).hexdigest() for n in FILES if n != SERVICE_WORKER
    }
    assert all(b"__EXPORT__" not in content for content in files.values())
    for name in ("index.html", "app.js", "manifest.webmanifest"):  # every address has the export in it
        links = re.findall(rb'(?:href|src|from|"src":)[=\s]*"(?:\./)?([\w.-]+\.\w+)(\?v=\w+)?"', files[name])
        assert links and all(version == b"?v=" + export for _, version in links), name


def test_whatever_changes_gives_another_export(exported: ExportedModel) -> None:
    parts, figures = parts_of(titles_of(30), 30), evaluation_of(SIZES)

    def export_of(*words: Any) -> str:
        return str(json.loads(web_files(*words)[MODEL_JSON])["export"])

    first = export_of(exported, parts, figures, "a")
    assert export_of(exported, parts, figures, "a") == first
    others = [
        export_of(random_model(SIZES, num_items=30, seed=1), parts, figures, "a"),
        export_of(exported, parts_of(None, 30), figures, "a"),
        export_of(exported, parts, None, "a"),
        export_of(exported, parts, figures, "b"),
        export_of(exported, parts_of(titles_of(30), 30, "float16"), figures, "a"),
    ]
    assert len({first, *others}) == 6


def test_figures_are_masked_ones_of_the_same_checkpoint(exported: ExportedModel) -> None:
    parts = parts_of(titles_of(30), 30)
    manifest = json.loads(web_files(exported, parts, evaluation_of(SIZES), "shop")[MODEL_JSON])
    assert manifest["figures"] == {
        "metrics": ["ndcg@10", "recall@10"],
        "masked": True,
        "split": "test",
        "users": 300,
        "sizes": evaluation_of(SIZES)["masked"]["sizes"],
    }
    assert manifest["dtype"] == "int8" and manifest["dtype_costs"] == pytest.approx(0.0012)
    without = json.loads(web_files(exported, replace(parts, quality={"not_measured": "why"}), None, "shop")[MODEL_JSON])
    assert without["figures"] is None and without["dtype_costs"] is None
    with pytest.raises(UserError, match="the evaluation is of step 8, the model of step 7; evaluate it again"):
        web_files(exported, parts, evaluation_of(SIZES, step=8), "shop")
    with pytest.raises(UserError, match="the evaluation is damaged"):
        web_files(exported, parts, evaluation_of(SIZES) | {"masked": {}}, "shop")


def test_figures_that_do_not_fit_are_not_shown(exported: ExportedModel) -> None:
    parts, figures = parts_of(titles_of(30), 30), evaluation_of(SIZES)
    of_twenty = {size: {"ndcg@20": row["ndcg@10"]} for size, row in figures["masked"]["sizes"].items()}
    for other in (
        evaluation_of(SIZES[:2]),
        figures | {"masked": {"sizes": of_twenty}},
        figures | {"manifest_sha256": "1" * 64},
    ):
        assert json.loads(web_files(exported, parts, other, "shop")[MODEL_JSON])["figures"] is None


def test_the_vocabulary_is_of_the_same_items(exported: ExportedModel) -> None:
    with pytest.raises(UserError, match="the vocabulary has 29 items and the model 30; they are of different stores"):
        web_files(exported, parts_of(None, 29), None, "shop")
    with pytest.raises(UserError, match="the vocabulary .* cannot be read"):
        web_files(exported, replace(parts_of(None, 30), vocab=b"PAR1 not really"), None, "shop")


def test_only_a_web_export_is_replaced_and_only_when_asked(exported: ExportedModel, tmp_path: Path) -> None:
    parts, folder = parts_of(titles_of(30), 30), tmp_path / "web"
    write_web_export(exported, folder, parts, None, overwrite=False)
    before = contents(folder)
    with pytest.raises(UserError, match="exists; keep it, or replace it with --overwrite"):
        write_web_export(exported, folder, parts, evaluation_of(SIZES), overwrite=False)
    assert contents(folder) == before
    write_web_export(exported, folder, parts, evaluation_of(SIZES), overwrite=True)
    assert contents(folder).keys() == before.keys() and contents(folder) != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which a web export does not have"):
        write_web_export(exported, folder, parts, None, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a web export"):
        write_web_export(exported, tmp_path / "other", parts, None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "web"]


def test_the_command_writes_it_from_a_run(tmp_path: Path) -> None:
    shop = make_shop(tmp_path / "shop")
    run = train_here(shop, tmp_path / "run")
    result = run_module("fmrl_dist.export", "--checkpoint", run, "--format", "web")
    assert (result.returncode, result.stderr) == (0, "")
    folder = run / "export-8-web"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    num_bytes = (folder / MODEL_BIN).stat().st_size
    assert f"{num_bytes:,} bytes  {MODEL_BIN}" in result.stdout and "int8" in result.stdout
    manifest = json.loads((folder / MODEL_JSON).read_text())
    figures = json.loads((run / "evaluation.json").read_text())["masked"]["sizes"]
    assert manifest["name"] == "Catalogue"
    assert manifest["sizes"] == [4, 8] and manifest["dtype"] == "int8" and manifest["dtype_costs"] >= 0
    assert manifest["figures"]["sizes"]["8"] == {name: figures["8"][name] for name in ("ndcg@10", "recall@10")}
    assert str(tmp_path) not in "".join(path.read_text("latin-1") for path in folder.iterdir())  # nobody's business
    words = ["--checkpoint", run, "--format", "web", "--measure-users", 0]
    line = refusal(export.main, *words)
    assert line == f"error: web export {folder} exists; keep it, or replace it with --overwrite"
    line = refusal(export.main, *words, "--output", tmp_path / "hub", "--push-to-hub", "us/shop")
    assert "--push-to-hub takes exports for programs" in line and not (tmp_path / "hub").exists()
    run_here(export.main, [*words, "--size", 4, "--dtype", "float16", "--name", "Our shop"])
    small = json.loads((run / "export-4-web-float16" / MODEL_JSON).read_text())
    assert (
        small["name"] == "Our shop"
        and small["sizes"] == [4]
        and small["dtype"] == "float16"
        and small["dtype_costs"] is None
    )
    assert "--name is of --format web" in refusal(export.main, "--checkpoint", run, "--name", "Our shop")
    run_here(export.main, ["--checkpoint", run, "--measure-users", 0])
    line = refusal(export.main, *words, "--output", run / "export-8", "--overwrite")
    assert line == f"error: {run / 'export-8'} exists and is not a web export; choose another --output"
    line = refusal(export.main, "--checkpoint", run, "--output", folder, "--overwrite")
    assert line == f"error: {folder} exists and is not an export; choose another --output"


def test_a_wheel_has_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "fmrl_dist", source / "fmrl_dist", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    ended = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    with zipfile.ZipFile(source / ended.stdout.splitlines()[-1]) as wheel:
        found = {name: wheel.read(f"fmrl_dist/deploy/web/{name}") for name in (*PAGE_FILES, SERVICE_WORKER)}
    folder = REPOSITORY / "fmrl_dist/deploy/web"
    assert found == {name: (folder / name).read_bytes() for name in found}
    pages = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert pages == set(found)
