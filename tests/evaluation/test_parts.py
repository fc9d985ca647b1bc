"""An evaluation in parts equals the whole evaluation, byte for byte; a part that does not belong is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmrl_dist import evaluate, export
from fmrl_dist.base.errors import UserError
from fmrl_dist.base.files import json_sha256
from fmrl_dist.base.parts import Part
from fmrl_dist.checkpoint.folder import load_checkpoint
from fmrl_dist.config.loading import load_config
from fmrl_dist.data.store.reader import Store
from fmrl_dist.evaluation.parts import ComputeSetting, EvaluationIdentity, join_parts, write_part
from fmrl_dist.evaluation.rank_counts import RankCounts
from tests.fixtures.processes import run_processes
from tests.fixtures.ranking import CUTOFF
from tests.fixtures.training import contents, evaluate_here, evaluation, make_shop, refusal, run_here, train_here

NUM_BLOCKS = 7  # of the test split: 113 users minus those with 2 events, in blocks of 16


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shop(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def trained(shop: Path) -> Path:
    run = train_here(shop, shop.parent / "run")
    run_here(export.main, ["--checkpoint", run, "--size", 4])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def evaluate_parts(num_parts: int, *words: object) -> None:
    for number in range(num_parts, 0, -1):
        evaluate_here(*words, "--part", f"{number}/{num_parts}")


# The same bytes


@pytest.mark.parametrize(
    ("num_parts", "words", "name"),
    [
        (1, (), "evaluation"),
        (2, ("--split", "valid"), "evaluation-valid"),
        (3, ("--mask-seen",), "evaluation-masked"),
        (7, ("--split", "valid", "--mask-seen"), "evaluation-valid-masked"),
        (NUM_BLOCKS + 2, (), "evaluation"),  # two of them are empty
        (2, ("--metrics", "recall,coverage,popularity"), "evaluation"),
    ],
)
@pytest.mark.parametrize("what", ["run", "export"])
def test_parts_are_the_whole(
    run: Path, what: str, num_parts: int, words: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = run if what == "run" else run / "export-4"
    evaluate_here(subject, *words)
    expected, said = contents(subject), capsys.readouterr().out
    for ending in (".json", ".png"):
        (subject / f"{name}{ending}").unlink()
    (subject / f"{name.removesuffix('-masked')}-users.parquet").unlink()
    evaluate_parts(num_parts, subject, *words)
    assert not (subject / f"{name}.json").exists()
    parts = subject / f"{name}.parts"
    names = [f"{i}-of-{num_parts}.{ending}" for i in range(1, num_parts + 1) for ending in ("json", "safetensors")]
    assert sorted(p.name for p in parts.iterdir()) == sorted(names)
    capsys.readouterr()
    evaluate_here(subject, *words, "--join")
    assert capsys.readouterr().out == said
    assert contents(subject) == expected and not parts.exists()


def test_every_part_has_its_blocks(run: Path, shop: Path) -> None:
    blocks = Store.open(load_config(shop).store.path).manifest.splits["test"]
    assert len(blocks) == NUM_BLOCKS
    evaluate_parts(3, run)
    for number in (1, 2, 3):
        cells = json.loads((run / "evaluation.parts" / f"{number}-of-3.json").read_text())["histograms"]
        num_users = sum(block.count for block in blocks[number - 1 :: 3])
        assert torch.tensor(cells).sum((0, 3)).tolist() == [[num_users] * 2] * 2


def parts_here(run: str, parts: list[str]) -> None:
    for part in parts:
        evaluate_here(run, "--part", part)


@pytest.mark.multiproc
def test_processes_share_a_part(run: Path) -> None:
    """Two ranks share two blocks, and one block; their parts join with those of one process."""
    expected = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    run_processes(2, parts_here, str(run), ["1/4", "4/4"])
    parts_here(str(run), ["2/4", "3/4"])
    evaluate_here(run, "--join")
    assert (run / "evaluation.json").read_bytes() == expected


def test_users_of_damaged_blocks_are_counted_once(shop: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(load_config(shop).store.path, store)
    blocks = Store.open(store).manifest.splits["test"]
    for block in (blocks[0], blocks[4]):
        with (store / block.shard).open("r+b") as file:
            file.seek(block.offset + block.num_bytes // 2)
            file.write(b"\xff" * 64)
    words = ["--store.path", store, "--store.on_bad_shard", "skip", "--train.max_steps", 4]
    words += ["--store.max_lost_share", 0.5]
    run = train_here(shop, tmp_path / "run", *words)
    expected = (run / "evaluation.json").read_bytes()
    assert evaluation(run)["users_lost"] == blocks[0].count + blocks[4].count
    (run / "evaluation.json").unlink()
    evaluate_parts(2, run)
    evaluate_here(run, "--join")
    assert (run / "evaluation.json").read_bytes() == expected


# Parts that do not belong


@pytest.fixture
def parts(run: Path) -> Path:
    """The folder of three parts of a run without an evaluation."""
    (run / "evaluation.json").unlink()
    evaluate_parts(3, run)
    return run / "evaluation.parts"


def join_refusal(run: Path, *words: object) -> str:
    """The line that refuses to join; nothing is written or removed."""
    before = contents(run)
    line = refusal(evaluate.main, "--checkpoint", run, *words, "--join")
    assert contents(run) == before
    return line.removeprefix("error: ")


def test_no_parts(run: Path) -> None:
    expected = f"{run / 'evaluation.parts'} holds no parts to join; evaluate them with --part 1/N to N/N"
    assert join_refusal(run) == expected
    (run / "evaluation.parts").mkdir()
    assert join_refusal(run) == expected


def test_missing_parts(run: Path, parts: Path) -> None:
    (parts / "2-of-3.json").unlink()
    assert join_refusal(run) == f"{parts} lacks 1 of 3 parts; evaluate --part 2/3 and join again"
    evaluate_here(run, "--part", "2/3")
    evaluate_here(run, "--join")


def test_files_of_others_stay_beside_parts(run: Path, parts: Path) -> None:
    (parts / f".1-of-3.json.{'0' * 16}").touch()  # of a process that was killed
    (parts / "notes.txt").write_text("mine")
    evaluate_here(run, "--join")
    assert [path.name for path in parts.iterdir()] == ["notes.txt"]


def test_parts_of_another_division(run: Path, parts: Path) -> None:
    evaluate_here(run, "--part", "1/2")
    assert join_refusal(run) == f"{parts} holds parts of 2 and of 3; keep the files of one N only and join again"


def test_part_under_another_name(run: Path, parts: Path) -> None:
    shutil.copy(parts / "1-of-3.json", parts / "2-of-3.json")
    line = join_refusal(run)
    assert line.startswith(f"{parts / '2-of-3.json'} is of another evaluation: part is '1/3', expected '2/3'; ")


def test_part_of_another_checkpoint(run: Path, parts: Path) -> None:
    """The best of the run has changed since; the message says so, and evaluating the part again fixes it."""
    best, latest = ((run / "checkpoints" / link).resolve() for link in ("best", "latest"))
    old, new = (load_checkpoint(path).sha256[:12] for path in (best, latest))
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to(latest.name)
    for number in (1, 2, 3):
        path, part = parts / f"{number}-of-3.json", f"{number}/3"
        problem = f"checkpoint_sha256 is '{old}', expected '{new}'"
        assert join_refusal(run) == f"{path} is of another evaluation: {problem}; evaluate it again with --part {part}"
        evaluate_here(run, "--part", part)
    evaluate_here(run, "--join")
    assert (run / "evaluation.json").exists()


def test_part_of_another_export(run: Path) -> None:
    evaluate_parts(2, run / "export-4")
    other = ["--split", "valid"]
    evaluate_parts(1, run / "export-4", *other)  # does not interfere
    run_here(export.main, ["--checkpoint", run / "checkpoints" / "latest", "--size", 4, "--output", run / "new"])
    shutil.move(run / "export-4" / "evaluation.parts", run / "new" / "evaluation.parts")
    assert "is of another evaluation: checkpoint_sha256 is" in join_refusal(run / "new")


def test_part_of_another_store(run: Path, parts: Path, tmp_path: Path) -> None:
    other = make_shop(tmp_path / "other", num_items=50).parent / "store"
    own_folder = f"evaluation-on-{Store.open(other).manifest.sha256[:12]}.parts"
    assert f"{own_folder} holds no parts to join" in join_refusal(run, "--store", other)
    shutil.copytree(parts, run / own_folder)
    assert "1-of-3.json is of another evaluation: manifest_sha256 is" in join_refusal(run, "--store", other)


def test_part_with_other_threads(run: Path, parts: Path) -> None:
    """All parts with the same two threads are accepted."""
    run_here(evaluate.main, ["--checkpoint", run, "--part", "3/3", "--threads", 2])
    assert join_refusal(run) == (
        f"{parts / '3-of-3.json'} was evaluated with 2 thread(s) on cpu, part 1/3 with 1 thread(s) on cpu: they "
        "round differently; evaluate all parts with the same --threads on the same kind of device"
    )
    for part in ("1/3", "2/3"):
        run_here(evaluate.main, ["--checkpoint", run, "--part", part, "--threads", 2])
    evaluate_here(run, "--join")
    assert (run / "evaluation.json").exists()


def test_part_on_another_device(tmp_path: Path) -> None:
    for number, setting in enumerate((MEANS, ComputeSetting(1, "cuda")), 1):
        write_part(tmp_path, Part(number, 2), EVALUATED, setting, NOBODY)
    problem = r"2-of-2\.json was evaluated with 1 thread\(s\) on cuda, part 1/2 with 1 thread\(s\) on cpu"
    with pytest.raises(UserError, match=problem):
        join_parts(tmp_path, EVALUATED)


def test_parts_with_other_rotations(tmp_path: Path) -> None:
    for number, rotation in enumerate(("a" * 64, "b" * 64), 1):
        write_part(tmp_path, Part(number, 2), EVALUATED, ComputeSetting(1, "cpu", rotation), NOBODY)
    with pytest.raises(UserError, match=r"on cpu, rotation b{12}, part 1/2 with 1 thread\(s\) on cpu, rotation a{12}:"):
        join_parts(tmp_path, EVALUATED)


MEANS = ComputeSetting(1, "cpu")
EVALUATED = EvaluationIdentity(
    "c" * 64, "m" * 64, "test", False, [4, 8], [], users=60, cells=1, cutoff=CUTOFF, keep_users=False, list_lengths=[]
)
NOBODY = RankCounts(torch.zeros(1, 2, 2, 2 * CUTOFF + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"checkpoint_sha256": "d" * 64}, "checkpoint_sha256 is 'cccccccccccc', expected 'dddddddddddd'"),
        ({"manifest_sha256": "d" * 64}, "manifest_sha256 is 'mmmmmmmmmmmm', expected 'dddddddddddd'"),
        ({"split": "valid"}, "split is 'test', expected 'valid'"),
        ({"mask_seen": True}, "mask_seen is False, expected True"),
        ({"sizes": [4, 16]}, "sizes is [4, 8], expected [4, 16]"),
        ({"vector_sizes": [4]}, "vector_sizes is [], expected [4]"),
        ({"users": 61}, "users is 60, expected 61"),
        ({"cells": 15}, "cells is 1, expected 15"),
        ({"cutoff": 20}, "cutoff is 10, expected 20"),
        ({"keep_users": True}, "keep_users is False, expected True"),
        ({"list_lengths": [10]}, "list_lengths is [], expected [10]"),
    ],
)
def test_the_whole_identity_is_compared(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = write_part(tmp_path / "parts", Part(1, 1), EVALUATED, MEANS, NOBODY)
    with pytest.raises(UserError) as refused:
        join_parts(tmp_path / "parts", replace(EVALUATED, **change))
    assert str(refused.value) == f"{path} is of another evaluation: {problem}; evaluate it again with --part 1/1"


def test_figures_that_were_changed(tmp_path: Path) -> None:
    """At both sizes a user is moved from beyond the cut-off to target rank 1: plausible, but not what was written."""
    path = write_part(tmp_path, Part(1, 1), EVALUATED, MEANS, counted([[50] + [0] * 2 * CUTOFF] * 2))
    text = path.read_text()
    path.write_text(text.replace("[50, 0, 0,", "[49, 0, 1,"))
    assert path.read_text() != text
    with pytest.raises(UserError) as refused:
        join_parts(tmp_path, EVALUATED)
    problem = "ValueError: its sha256 does not match the recorded one"
    assert str(refused.value) == f"{path} is damaged ({problem}); evaluate it again with --part 1/1"


def counted(rows: list[list[int]] | torch.Tensor) -> RankCounts:
    """Counts of two sizes, the same among all items and among unseen ones."""
    return RankCounts(torch.as_tensor(rows).expand(1, 2, -1, -1))


histograms = st.lists(st.integers(0, 2), min_size=2 * CUTOFF + 1, max_size=2 * CUTOFF + 1)


@st.composite
def histogram_pairs(draw: st.DrawFn) -> torch.Tensor:
    """Two sizes' histograms of the same users, int64 [2, 2·CUTOFF + 1]."""
    row = draw(histograms)
    return torch.tensor([row, draw(st.permutations(row))])


