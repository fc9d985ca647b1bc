"""Which open_clip models are accepted: architectures, preprocessing, safe weights; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.optional import skip_module_without

skip_module_without("open_clip", "make images")

from fmrl_dist.base.errors import UserError
from fmrl_dist.config.features import OpenClipFeature
from shards.encoders.open_clip_model import find_image_model
from tests.fixtures.image_model import MODEL, encode, feature
from tests.fixtures.images import photo


def pickled(path: Path) -> Path:
    torch.save({"visual.proj": torch.zeros(2)}, path)
    return path


def nan_weights(path: Path, weights: Path) -> Path:
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}, path)
    return path


def other_model(path: Path, weights: Path) -> Path:
    save_file({name: value for name, value in load_file(weights).items() if "resblocks.3" not in name}, path)
    return path


Refusal = tuple[Callable[[Path, Path], dict[str, Any]], str]
REFUSALS: dict[str, Refusal] = {
    "pickle": (lambda p, w: {"pretrained": str(pickled(p / "m.bin"))}, "end in '.bin'; expected .safetensors"),
    "missing pickle": (lambda p, w: {"pretrained": str(p / "m.pt")}, "m.pt do not exist; expected a .safetensors"),
    "pickle in disguise": (
        lambda p, w: {"pretrained": str(pickled(p / "m.safetensors"))},
        "cannot be loaded from .*m.safetensors",
    ),
    "missing weights": (lambda p, w: {"pretrained": str(p / "m.safetensors")}, "m.safetensors do not exist"),
    "weights of another model": (
        lambda p, w: {"pretrained": str(other_model(p / "m.safetensors", w))},
        "cannot be loaded from .*[Mm]issing key",
    ),
    "unknown model": (lambda p, w: {"model": "ViT-L-16-SigLIP-265"}, "did you mean 'ViT-L-16-SigLIP-256'"),
    "a model on a hub": (lambda p, w: {"model": "hf-hub:timm/x"}, "open_clip knows no image model 'hf-hub:timm/x'"),
    "unknown tag": (
        lambda p, w: {"model": "ViT-L-16-SigLIP-256", "pretrained": "webly"},
        "'webly' are not a tag .*; expected one of: webli; or a .safetensors file",
    ),
    "tag of a file": (lambda p, w: {"pretrained": "webli"}, "is a file but its weights 'webli' are not"),
    "missing model file": (lambda p, w: {"model": str(p / "m.json")}, "m.json does not exist"),
    "model file of another kind": (
        lambda p, w: {"model": str(p / "m.json"), "x": (p / "m.json").write_text('{"embed_dim": 8}')},
        "not an open_clip model config; expected the keys embed_dim, vision_cfg, text_cfg",
    ),
    "model file that is no JSON": (
        lambda p, w: {"model": str(p / "m.json"), "x": (p / "m.json").write_text("embed_dim: 8")},
        "m.json is not JSON",
    ),
    "impossible model": (
        lambda p, w: {
            "model": str(p / "m.json"),
            "x": (p / "m.json").write_text('{"embed_dim": 8, "vision_cfg": {"widht": 8}, "text_cfg": {}}'),
        },
        "cannot be loaded from .*widht",
    ),
    "text tower of a hub": (
        lambda p, w: {
            "model": str(p / "m.json"),
            "x": (p / "m.json").write_text(
                '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"hf_model_name": "someone/tower"}}'
            ),
        },
        "hf_model_name is 'someone/tower', which is not a text tower of open_clip's own models",
    ),
    "other activation": (
        lambda p, w: {"model": "ViT-B-32", "pretrained": "openai"},
        "trained with QuickGELU; name the model ViT-B-32-quickgelu",
    ),
    "preprocessing unknown": (lambda p, w: {"model": "ViT-L-14"}, "name the open_clip_config.json"),
    "not a number": (lambda p, w: {"pretrained": str(nan_weights(p / "m.safetensors", w))}, "output is not finite"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str, weights: Path, tmp_path: Path) -> None:
    spoil, message = REFUSALS[name]
    keys = spoil(tmp_path, weights)
    keys.pop("x", None)
    with pytest.raises(UserError, match=message) as caught:
        encode(tmp_path, [photo(0)], feature(weights, **keys))
    assert "\n" not in str(caught.value)


def test_only_safetensors_are_taken_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network; the hub's cache holds the default model's weights as a pickle, then as safetensors."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--ViT-L-16-SigLIP-256"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    pickled(snapshot / "open_clip_pytorch_model.bin")
    default = OpenClipFeature()
    with pytest.raises(UserError, match="'webli' of image model 'ViT-L-16-SigLIP-256' cannot be fetched") as caught:
        find_image_model(default.model, default.pretrained)
    assert "\n" not in str(caught.value)
    (snapshot / "open_clip_model.safetensors").write_bytes(b"weights")
    model = find_image_model(default.model, default.pretrained)
    assert model.weights == snapshot / "open_clip_model.safetensors"
    assert model.encoder == "open_clip:ViT-L-16-SigLIP-256 webli"
    assert model.preprocessing["size"] == 256 and tuple(model.preprocessing["mean"]) == (0.5, 0.5, 0.5)


def test_weights_in_a_file_keep_the_models_preprocessing(weights: Path, tmp_path: Path) -> None:
    """That of SigLIP's published weights, or of the config published with the file; open_clip itself would guess."""
    assert tuple(find_image_model("ViT-L-16-SigLIP-256", str(weights)).preprocessing["mean"]) == (0.5, 0.5, 0.5)
    assert find_image_model("ViT-L-16-SigLIP-256", str(weights)).preprocessing["resize_mode"] == "squash"
    published = tmp_path / "open_clip_config.json"
    published.write_text(f'{{"model_cfg": {MODEL.read_text()}, "preprocess_cfg": {{"resize_mode": "longest"}}}}')
    model = find_image_model(str(published), str(weights))
    assert (model.preprocessing["resize_mode"], model.preprocessing["size"]) == ("longest", 64)
    wide = photo(0, size=(120, 40))
    squashed, cropped = (
        encode(tmp_path, [wide], feature(weights, model=path)).rows[0].astype(np.float32)
        for path in (str(published), str(MODEL))
    )
    assert squashed @ cropped < 0.999
