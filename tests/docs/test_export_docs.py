"""docs/format.md, "The export": every tensor of a real export with its shape, and the code that scores without us."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fmrl_dist import export
from fmrl_dist.checkpoint.export.files import ITEMS_FILE
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.model.fmrlrec import MODEL_FILE, FMRLRec
from fmrl_dist.model.mixers.mixing import MIXERS
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.training import FEATURE_DIMS, NUM_ITEMS, make_shop, run_here, train_here

DEPTH, SIZE, ID_WIDTH = 2, 8, 4
DIMENSIONS = {"M": SIZE, "F": sum(FEATURE_DIMS.values()), "V": NUM_ITEMS, "features": len(FEATURE_DIMS), "2": 2}
DIMENSIONS |= {"w": ID_WIDTH, "G": 3, "P": DIMENSIONS["F"], "K": 16, "3": 3, "H": 7}


@pytest.fixture(scope="module")
def section() -> str:
    return (REPOSITORY / "docs" / "format.md").read_text().partition("\n## The export\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Size 8 of 16, two blocks, with an id table and all norms: every kind of tensor there is."""
    root = tmp_path_factory.mktemp("docs")
    words = ["--model.sizes", "[4, 8, 16]", "--model.width", 16, "--model.depth", DEPTH, "--model.id_width", ID_WIDTH]
    words += [word for key in ("id_table", "input_norm", "output_norm") for word in (f"--model.{key}", "true")]
    run = train_here(make_shop(root), root / "run", *words, "--train.max_steps", 20)
    run_here(export.main, ["--checkpoint", run, "--size", SIZE, "--output", root / "export"])
    return root / "export"


def documented_shapes(section: str) -> dict[str, tuple[int, ...]]:
    """The rows `name`, … | shape, … | of the section's tables: one shape a name, or one for all."""
    found: dict[str, tuple[int, ...]] = {}
    for names_cell, shapes_cell in re.findall(r"^\| (`.*?`) \| (\[.*?\]) \|", section, re.MULTILINE):
        names = re.findall(r"`(.*?)`", names_cell)
        shapes = [tuple(DIMENSIONS[d] for d in s.split(", ")) for s in re.findall(r"\[(.*?)\]", shapes_cell)]
        shapes = shapes if len(shapes) > 1 else shapes * len(names)
        for name, shape in zip(names, shapes, strict=True):
            blocks = range(DEPTH) if ".k." in name else (0,)
            found |= {name.replace(".k.", f".{k}."): shape for k in blocks}
    return found


def test_every_tensor_is_documented_with_its_shape(section: str, exported: Path) -> None:
    tensors = load_file(exported / MODEL_FILE)
    assert documented_shapes(section) == {name: tensor.shape for name, tensor in tensors.items()}
    assert f"`{ITEMS_FILE}` | `item_embeddings` [V, M]" in section
    assert load_file(exported / ITEMS_FILE)["item_embeddings"].shape == (NUM_ITEMS, SIZE)


@pytest.mark.parametrize("kind", ["unisrec", "vqrec"])
def test_tensors_of_other_item_encoders(kind: str) -> None:
    page = (REPOSITORY / "docs" / "format.md").read_text().partition("\n## Other item encoders\n")[2]
    of_kind = page.partition(f"\n### {kind}\n")[2].partition("\n### ")[0]
    model = FMRLRec((4, SIZE), 1, FEATURE_DIMS, item_encoder=kind, experts=DIMENSIONS["G"], codes=DIMENSIONS["K"])
    own = {f"encoder.{name}": tensor.shape for name, tensor in model.encoder.state_dict().items()}
    assert documented_shapes(of_kind) | {"encoder.bias": (SIZE,), "encoder.stand_ins": (len(FEATURE_DIMS), SIZE)} == own


def test_the_documented_code_scores_as_the_model(section: str, exported: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    program = exported.parent / "scores.py"
    program.write_text(f"{code}\n\nimport sys\nnp.save(sys.argv[2], scores(Path(sys.argv[1]), [3, 1, 3, 39]))\n")
    subprocess.run([sys.executable, program, exported, exported.parent / "scores.npy"], check=True, cwd=exported.parent)
    recommender = read_export(exported)
    history = torch.tensor([3, 1, 3, 39])
    with torch.no_grad():
        z = recommender.model(recommender.items[history], torch.tensor([0, 4]), torch.tensor([True]))[-1]
    expected = recommender.items @ z
    np.testing.assert_allclose(np.load(exported.parent / "scores.npy"), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_a_new_items_embedding_is_as_documented(exported: Path) -> None:
    encoder = read_export(exported).model.encoder
    assert encoder.id_table is not None
    t = load_file(exported / MODEL_FILE)
    x = np.random.default_rng(0).standard_normal((1, DIMENSIONS["F"])).astype(np.float32)
    scaled = (x - t["encoder.feature_shift"]) * t["encoder.feature_scale"]
    scaled[:, FEATURE_DIMS["vector"] :] = 0  # the second feature is missing
    expected = scaled @ t["encoder.weight"].T + t["encoder.bias"] + t["encoder.stand_ins"][1]
    present = torch.tensor([[True, False]])
    with torch.no_grad():
        features = encoder.normalize(torch.from_numpy(x), present)
        found = encoder(features, present, torch.tensor([0]))
        found[:, :ID_WIDTH] -= encoder.id_table[:1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "lru"])
def test_tensors_of_other_mixers(mixer: str) -> None:
    page = (REPOSITORY / "docs" / "format.md").read_text().partition("\n## Other mixers\n")[2].partition("\n## ")[0]
    of_mixer = page.partition(f"\n### {mixer}\n")[2].partition("\n### ")[0]
    model = FMRLRec((4, SIZE), DEPTH, FEATURE_DIMS, mixer=mixer, window=2 * DIMENSIONS["H"] - 2)
    names = (f".{mixer}.", "mask")
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if any(part in name for part in names)}
    assert documented_shapes(of_mixer) == own
