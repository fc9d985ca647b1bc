"""``python -m fmrl_dist.recommend``: one history in words, many in files; equal to the recommender, whoever writes."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmrl_dist.base.errors import UserError
from fmrl_dist.deploy.batch.output_folder import OutputFolder
from fmrl_dist.deploy.recommender import Recommender
from tests.fixtures.commands import Ended, run_main
from tests.fixtures.exports import random_export, random_model, write_random_export
from tests.fixtures.processes import REPOSITORY, clean_environment, launch
from tests.fixtures.training import contents

NUM_ITEMS, NUM_USERS = 300, 1000
COMMAND = "fmrl_dist.recommend"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_export(tmp_path_factory.mktemp("export") / "export", random_export(num_items=NUM_ITEMS))


def make_users(num_users: int = NUM_USERS, seed: int = 0) -> list[dict[str, Any]]:
    """Users with histories of 0 to 12 items; some users stand there twice."""
    draw = np.random.default_rng(seed)
    return [
        {
            "user": f"u{int(draw.integers(num_users))}",
            "history": [f"i{item}" for item in draw.integers(NUM_ITEMS, size=draw.integers(13))],
        }
        for _ in range(num_users)
    ]


def write_lines(path: Path, users: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(user) + "\n" for user in users))
    return path


def write_tables(folder: Path, users: list[dict[str, Any]], ends: tuple[int, ...] = (130, 131)) -> Path:
    """A folder of Parquet, with row groups of 97 rows."""
    folder.mkdir()
    for number, (first, end) in enumerate(zip((0, *ends), (*ends, len(users)), strict=True)):
        table = {"user_id": [u["user"] for u in users[first:end]], "item_ids": [u["history"] for u in users[first:end]]}
        pq.write_table(pa.table(table), folder / f"part.{number}.parquet", row_group_size=97)
    return folder


@pytest.fixture(scope="module")
def users() -> list[dict[str, Any]]:
    return make_users()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, users: list[dict[str, Any]]) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines") / "users.jsonl", users)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, users: list[dict[str, Any]]) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables") / "users", users)


def run(*words: object) -> Ended:
    """The command, which must succeed."""
    ended = run_main(COMMAND, *words)
    assert ended.code == 0, ended.stderr
    return ended


def refused(*words: object) -> str:
    """The one line that the command ends with."""
    ended = run_main(COMMAND, *words)
    assert ended.code == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended
    return ended.stderr.removeprefix("error: ").rstrip()


def read_lists(output: Path) -> list[tuple[Any, list[Any], np.ndarray]]:
    """User, items and scores of all users, of a folder of Parquet or of JSON Lines, or of a file of these."""
    if output.is_dir() and any(output.glob("*.parquet")):
        records = [row for path in sorted(output.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    else:
        files = sorted(output.glob("part-*.jsonl")) if output.is_dir() else [output]
        records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return [(row["user"], row["item_ids"], np.array(row["scores"], np.float32)) for row in records]


def expected_lists(
    export: Path, users: list[dict[str, Any]], **options: Any
) -> list[tuple[Any, list[Any], np.ndarray]]:
    recommender = Recommender.from_pretrained(export, options.pop("size", None))
    found = recommender.recommend([user["history"] for user in users], **options)
    return [
        (user["user"], [i.item_id for i in items], np.array([i.score for i in items], np.float32))
        for user, items in zip(users, found, strict=True)
    ]


def assert_same(
    found: list[tuple[Any, list[Any], np.ndarray]], expected: list[tuple[Any, list[Any], np.ndarray]]
) -> None:
    """Scores may differ in the last digit: batches have other shapes."""
    assert len(found) == len(expected)
    for (user, items, scores), (wanted_user, wanted_items, wanted_scores) in zip(found, expected, strict=True):
        assert user == wanted_user
        np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5, atol=1e-5)
        if len(scores) < 2 or np.diff(scores).max() < -1e-4:
            assert items == wanted_items


@pytest.mark.parametrize("form", ["lines", "tables"])
@pytest.mark.parametrize("output", ["lists", "lists.jsonl"])
def test_lists_are_the_recommenders(
    form: str, output: str, export: Path, lines: Path, tables: Path, users: list[dict[str, Any]], tmp_path: Path
) -> None:
    """From and to each format; the last part is a short one. Users stay in order, also those who stand there twice."""
    histories = {"lines": lines, "tables": tables}[form]
    words = ("--size", 8, "-k", 7, "--part-users", 300, "--threads", 2)
    ended = run(export, "--histories", histories, "--output", tmp_path / output, *words)
    assert "finished: " in ended.stdout and "1,000 users, " in ended.stdout
    assert_same(read_lists(tmp_path / output), expected_lists(export, users, size=8, k=7))


def test_formats_hold_the_same(export: Path, lines: Path, tables: Path, tmp_path: Path) -> None:
    """To the last digit, with titles; a folder of JSON Lines is what is joined to a file; stdout is it, too."""
    words = ("--part-users", 300, "--titles", "--threads", 1)
    run(export, "--histories", lines, "--output", tmp_path / "parquet", *words)
    run(export, "--histories", tables, "--output", tmp_path / "jsonl", "--format", "jsonl", *words)
    run(export, "--histories", tables, "--output", tmp_path / "one.jsonl", *words)
    table = pq.read_table(tmp_path / "parquet")  # leaves out what begins with _
    parts = b"".join(path.read_bytes() for path in sorted((tmp_path / "jsonl").glob("part-*.jsonl")))
    assert (tmp_path / "one.jsonl").read_bytes() == parts
    records = [json.loads(line) for line in parts.splitlines()]
    assert [{**r, "scores": np.float32(r["scores"]).tolist()} for r in records] == table.to_pylist()
    assert records[0]["titles"] == [f"title of {item}" for item in records[0]["item_ids"]]
    assert table.schema.field("scores").type == pa.list_(pa.float32())


def test_the_bytes_depend_on_no_number_of_processes(export: Path, tables: Path, lines: Path, tmp_path: Path) -> None:
    """One process, two of a launcher, shares as those of an array, threads, and row groups are all the same."""
    words: list[str | Path] = [export, "--histories", tables, "--part-users", "150"]
    alone = run(*words, "--output", tmp_path / "one", "--threads", 1)
    run(*words, "--output", tmp_path / "threads", "--threads", 3)
    for part in ("2/3", "1/3", "3/3"):
        ended = run(*words, "--output", tmp_path / "array", "--part", part, "--resume", "auto")
        assert ("finished: " in ended.stdout) == (part == "3/3")
    result = launch(2, ["-m", COMMAND, *words, "--output", tmp_path / "two"])
    assert result.returncode == 0 and "finished: " in result.stdout, result.stderr
    (told,) = (line for line in alone.stdout.splitlines() if "of them without history" in line)
    assert told.startswith("1,000 users, "), told
    assert f"\n{told}\n" in result.stdout, "of all users, also of those that the second process has answered"
    one = contents(tmp_path / "one")
    assert len(one) == 9 and {"_recommend.json", "_SUCCESS", "part-00006.parquet"} <= one.keys()
    for name in ("threads", "array", "two"):
        assert contents(tmp_path / name) == one, name
    run(export, "--histories", lines, "--part-users", 150, "--output", tmp_path / "lines")
    for path in (tmp_path / "lines").glob("part-*"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "one" / path.name))


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", COMMAND, *map(str, words)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), text=True, **options)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, users: list[dict[str, Any]]) -> Path:
    return write_lines(tmp_path_factory.mktemp("many") / "users.jsonl", users * 20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_goes_on(number: signal.Signals, export: Path, many: Path, tmp_path: Path) -> None:
    """Its parts are complete or absent; the resumed output has the bytes of an undisturbed one."""
    words = (export, "--histories", many, "-k", 50, "--part-users", 200)
    output = tmp_path / "killed"
    process = start(*words, "--output", output, "--threads", 1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (output / "part-00003.parquet").exists(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], errors
    names = {path.name for path in output.iterdir()}
    if number == signal.SIGTERM:
        assert errors == "ended by SIGTERM\n"
        assert not [name for name in names if name.startswith(".")]
    num_parts = len([name for name in names if name.startswith("part-")])
    assert 4 <= num_parts < 100 and "_SUCCESS" not in names
    written = (output / "part-00000.parquet").stat()
    assert "exists; go on with it (--resume auto)" in refused(*words, "--output", output)
    ended = run(*words, "--output", output, "--resume", "auto")
    assert f"{20_000 - 200 * num_parts:,} users" in ended.stdout
    assert (output / "part-00000.parquet").stat().st_mtime_ns == written.st_mtime_ns
    if number == signal.SIGKILL:
        run(*words, "--output", tmp_path / "undisturbed")
        assert contents(output) == contents(tmp_path / "undisturbed")


def test_a_finished_job_ends_at_once(export: Path, lines: Path, tmp_path: Path) -> None:
    for name in ("lists", "lists.jsonl"):
        words = (export, "--histories", lines, "--output", tmp_path / name)
        run(*words)
        before = contents(tmp_path)
        ended = run(*words, "--resume", "auto")
        assert ended.stdout == f"finished: {tmp_path / name}\n"
        assert contents(tmp_path) == before
        run(*words, "--overwrite", "-k", 3)
        assert {len(items) for _, items, _ in read_lists(tmp_path / name)} == {3}


def test_parts_of_another_job_are_refused(export: Path, users: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of other options, export, or input, even of one that has the same size; a touched file is the same input."""
    lines = write_lines(tmp_path / "users.jsonl", users)
    allowed = tmp_path / "allow.txt"
    allowed.write_text("i1\ni2\n")
    words = (export, "--histories", lines, "--output", tmp_path / "lists", "--resume", "auto")
    run(*words)
    other = write_random_export(tmp_path / "other", random_export(num_items=NUM_ITEMS + 1))
    changes: dict[tuple[object, ...], str] = {
        ("-k", 5): "k was 10, and is 5",
        ("--size", 8): "size was 16, and is 8",
        ("--include-seen",): "include_seen was False, and is True",
        ("--allow", allowed): "allow_sha256 was None",
        ("--part-users", 100): "part_users was 65536, and is 100",
        ("--format", "jsonl"): "format was 'parquet', and is 'jsonl'",
    }
    for option, key in changes.items():
        assert key in refused(*words, *option)
    assert "export_sha256 was" in refused(other, *words[1:])
    os.utime(lines, ns=(1, 1))
    run(*words)
    write_lines(lines, [*users[:-1], {**users[-1], "user": users[-1]["user"][::-1]}])
    assert "the input has changed" in refused(*words)
    (tmp_path / "lists" / "mine.txt").touch()
    assert "holds mine.txt, which this command does not write" in refused(*words[:-2], "--overwrite")


