"""Makes a ``torchvision`` that was built for CUDA importable beside a CPU PyTorch.

Such a torchvision cannot load its operators, and fails on import: it describes the shapes of two of them (``nms``,
``qnms``) and finds that they do not exist ("operator torchvision::nms does not exist"). ``open_clip`` needs
torchvision, and ``transformers`` imports it if it is installed; neither uses these operators here.
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

    Call it before anything imports torchvision. The cache keeps the result, and so the declarations, alive.

    Returns:
        The library that declares them; None where it is not needed.
    """
    if torch.version.cuda is not None or _has_own_operators():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def _has_own_operators() -> bool:
    """Whether torchvision is absent, can load its operators as on import, or has had them declared by someone else."""
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
