"""Every test that is marked ``gpu``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import REPOSITORY
from benchmarks.gpu.stage import StageRun
from fmrl_dist.base.errors import run_command

MARK = "mark.gpu"
PROCESSES = 8
SLOWEST = 10  # tests that are named with their seconds


def main(argv: list[str]) -> None:
    run = StageRun.start("tests", argv)
    # Only the modules that hold such tests: others may import what this machine lacks.
    modules = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command += ["--verbose", "--tb=short", "--durations=15"]
        if importlib.util.find_spec("xdist") is not None:  # most of the time is Triton's compiler
            command += ["--numprocesses", str(min(os.cpu_count() or 1, PROCESSES))]
        code = subprocess.run([*command, *map(str, modules)], cwd=REPOSITORY, check=False).returncode
        if not report.exists():
            run.refuse(f"pytest ended with exit code {code} before any test")
            run.finish()
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    run.record(**counts, seconds=float(suite.attrib["time"]))
    cases = sorted(suite.iter("testcase"), key=lambda case: -float(case.attrib["time"]))
    for case in cases[:SLOWEST]:
        run.record(slow_test=case.attrib["name"], seconds=float(case.attrib["time"]))
    for case in cases:
        for problem in (*case.iter("failure"), *case.iter("error")):
            run.refuse(f"{case.attrib['classname']}.{case.attrib['name']}: {problem.attrib.get('message', '')[:300]}")
    if code != 0 and not run.problems:
        run.refuse(f"pytest ended with exit code {code}")
    if counts["skipped"] and not run.is_dry_run:
        run.refuse(f"{counts['skipped']} tests were skipped")
    run.finish()


if __name__ == "__main__":
    run_command(main)