def test_a_damaged_part_is_refused(export: Path, lines: Path, tmp_path: Path) -> None:
    words = (export, "--histories", lines, "--output", tmp_path / "lists", "--part-users", 400)
    run(*words)
    whole = contents(tmp_path / "lists")
    first, second = (tmp_path / "lists" / f"part-0000{part}.parquet" for part in (0, 1))
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    assert f"{first} is damaged" in refused(*words, "--resume", "auto")
    run(export, "--histories", lines, "--output", tmp_path / "others", "--part-users", 400, "-k", 3)
    first.write_bytes((tmp_path / "others" / first.name).read_bytes())
    assert f"{first} holds 400 users of another job" in refused(*words, "--resume", "auto")
    first.unlink()
    second.unlink()
    run(*words, "--resume", "auto")
    assert contents(tmp_path / "lists") == whole


def test_the_mark_goes_before_a_missing_part_is_written(
    export: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may read a folder as finished while it lacks a part, also if its writer is killed."""

    def killed(self: OutputFolder, part: int, identity: str) -> NoReturn:
        raise UserError("killed")

    words = (export, "--histories", lines, "--output", tmp_path / "lists", "--part-users", 400)
    run(*words)
    (tmp_path / "lists" / "part-00001.parquet").unlink()
    for option in (("--resume", "auto"), ("--overwrite",)):
        assert (tmp_path / "lists" / "_SUCCESS").exists()
        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "part", killed)
            assert refused(*words, *option) == "killed"
        assert not (tmp_path / "lists" / "_SUCCESS").exists()
        run(*words, "--resume", "auto")


LIMITED = """
import sys, threadpoolctl
from fmrl_dist import recommend
recommend.main(sys.argv[1:])
print([pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"])
"""


def test_the_bytes_depend_on_no_number_of_blas_threads(tmp_path: Path, users: list[dict[str, Any]]) -> None:
    """--threads are all that compute, whatever the environment says of NumPy's."""
    model = random_model((32, 64, 128), seed=3)
    export = write_random_export(tmp_path / "export", random_export(model, num_items=NUM_ITEMS))
    histories = write_lines(tmp_path / "users.jsonl", users)
    outputs = []
    for threads in ("1", "3"):
        words = [export, "--histories", histories, "--output", tmp_path / threads, "--threads", 1, "--part-users", 333]
        environment = clean_environment() | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        ended = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, words)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        pools = ended.stdout.splitlines()[-1]
        assert pools != "[]" and set(ast.literal_eval(pools)) == {1}
        outputs.append(contents(tmp_path / threads))
    assert outputs[0] == outputs[1]


BAD_LINES = {
    "{": "is not JSON",
    "": "is not JSON",
    "[1]": "holds a list; expected an object",
    '{"user": 1}': "has no 'history'",
    '{"user": "a", "history": ["i1"], "history": []}': "is not JSON (key 'history' is there twice)",
    '{"user": null, "history": []}': "holds user None; expected text",
    r'{"user": "\ud83d", "history": []}': r"holds user '\ud83d', half of a surrogate pair, which is no text",
    '{"user": 7, "history": []}': "holds user 7, and line 1 of the input text; expected one kind",
    '{"user": "a", "history": "i1"}': "holds history 'i1'; expected a list of item ids",
    '{"user": "a", "history": ["i1", 1.0]}': "holds history ['i1', 1.0]; expected a list of item ids",
    '{"user": "a", "history": ["i1", true]}': "holds history ['i1', True]; expected a list of item ids",
    '{"user": "a", "history": ["i1", "nope"]}': "holds item 'nope', which the export does not have",
    '{"user": "a", "history": [17]}': "holds item 17, which the export does not have",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line: str, export: Path, users: list[dict[str, Any]], tmp_path: Path) -> None:
    """With its file and number; parts before it are there, that of it is not."""
    good = [json.dumps(user) for user in users[:20]]
    path = tmp_path / "users.jsonl"
    path.write_text("\n".join([*good[:13], line, *good[13:]]) + "\n")
    words = (export, "--histories", path, "--output", tmp_path / "lists", "--part-users", 5, "--threads", 1)
    message = refused(*words)
    assert message.startswith(f"{path}, line 14") and BAD_LINES[line] in message
    names = {name for name in os.listdir(tmp_path / "lists")}
    assert names == {"_recommend.json", "part-00000.parquet", "part-00001.parquet"}


def test_a_bad_row_is_named(export: Path, tmp_path: Path) -> None:
    def refusal(user_id: list[Any], item_ids: list[Any], *words: object) -> str:
        pq.write_table(
            pa.table({"user_id": user_id, "item_ids": item_ids}), tmp_path / "users.parquet", row_group_size=2
        )
        return refused(export, "--histories", tmp_path / "users.parquet", "--output", tmp_path / "lists", *words)

    path = tmp_path / "users.parquet"
    users, good = [1, 2, 3, 4], [["i1"], [], ["i2"], ["i3"]]
    assert f"{path}, row 3 holds item 'nope', which" in refusal(users, [*good[:2], ["i1", "nope"], ["i2"]])
    assert f"{path}, row 4 has a null among its 'item_ids'" in refusal(users, [*good[:3], ["i1", None]], "--overwrite")
    assert f"{path}, row 2 has no value in column 'item_ids'" in refusal(
        users, [["i1"], None, *good[2:]], "--overwrite"
    )
    assert f"{path}, row 1 has no value in column 'user_id'" in refusal([None, 2, 3, 4], good, "--overwrite")
    assert "is of type int64; expected lists" in refusal(users, users, "--overwrite")
    assert "holds item 1, which the export does not have" in refusal(users, [[1], [], [2], [3]], "--overwrite")
    assert "holds ids of type double" in refusal([1.0, 2.0, 3.0, 4.0], good, "--overwrite")
    assert "has no column 'who', or several; it has: user_id, item_ids" in refusal(
        users, good, "--user", "who", "--overwrite"
    )
    large = pa.array([2**63] * 4, pa.uint64())
    assert f"{path}, row 1 or below: column 'user_id' holds ids that do not fit int64" in refusal(
        large, good, "--overwrite"
    )
    shutil.rmtree(tmp_path / "lists")
    assert f"column 'item_ids' of {path} holds ids of type double" in refusal(users, [[1.0], [], [2.0], [3.0]])
    assert not (tmp_path / "lists").exists()
    path.write_bytes(b"PAR1 no")
    assert f"table {path} cannot be read" in refused(export, "--histories", path)


@pytest.mark.parametrize("text_ids", [False, True])
def test_histories_that_are_all_empty_have_no_type(text_ids: bool, tmp_path: Path) -> None:
    ids: list[int | str] = [f"i{row}" if text_ids else row for row in range(20)]
    export = write_random_export(tmp_path / "export", random_export(num_items=20), ids)
    table = pa.table({"user_id": [1, 2], "item_ids": pa.array([[], []], pa.list_(pa.null()))})
    pq.write_table(table, tmp_path / "users.parquet")
    ended = run(export, "--histories", tmp_path / "users.parquet", "--output", tmp_path / "lists")
    assert "2 users, 2 of them without history" in ended.stdout


def test_more_items_than_there_are(export: Path, lines: Path, users: list[dict[str, Any]], tmp_path: Path) -> None:
    """Lists have all of them; rows of k numbers for each user would not fit into memory."""
    recommender = Recommender.from_pretrained(export)
    assert len(recommender.recommend([[]], k=10**14)[0]) == NUM_ITEMS
    assert len(recommender.session([]).recommend(k=10**14)) == NUM_ITEMS
    run(export, "--histories", lines, "--output", tmp_path / "lists", "-k", 10**14)
    lengths = [len(items) for _, items, _ in read_lists(tmp_path / "lists")]
    assert lengths == [NUM_ITEMS - len(set(user["history"])) for user in users]


def test_unknown_items_may_be_skipped(export: Path, tmp_path: Path) -> None:
    """And are told; the rest of the history answers, an empty one too. Ids of users may be integers."""
    users: list[dict[str, Any]] = [
        {"user": 1, "history": ["i1", "nope", 5]},
        {"user": 2, "history": ["no", "i3"]},
        {"user": 3, "history": ["x"]},
    ]
    known = [{"user": 1, "history": ["i1"]}, {"user": 2, "history": ["i3"]}, {"user": 3, "history": []}]
    lines = write_lines(tmp_path / "users.jsonl", users)
    texts = [{**user, "history": [str(item) for item in user["history"]]} for user in users]
    tables = write_tables(tmp_path / "tables", texts, ())
    for histories, output in ((lines, "a"), (tables, "b")):
        ended = run(export, "--histories", histories, "--output", tmp_path / output, "--unknown", "skip")
        assert "3 users, 1 of them without history (answered by start position), 4 unknown ids left out" in ended.stdout
        assert_same(read_lists(tmp_path / output), expected_lists(export, known))


def test_allowed_and_denied_items(export: Path, lines: Path, users: list[dict[str, Any]], tmp_path: Path) -> None:
    allowed = [f"i{item}" for item in range(0, NUM_ITEMS, 25)]
    (tmp_path / "allow").write_text("\n".join([*allowed, "nope"]))
    (tmp_path / "deny").write_text("\ufeffi25\r\ni50\r\n", "utf-8")
    marked = tmp_path / "marked.jsonl"  # as some editors save it
    marked.write_text("\ufeff" + lines.read_text("utf-8"), "utf-8")
    words = (export, "--histories", marked, "--output", tmp_path / "lists", "--allow", tmp_path / "allow")
    assert f"{tmp_path / 'allow'} holds 1 ids of no item, such as ['nope']" in refused(*words)
    run(*words, "--deny", tmp_path / "deny", "--include-seen", "--unknown", "skip")
    found = read_lists(tmp_path / "lists")
    assert_same(found, expected_lists(export, users, allow=allowed, deny=["i25", "i50"], exclude_seen=False))
    assert {len(items) for _, items, _ in found} == {10}


def test_standard_input_and_output(
    export: Path, lines: Path, users: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (export, "--histories", "-", "--threads", 1)
    with lines.open("rb") as file:
        process = start(*words, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors.startswith("1,000 users, "), errors
    (tmp_path / "out.jsonl").write_text(out)
    assert_same(read_lists(tmp_path / "out.jsonl"), expected_lists(export, users))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
    run(*words, "--output", tmp_path / "lists", "--part-users", 300)
    assert (tmp_path / "lists" / "_SUCCESS").exists()
    assert_same(read_lists(tmp_path / "lists"), expected_lists(export, users))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "standard input holds no users" in refused(*words)
    assert "standard input is read once" in refused(*words, "--output", tmp_path / "x", "--resume", "auto")


def test_memory_does_not_grow(export: Path, tmp_path: Path) -> None:
    """Of ten times as many users: a few MB more at most."""
    peaks = []
    for count in (2, 20):
        tables = write_tables(tmp_path / f"{count}", make_users(1000) * count, ())
        output = tmp_path / f"lists-{count}"
        process = start(export, "--histories", tables, "--output", output, "--part-users", 2000, "--threads", 1)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)  # KiB
    assert peaks[1] - peaks[0] < 8 * 1024, peaks


def test_lists_by_the_funnel(tmp_path: Path, users: list[dict[str, Any]]) -> None:
    """Whoever measures its margins measures the same: shares of different processes are parts of one output."""
    export = write_random_export(tmp_path / "export", random_export(num_items=5000))
    histories = write_lines(tmp_path / "users.jsonl", users)
    words = (export, "--histories", histories, "--retrieval", "funnel", "--recall", 0.9, "--part-users", 200)
    run(*words, "--output", tmp_path / "one")
    for part in ("1/2", "2/2"):
        run(*words, "--output", tmp_path / "array", "--part", part, "--resume", "auto", "--threads", 1)
    assert contents(tmp_path / "array") == contents(tmp_path / "one")
    expected = expected_lists(export, users)
    found = [
        len({*items} & {*wanted})
        for (_, items, _), (_, wanted, _) in zip(read_lists(tmp_path / "one"), expected, strict=True)
    ]
    assert np.mean(found) >= 8.5
    message = refused(*words, "--output", tmp_path / "one", "--resume", "auto", "--recall", 0.8)
    assert "are of another job: recall" in message or "are of another job: retrieval" in message


def test_one_history_in_words(export: Path) -> None:
    recommender = Recommender.from_pretrained(export, size=8)
    (expected,) = recommender.recommend([["i7", "i8"]], k=3)
    found = run(export, "i7", "--size", 8, "i8", "-k", 3).stdout.splitlines()
    assert found[0] == "size 8, 300 items; after title of i7, title of i8"
    assert [line.split() for line in found[1:]] == [
        [str(place), f"{item.score:.4f}", item.item_id, *str(item.title).split()]
        for place, item in enumerate(expected, 1)
    ]
    (expected,) = recommender.recommend([[]], k=1)
    found = run(export, "-k", 1, "--size", 8).stdout.splitlines()
    assert found[0].endswith("for a new user, by start position") and str(expected[0].item_id) in found[1]
    assert refused(export, "i7", "nope").startswith("'nope': no such item; ids are like 'i0'")
    assert "(1 unknown left out)" in run(export, "i7", "nope", "--unknown", "skip").stdout


def test_mistakes(export: Path, lines: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "lists")
    cases: dict[tuple[object, ...], str] = {
        (): "required: export",
        (tmp_path / "nothing",): "is neither a folder nor the id of a repository",
        (export, "--size", 7): "size 7 is not one of this export",
        (export, "i1", "--histories", lines): "not both",
        (export, "i1", *output): "--output is for --histories",
        (export, "--histories", lines, "--resume", "auto"): "--resume is for --output",
        (export, "--histories", tmp_path / "x.jsonl"): "check the path after --histories",
        (export, "--histories", __file__): "ends in '.py'; expected .parquet or .jsonl",
        (
            export,
            "--histories",
            lines,
            "--titles",
            "--output",
            tmp_path / "x.parquet",
        ): "Parquet is written as a folder",
        (export, "--histories", lines, "--output", tmp_path / "x.jsonl", "--part", "1/2"): "would not be joined",
        (export, "--histories", lines, *output, "--part", "1/2", "--overwrite"): "remove it beforehand",
        (export, "-k", 0): "-k is 0",
        (export, "--recall", 0.9): "--recall is 0.9, and --retrieval exact finds all",
        (export, "--histories", lines, *output, "--deny", tmp_path / "no"): "is no file; expected ids",
    }
    for words, message in cases.items():
        assert message in refused(*words), words
    assert not os.listdir(tmp_path)
