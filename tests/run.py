"""The tests in two parts: first what may run side by side, in two processes, then what needs the machine to itself.

``python -m tests.run [-m EXPRESSION] [WORDS …]`` runs pytest twice with these markers and words. The output ends with
one line in the manner of pytest's own, of both parts together; the exit status is that of the first part that failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

PARTS = {  # a file's tests share what they have set up; slow files begin, see tests/conftest.py
    "not alone": ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"],
    "alone": [],
}
NO_TESTS = 5  # exit status of pytest where the expression leaves none


def run_parts(expression: str, words: Sequence[str]) -> int:
    """Run both parts, the second one also where the first fails; returns the exit status."""
    began, statuses, counts = time.monotonic(), [], Counter[str]()
    for part, options in PARTS.items():
        markers = f"({expression}) and {part}" if expression else part
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", *options, "-m", markers, f"--junitxml={report}", *words]
            statuses.append(subprocess.run(command).returncode)
            counts += outcomes(report)
    print(summary(counts, time.monotonic() - began), flush=True)
    return exit_status(statuses)


def outcomes(report: Path) -> Counter[str]:
    """How many tests ended how, from a JUnit report; without one, pytest itself has failed: one error."""
    if not report.exists():
        return Counter(error=1)
    total = Counter[str]()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        total += Counter({kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "skipped", "errors")})
    passed = total["tests"] - total["failures"] - total["skipped"] - total["errors"]
    return Counter(failed=total["failures"], passed=passed, skipped=total["skipped"], error=total["errors"])


def summary(counts: Counter[str], seconds: float) -> str:
    """Such as ``1 failed, 7 passed, 2 skipped in 0.50s``."""
    told = [f"{counts[kind]} {kind}" for kind in ("failed", "passed", "skipped", "error") if counts[kind]]
    plural = "s" if counts["error"] > 1 else ""
    return f"{', '.join(told) or 'no tests ran'}{plural} in {seconds:.2f}s"


def exit_status(statuses: Sequence[int]) -> int:
    """That of the first part that failed. A part may be empty, but not all of them."""
    if all(status == NO_TESTS for status in statuses):
        return NO_TESTS
    return next((status for status in statuses if status not in (0, NO_TESTS)), 0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__)
    parser.add_argument("-m", default="", metavar="EXPRESSION", help="of pytest's markers")
    arguments, words = parser.parse_known_args(argv)
    return run_parts(arguments.m, words)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
