"""Whether the loss can run here in the way that ``loss.impl`` asks for."""

from __future__ import annotations

import importlib.util
import os
import shutil

from fmrl_dist.errors import require
from fmrl_dist.runtime import Runtime


def check_loss_impl(impl: str, runtime: Runtime) -> None:
    """Refuse what cannot run on this machine, and announce what makes the first steps wait.

    Raises:
        UserError: Triton without a GPU or the package, or a compiled loss without a compiler.
    """
    if impl == "triton":
        require(
            runtime.device.type == "cuda" and importlib.util.find_spec("triton") is not None,
            f"loss.impl is triton, which needs a CUDA device and the extra fmrl-dist[triton]; this process runs on "
            f"{runtime.device}: choose tiled",
        )
    if impl == "compiled":
        compiler = os.environ.get("CXX", "g++")
        require(
            runtime.device.type == "cuda" or shutil.which(compiler) is not None,
            f"loss.impl is compiled, which needs a C++ compiler; {compiler} is not on the PATH: install one, or choose "
            "tiled",
        )
        runtime.say("loss.impl is compiled: the first steps wait for the compiler, up to a minute")
