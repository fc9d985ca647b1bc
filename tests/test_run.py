"""``python -m tests.run``: two parts, one closing line, one exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fixtures.processes import REPOSITORY
from tests.run import exit_status, summary

CONFIG = "[pytest]\nmarkers =\n    alone\n    slow\naddopts = -q -p no:cacheprovider\n"
HEAD = "import os, pytest\nalone, slow = pytest.mark.alone, pytest.mark.slow\nin_worker = 'PYTEST_XDIST_WORKER'\n"
PASSES = "def test_side_by_side(): assert in_worker in os.environ\n"
ALONE = "@alone\ndef test_alone(): assert in_worker not in os.environ\n"
SKIPPED = "@alone\n@pytest.mark.skip\ndef test_skipped(): pass\n"
SLOW = "@slow\ndef test_slow(): assert False\n@slow\n@alone\ndef test_slow_alone(): assert False\n"
FAILS = "def test_fails(): assert False\n"
BREAKS = "@pytest.fixture\ndef broken(): assert False\n@alone\ndef test_breaks(broken): pass\n"
KILLS = "@alone\ndef test_kills(): os.kill(os.getpid(), 9)\n"


@pytest.mark.parametrize(
    ("tests", "words", "told", "status"),
    [
        (PASSES + ALONE + SKIPPED + SLOW, ["-m", "not slow"], "2 passed, 1 skipped", 0),
        (PASSES + ALONE + FAILS + BREAKS, [], "1 failed, 2 passed, 1 error", 1),
        (PASSES + KILLS, [], "1 passed, 1 error", 256 - 9),
        (ALONE, ["-k", "nothing"], "no tests ran", 5),
    ],
    ids=["green", "red", "killed", "none"],
)
def test_the_closing_line_and_status_are_of_both_parts(
    tests: str, words: list[str], told: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "pytest.ini").write_text(CONFIG)
    (tmp_path / "test_file.py").write_text(HEAD + tests)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "tests.run", *words, "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"{told} in \d+\.\d\ds", line), result.stdout
    assert result.returncode == status


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (Counter(passed=1234, skipped=5), "1234 passed, 5 skipped in 900.12s"),
        (Counter(error=2, skipped=1, passed=3, failed=4), "4 failed, 3 passed, 1 skipped, 2 errors in 900.12s"),
    ],
)
def test_the_line_reads_as_pytests_own(counts: Counter[str], line: str) -> None:
    assert summary(counts, 900.123) == line


@pytest.mark.parametrize(
    ("statuses", "status"), [([0, 0], 0), ([0, 1], 1), ([2, 1], 2), ([5, 0], 0), ([0, 5], 0), ([5, 5], 5), ([5, 3], 3)]
)
def test_the_first_part_that_failed_is_told(statuses: list[int], status: int) -> None:
    assert exit_status(statuses) == status
