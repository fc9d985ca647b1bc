"""fMRLRec at scale: train once, deploy any size."""

from __future__ import annotations

import importlib
from typing import Any

from fmrl_dist.base.command_start import start_command

__version__ = "0.1.0"

start_command()


def __getattr__(name: str) -> Any:
    """``fmrl_dist.Recommender``, imported when it is asked for: a command starts without PyTorch."""
    if name == "Recommender":
        return importlib.import_module("fmrl_dist.deploy.recommender").Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
