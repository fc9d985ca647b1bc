"""``python -m fmrl_dist.checkpoint.progress RUN``: whether a run is finished, for what has started its training.

A trainer that a signal stops exits with 0 too, as it has saved. The run's own state says what that was, whatever links
and evaluations are in its folder.
"""

from __future__ import annotations

from pathlib import Path

from fmrl_dist.base.errors import run_command
from fmrl_dist.checkpoint.folder import linked_checkpoint
from fmrl_dist.checkpoint.run_folder import is_finished
from fmrl_dist.config.command_line import CommandParser


def main(argv: list[str]) -> None:
    """Print ``finished CHECKPOINT`` or ``unfinished CHECKPOINT``, the latest; "its start" where there is none."""
    parser = CommandParser("python -m fmrl_dist.checkpoint.progress", description="Whether a run is finished.")
    parser.add_argument("run", type=Path, help="its folder")
    run: Path = parser.parse_args(argv).run
    latest = linked_checkpoint(run / "checkpoints", "latest")
    print("finished" if is_finished(run) else "unfinished", "its start" if latest is None else latest.name)


if __name__ == "__main__":
    run_command(main)
