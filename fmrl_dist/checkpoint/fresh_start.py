"""Whether a run may begin at step 0 in a folder: it must hold nothing of others, and nothing that a run has come to."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.yaml_text import read_yaml
from fmrl_dist.checkpoint.folder import newest_first

SECTIONS = {"data", "store", "model", "loss", "train", "eval", "run"}  # of the config.yaml that a run keeps
# What may be there before a run is: its lock, an unfinished config.yaml, and what a shell or a scheduler logs.
BEFORE_A_RUN = re.compile(r"\.lock|\.config\.yaml\.[0-9a-f]{16}|\.nfs.*|.*\.(log|out|err)", re.ASCII)
NEEDS_A_CHECKPOINT = ("finished.json", "evaluation*.json", "export-*")


def check_own_folder(folder: Path) -> None:
    """Refuse a folder of others: a run would replace, or remove, files that are named like its own.

    Raises:
        UserError: it holds something, but neither checkpoints nor a run's ``config.yaml``.
    """
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in found if BEFORE_A_RUN.fullmatch(name) is None]
    require(
        not found or _is_run_config(folder / "config.yaml") or bool(newest_first(folder / "checkpoints")),
        f"folder {folder} holds {', '.join(found[:3])}, and is not a run's: it lacks the config.yaml that a run keeps; "
        "choose another --run.dir, or empty it",
    )


def check_nothing_is_lost(folder: Path) -> None:
    """Refuse to begin a run anew where one has been saved before, though none of its checkpoints is there.

    A run that was killed before its first checkpoint begins anew.

    Raises:
        UserError: likewise.
    """
    traces = sorted(path.name for pattern in NEEDS_A_CHECKPOINT for path in folder.glob(pattern))
    if not traces and _log_goes_past_a_checkpoint(folder):
        traces = ["metrics.jsonl"]
    require(
        not traces,
        f"run folder {folder} holds {', '.join(traces[:3])} of a run that was saved, but no checkpoint: copy its "
        "checkpoints there, or start over in another --run.dir",
    )


def _is_run_config(path: Path) -> bool:
    try:
        config = read_yaml(path, "config")
    except (UserError, OSError):
        return False
    return isinstance(config, dict) and config.keys() >= SECTIONS


def _log_goes_past_a_checkpoint(folder: Path) -> bool:
    """Whether a run went on after a validation, which it saves, and did not die while it wrote that checkpoint."""
    if any((folder / "checkpoints").glob(".step-*")):
        return False
    validated = False
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as log:
            for line in log:
                is_valid = json.loads(line)["split"] == "valid"
                if validated and not is_valid:
                    return True
                validated |= is_valid
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return False
