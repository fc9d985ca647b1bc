"""What the parity benchmark says where there is no reference; its comparison needs a checkout of the authors' code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fixtures.processes import REPOSITORY


def test_a_path_without_the_reference_is_refused_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.parity", "--reference", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"error: --reference {tmp_path} has no model/lru.py; expected a checkout: git clone https://"
    )
