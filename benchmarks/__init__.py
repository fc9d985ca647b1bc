"""Measurements: each prints versions, hardware, commit and a table, and refuses to report where results disagree."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def describe_setting() -> dict[str, str]:
    """Our commit, the versions and the hardware that a table was measured with."""
    return {
        "commit": checkout_commit(REPOSITORY),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}",
        "hardware": f"{processor_name()}, {torch.get_num_threads()} thread(s)",
    }


def checkout_commit(folder: Path) -> str:
    """The commit of a git checkout, marked if files differ; a note if ``folder`` is not a checkout."""
    if not (folder / ".git").exists():  # git would answer for a repository around it
        return "no git checkout"
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor_name() -> str:
    """The processor's name, as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
