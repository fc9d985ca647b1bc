"""What the config of an image model may name: libraries fetch what it names from a hub, kernels that they run included.

Only the image tower is used, but open_clip builds the text tower too: for one of transformers, it reads the config that
``hf_model_name`` names, and with it any attention that this config names.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import require

TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # an architecture of timm's own; a hub's has a colon


def check_towers(name: str, config: dict[str, Any], text_models: Set[str]) -> None:
    """Refuse a model config that names anything but architectures that the libraries hold themselves.

    Args:
        name: of the model, for the message.
        config: as open_clip takes it.
        text_models: names of text towers that open_clip's own configs have.

    Raises:
        UserError: likewise.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    require(
        isinstance(vision, dict) and isinstance(text, dict),
        f"image model {name}: vision_cfg and text_cfg are not both mappings; expected an open_clip model config",
    )
    tower = text.get("hf_model_name")
    require(
        not tower or (isinstance(tower, str) and tower in text_models and not Path(tower).exists()),
        f"image model {name}: text_cfg.hf_model_name is {str(tower)[:100]!r}, which is not a text tower of open_clip's "
        "own models, or is a folder here; the tower could run code from a hub: choose another model",
    )
    architecture = vision.get("timm_model_name")
    require(
        not architecture or (isinstance(architecture, str) and TIMM_NAME.fullmatch(architecture) is not None),
        f"image model {name}: vision_cfg.timm_model_name is {str(architecture)[:100]!r}; expected the name of an "
        "architecture, such as vit_base_patch16_224, not of a model on a hub",
    )
    require(
        not vision.get("timm_model_pretrained"),
        f"image model {name}: vision_cfg.timm_model_pretrained is on, which fetches other weights; turn it off",
    )
