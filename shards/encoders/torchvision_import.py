"""``torchvision`` built for CUDA beside a CPU PyTorch: it cannot load its operators, nor be imported without them.

``open_clip`` needs it, and ``transformers`` imports it wherever it is installed. Neither uses its operators here, but
torchvision describes the shapes of two of them (``nms``, ``qnms``) as it is imported and fails if they do not exist
("operator torchvision::nms does not exist").
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def make_torchvision_importable() -> torch.library.Library | None:
    """Declare the two operators, without code, if the installed torchvision cannot load its own.

    To be called before anything imports torchvision. The result is kept in the cache: the declarations live as long.

    Returns:
        The library that declares them, None where they are not needed.
    """
    if torch.version.cuda is not None or _has_own_operators():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def _has_own_operators() -> bool:
    """Whether torchvision is absent, or loads its operators as it would do on import, or someone declared them."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