@given(rows=st.lists(histogram_pairs(), min_size=1, max_size=5))
def test_joining_adds(rows: list[torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for number, row in enumerate(rows, 1):
            write_part(Path(name), Part(number, len(rows)), EVALUATED, MEANS, counted(row))
        assert torch.equal(join_parts(Path(name), EVALUATED).all_users[0], sum(rows, torch.zeros_like(rows[0])))


@given(row=histogram_pairs(), data=st.data())
def test_damage_never_moves_a_figure(row: torch.Tensor, data: st.DataObject) -> None:
    """One byte is changed, or the end is lost: refused, or the figures stay the same (a space for a space)."""
    with tempfile.TemporaryDirectory() as name:
        path = write_part(Path(name), Part(1, 1), EVALUATED, MEANS, counted(row))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            assert torch.equal(join_parts(Path(name), EVALUATED).histograms, counted(row).histograms)
        except UserError as error:
            assert str(path) in str(error) and str(error).endswith("; evaluate it again with --part 1/1")
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "rows",
    [
        *([[1]], [[0] * 21] * 3, [[0] * 21, [0] * 20], [["1"] * 21] * 2, [[0.5] * 21] * 2, {"4": [0] * 21}, None),
        *([[1] * 21, [0] * 21], [[-1, 1] + [0] * 19] * 2, [[61] + [0] * 20] * 2, [[2**64] + [0] * 20] * 2),
    ],
    ids=repr,
)
def test_impossible_histograms(tmp_path: Path, rows: object) -> None:
    """A file with a matching hash, but not written by this code."""
    path = write_part(tmp_path, Part(1, 1), EVALUATED, MEANS, NOBODY)
    record = json.loads(path.read_text()) | {"histograms": [[rows, rows]]}
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": json_sha256(record)}))
    with pytest.raises(UserError, match=r"1-of-1\.json is damaged \(.*\); evaluate it again with --part 1/1$"):
        join_parts(tmp_path, EVALUATED)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "1/2/3", "-1/2", "1 / 2", "٣/٤", ""])
def test_what_is_not_a_part(text: str) -> None:
    line = refusal(evaluate.main, "--checkpoint", "nowhere", f"--part={text}")
    assert line == f"error: argument --part: {text!r} is not a part; expected I/N with I from 1 to N; see --help"


def test_part_or_join() -> None:
    line = refusal(evaluate.main, "--checkpoint", "nowhere", "--join", "--part", "1/2")
    assert "argument --part: not allowed with argument --join" in line
