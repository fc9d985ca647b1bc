"""torchvision's operators are declared where they cannot be loaded, and only there: then it can be imported."""

from __future__ import annotations

import subprocess
import sys

from tests.fixtures.optional import skip_module_without
from tests.fixtures.processes import REPOSITORY

skip_module_without("torchvision", "make images")

# The fork stands for a process in which the operators exist already; so far only torch is imported.
CODE = """
import os
import torch
from shards.encoders.torchvision_import import make_torchvision_importable

fork = os.fork()
if fork == 0:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    assert make_torchvision_importable() is None
else:
    assert os.waitpid(fork, 0)[1] == 0, "where the operators exist"
    make_torchvision_importable()
    import torchvision.transforms
assert hasattr(torch.ops.torchvision, "nms")
"""


def test_torchvision_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
