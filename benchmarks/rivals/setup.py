"""Makes the virtual environment of a rival library, with the versions that its file of requirements pins.

Nothing of it enters our own environment. Needs Python 3.11, for which the versions are pinned.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import REPOSITORY
from fmrl_dist.base.errors import require, run_command

LIBRARIES = ("rectools", "replay")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rivals.setup", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "rivals", help="(default: build/rivals)")
    arguments = parser.parse_args(argv)
    require(sys.version_info[:2] == (3, 11), f"this is Python {sys.version.split()[0]}; expected 3.11")
    environment = arguments.folder / arguments.library
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    requirements = Path(__file__).parent / f"{arguments.library}-requirements.txt"
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--requirement", str(requirements)], check=True)
    print(environment / "bin" / "python")


if __name__ == "__main__":
    run_command(main)
