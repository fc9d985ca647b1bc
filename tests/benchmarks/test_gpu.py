"""The GPU script's dry run (every stage at toy size on the CPU), and how it ends a stage that takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.report import render
from tests.fixtures.processes import REPOSITORY, clean_environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_does_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the triton extra is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--commit", "c0ffee", "--out", str(tmp_path)]
    environment = clean_environment()
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + (tmp_path / "gpu.log").read_text()[-4000:]
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {"stage": "setting", "name": "commit", "value": "c0ffee"} in records
    report = (tmp_path / "gpu.md").read_text()
    for stage in gpu.STAGES:
        assert any(record["stage"] == stage.name for record in records)
        assert f"## {stage.title}\n\n`python -m benchmarks.gpu --stages {stage.name}`: done" in report
    assert "| NO |" not in report


def test_a_stage_that_takes_too_long_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child would write a file after a second; the stage ignores TERM."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(1); open({str(late)!r}, 'w')"
    code = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code += f"subprocess.run([sys.executable, '-c', {child!r}]); import time; time.sleep(60)"
    monkeypatch.setattr(gpu, "stage_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    began = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        assert gpu.run_stage("any", 0.3, tmp_path / "records", True, log) == "ended after 0.3 s"
    assert time.monotonic() - began < 30
    time.sleep(1.5)
    assert not late.exists()


def test_the_report_shows_each_kind_of_record_as_a_table() -> None:
    records: list[dict[str, Any]] = [
        {"stage": "setting", "name": "gpu", "value": "one"},
        {"stage": "scan", "case": "a", "seconds": 0.12345},
        {"stage": "scan", "case": "b", "seconds": 2.0},
        {"stage": "scan", "equal": False},
        {"stage": "stage", "name": "scan", "outcome": "done"},
    ]
    report = render(records, {"scan": "The scan"})
    assert "| case | seconds |\n|---|---|\n| a | 0.123 |\n| b | 2 |" in report
    assert "| equal |\n|---|\n| NO |" in report
