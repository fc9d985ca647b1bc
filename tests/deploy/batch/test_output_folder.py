"""An output that several processes write: of two writers of a part one wins, and what killed ones left is cleared."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.batch.output_folder import OutputFolder

LISTS = pa.table({"user": [1], "item_ids": [["a"]], "scores": pa.array([[1.5]], pa.list_(pa.float32()))})


@pytest.mark.parametrize("name", ["lists", "lists.jsonl"])
def test_a_writer_that_is_overtaken(name: str, tmp_path: Path) -> None:
    """By another process that also finishes the output."""
    output = OutputFolder.of(tmp_path / name, None)
    output.path.mkdir()
    with output.part(0, "job") as slow:
        slow.write(LISTS)
        (its_file,) = output.path.iterdir()
        with output.part(0, "job") as fast:
            fast.write(LISTS)
            assert its_file.exists(), "its writer is alive"
        output.finish()
        assert not its_file.exists()
    names = sorted(path.name for path in output.path.iterdir())
    if output.joined is None:
        assert names == ["_SUCCESS", "part-00000.parquet"]
    else:
        assert names == ["_SUCCESS"]
        assert output.joined.read_bytes() == b'{"user": 1, "item_ids": ["a"], "scores": [1.5]}\n'


def test_a_writer_whose_folder_is_gone(tmp_path: Path) -> None:
    output = OutputFolder.of(tmp_path / "lists", None)
    output.path.mkdir()
    with pytest.raises(UserError, match="its folder does not exist"), output.part(0, "job") as writer:
        writer.write(LISTS)
        for path in output.path.iterdir():
            path.unlink()
    with output.part(0, "job") as writer:
        writer.write(LISTS)
    with pytest.raises(UserError, match="^the input has changed$"), output.part(0, "job"):
        raise UserError("the input has changed")


def test_what_killed_processes_left(tmp_path: Path) -> None:
    output = OutputFolder.of(tmp_path / "lists", None)
    output.path.mkdir()
    names = [".part-00000.parquet.0123456789abcdef", ".part-00001.parquet.0123456789abcdef", ".part-notes"]
    for name in names:
        (output.path / name).touch()
    output.finish()
    assert sorted(path.name for path in output.path.iterdir()) == [".part-notes", "_SUCCESS"]
