"""JSON of another kind than expected: every reader says in one line which file it is, and how to mend it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.json_text import read_object, read_objects
from fmrl_dist.checkpoint.export.files import is_export
from fmrl_dist.checkpoint.export.reading import read_export
from fmrl_dist.checkpoint.folder import latest_sha256, load_checkpoint
from fmrl_dist.checkpoint.run_folder import is_finished
from fmrl_dist.data.store.reader import Store
from fmrl_dist.distributed.deepspeed import checked_plugin
from fmrl_dist.training.monitoring.logbook import kept_lines
from launch.slurm.record import read_record
from launch.sweeps.space import read_space
from launch.sweeps.study import SweepStudy
from launch.sweeps.worker import best_value
from tests.fixtures.sweeps import write_space

WRONG = {
    **{text: text.encode() for text in ("[]", "3", "null", '"x"', "{}", "true", '{"step": []}', "")},
    **{"truncated": b'{"step": 1, "spl', "not UTF-8": b'{"step": "\xff"}\n', "deep": b"[" * 10_000_000},
    **{"two values": b"{} {}", "a long number": b"1" * 5000},
}
# Each reads a file of a folder.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "record": ("submitted.json", read_record),
    "checkpoint": ("state.json", load_checkpoint),
    "export": ("config.json", read_export),
    "store": ("manifest.json", Store.open),
    "deepspeed": ("zero.json", lambda folder: checked_plugin(os.environ)),
    "best": ("metrics.jsonl", lambda folder: best_value(folder, "ndcg@10@8")),
    "space": ("space.json", lambda folder: read_space(folder / "space.json")),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_another_kind(reader: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, read = READERS[reader]
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    (tmp_path / name).write_bytes(WRONG[wrong])
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message and len(message) < 600
    assert (tmp_path / name).read_bytes() == WRONG[wrong]


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong not in ("", "truncated")])
def test_a_log_of_another_kind_is_not_cut(wrong: str, tmp_path: Path) -> None:
    """Neither as its only line, nor before others."""
    path = tmp_path / "metrics.jsonl"
    alone = [WRONG[wrong]] if wrong != "two values" else []  # it may be a line that was not written to its end
    for data in (*alone, WRONG[wrong] + b'\n{"step": 2}\n'):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"metrics\.jsonl.* restore it from a copy, or move it away"):
            kept_lines(path, step=5)


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong not in ("", "truncated")])
def test_a_journal_of_another_kind(wrong: str, tmp_path: Path) -> None:
    """Valid JSON too. What was written before stays."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    space = read_space(write_space(tmp_path))
    SweepStudy(folder, space)
    journal = folder / "journal.log"
    before = journal.read_bytes() + WRONG[wrong] + b"\n" + journal.read_bytes()
    journal.write_bytes(before)
    with pytest.raises(UserError) as caught:
        SweepStudy(folder, space)
    message = str(caught.value)
    assert message.startswith(str(journal)) and "\n" not in message and len(message) < 600
    assert (
        message.endswith("; restore it from a copy, or start the sweep in another --folder") or "expected an" in message
    )
    assert journal.read_bytes() == before


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mark_of_another_kind_is_none(wrong: str, tmp_path: Path) -> None:
    """A run is then not finished, a folder no export, a checkpoint no latest one: nothing is taken for granted."""
    for name in ("finished.json", "config.json", "state.json"):
        (tmp_path / name).write_bytes(WRONG[wrong])
    assert not is_finished(tmp_path) and not is_export(tmp_path) and latest_sha256(tmp_path) == ""


@pytest.mark.parametrize(
    "stage",
    [
        {"stage": "train", "jobs": "12", "logs": "ab"},  # a text is a sequence too: of the jobs 1 and 2
        {"stage": "train", "jobs": [], "logs": []},
        {"stage": "train", "jobs": ["12"], "logs": []},
        {"stage": "train", "jobs": [12], "logs": ["log"]},
        {"stage": "train", "jobs": ["12", "--user=me"], "logs": ["log", "log"]},
        {"stage": "train", "jobs": ["12"], "logs": [None]},
        {"stage": None, "jobs": ["12"], "logs": ["log"]},
        {"jobs": ["12"], "logs": ["log"]},
        ["train", ["12"], ["log"]],
    ],
)
def test_a_record_of_jobs_that_names_none(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "submitted.json").write_text(json.dumps({"stages": [stage]}))
    with pytest.raises(UserError, match="is not a record of jobs; find its jobs with squeue, and remove the file"):
        read_record(tmp_path)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, complaint in (
        ("[1]", "holds a list; expected an object: mend it"),
        ("null", "holds null; expected"),
        ("true", "holds true or false; expected"),
        ("{", r"is not JSON \(Expecting property name.*\); mend it"),
        ("[" * 100_000, "is nested too deeply for JSON of ours; mend it"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^record .*a\.json {complaint}"):
            read_object(path, "record", "mend it")
    path.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert [record for _, record in read_objects(path, "")] == [{"a": 1}, {"b": 2}]
    path.write_text('{"a": 1}\n{"b": 2}')
    assert [line for line, _ in read_objects(path, "")] == ['{"a": 1}', '{"b": 2}']
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(UserError, match=r"a\.json, line 2, is not JSON .*; mend it"):
        list(read_objects(path, "mend it"))
