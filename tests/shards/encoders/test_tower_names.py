"""What an image model's config may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.base.errors import UserError
from shards.encoders.tower_names import check_towers

KNOWN = {"roberta-base"}


def check(vision: Any, text: Any) -> None:
    check_towers("m.json", {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, KNOWN)


def test_architectures_of_the_libraries_are_taken() -> None:
    check({"image_size": 64, "layers": 2}, {"width": 8, "hf_model_name": None})
    check({"timm_model_name": "vit_base_patch16_siglip_256.v2", "timm_model_pretrained": False}, {})
    check({}, {"hf_model_name": "roberta-base"})


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({}, {"hf_model_name": "someone/tower"}, "hf_model_name is 'someone/tower', which is not a text tower of"),
        ({}, {"hf_model_name": ["roberta-base"]}, "hf_model_name is"),
        ({"timm_model_name": "hf-hub:someone/model"}, {}, "timm_model_name is 'hf-hub:someone/model'; expected the"),
        ({"timm_model_name": "local-dir:/x"}, {}, "timm_model_name is 'local-dir:/x'"),
        ({"timm_model_name": "vit_base", "timm_model_pretrained": True}, {}, "timm_model_pretrained is on"),
        ([], {}, "are not both mappings"),
    ],
)
def test_what_a_hub_holds_is_refused(vision: Any, text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check(vision, text)
    assert "\n" not in str(refused.value)


def test_a_folder_named_like_a_known_tower_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read its config before the hub's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta-base").mkdir()
    with pytest.raises(UserError, match="or is a folder here"):
        check({}, {"hf_model_name": "roberta-base"})
