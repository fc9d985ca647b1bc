"""How a command ends: real processes that write to a real pipe whose reader leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from fmrl_dist.base.errors import EXIT_NO_READER, EXIT_USER_ERROR
from tests.fixtures.processes import REPOSITORY, clean_environment
from tests.fixtures.training import make_shop, train_here

# Prints a line, waits for a line on stdin, and runs {then}.
PROGRAM = """
import os, sys
from fmrl_dist.base.errors import UserError, run_command

def main(argv):
    print("first", flush=True)
    sys.stdin.readline()
    {then}

run_command(main)
"""
PRINT = "print('second')"
BREAK_ANOTHER_PIPE = "r, w = os.pipe(); os.close(r); os.write(w, b'x')"
BUFFERINGS = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


def run(then: str, unbuffered: str, leave: bool) -> tuple[int, str]:
    """Exit status and stderr of the program; its reader takes one line and then leaves, or reads to the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        cwd=REPOSITORY,
        env=clean_environment() | {"PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == "first\n"
    if leave:
        process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    rest = "" if leave else process.stdout.read()
    complaint = process.stderr.read()
    process.stderr.close()
    process.stdout.close()
    assert rest == ("second\n" if PRINT in then and not leave else "")
    return process.wait(timeout=60), complaint


@BUFFERINGS
@pytest.mark.parametrize(("then", "status"), [(PRINT, 0), (f"{PRINT}; sys.exit(3)", 3), (f"{PRINT}; sys.exit()", 0)])
def test_a_command_whose_reader_leaves_ends_silently(then: str, status: int, unbuffered: str) -> None:
    assert run(then, unbuffered, leave=False) == (status, "")
    assert run(then, unbuffered, leave=True) == (EXIT_NO_READER, "")


@BUFFERINGS
def test_a_user_error_is_one_line_whoever_reads(unbuffered: str) -> None:
    for leave in (False, True):
        assert run("raise UserError('mend it')", unbuffered, leave) == (EXIT_USER_ERROR, "error: mend it\n")


@BUFFERINGS
@pytest.mark.parametrize(
    ("then", "error"), [(BREAK_ANOTHER_PIPE, "BrokenPipeError"), ("raise RuntimeError('ours')", "RuntimeError: ours")]
)
def test_a_crash_keeps_its_traceback(then: str, error: str, unbuffered: str) -> None:
    status, complaint = run(then, unbuffered, leave=False)
    assert status == 1 and complaint.startswith("Traceback") and error in complaint


FILLS_A_FOLDER = """
    from pathlib import Path
    from fmrl_dist.base.files import replaced_folder
    with replaced_folder(Path(os.environ["TARGET"])) as folder:
        print("second", flush=True); sys.stdin.readline()
"""


def started(then: str, variables: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """A program that has said "first" and "second", and now does the rest of ``then``."""
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        cwd=REPOSITORY,
        env=clean_environment() | (variables or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdin and process.stdout
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == ["first\n", "second\n"]
    return process


def signalled(number: signal.Signals, inherited: str, target: Path) -> tuple[int, str]:
    """Exit status and stderr of a program that gets a signal while it fills a folder, and then may go on."""
    process = started(
        FILLS_A_FOLDER,
        {"TARGET": str(target)},
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN if inherited == "ignored" else signal.SIG_DFL),
    )
    assert process.stdin
    assert list(target.parent.iterdir()), "a folder is being filled, and its lock is held"
    process.send_signal(number)
    if number == signal.SIGHUP and inherited == "ignored":
        time.sleep(0.2)  # in which it would end
        process.stdin.write("go on\n")
    _, complaint = process.communicate(timeout=60)
    return process.returncode, complaint


@pytest.mark.parametrize(
    ("name", "inherited"),
    [
        ("SIGINT", "default"),
        ("SIGTERM", "default"),
        ("SIGHUP", "default"),
        ("SIGINT", "ignored"),
        ("SIGTERM", "ignored"),
    ],
)
def test_a_signal_ends_a_command_with_one_line_and_cleaned_up(name: str, inherited: str, tmp_path: Path) -> None:
    """Also where a background shell has it ignored, as ``make test &`` does with INT."""
    number = signal.Signals[name]
    assert signalled(number, inherited, tmp_path / "target") == (128 + number, f"ended by {name}\n")
    assert list(tmp_path.iterdir()) == []


def test_hup_does_not_end_what_nohup_has_started(tmp_path: Path) -> None:
    assert signalled(signal.SIGHUP, "ignored", tmp_path / "target") == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_nohup_covers_the_seconds_of_importing(tmp_path: Path) -> None:
    command = ["nohup", sys.executable, "-m", "shards.verify", str(tmp_path / "none")]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not is_caught(process.pid, signal.SIGTERM):
        pass
    process.send_signal(signal.SIGHUP)
    assert "error: store" in process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_USER_ERROR


def test_what_cannot_be_read_is_one_line_that_says_so() -> None:
    """For another user than the one who runs the tests, perhaps root, who may read anything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for path, closed in ((folder / "file", folder / "file"), (folder / "in" / "file", folder / "in")):
            path.parent.mkdir(exist_ok=True)
            path.touch()
            closed.chmod(0)
            drop = "os.setuid(65534) if os.getuid() == 0 else None"
            status, complaint = run(f"{drop}; open('{path}').read()", "", leave=False)
            assert status == EXIT_USER_ERROR
            assert complaint == (
                f"error: Permission denied ({path}); {closed} cannot be read by this user: ask for the right to, or "
                "choose another, then run this again\n"
            )
            closed.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        ("EROFS", "choose a place"),
        ("EACCES", "choose a place"),
        ("ENOSPC", "free space"),
        ("EIO", "check the disk"),
        ("ENAMETOOLONG", "choose a shorter path"),
        ("EISDIR", "move this folder away"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(code: str, mend: str) -> None:
    then = f"import errno; raise OSError(errno.{code}, os.strerror(errno.{code}), '/here/it')"
    status, complaint = run(then, "", leave=False)
    assert status == EXIT_USER_ERROR
    assert complaint.startswith("error: ") and f"(/here/it); {mend}" in complaint and complaint.count("\n") == 1


CLEANS_UP = """
    try:
        print("second", flush=True); sys.stdin.readline()
    finally:
        print("cleaning up", flush=True); sys.stdin.readline(); print("cleaned up"){then}
"""


@pytest.mark.parametrize("then", ["", "; raise RuntimeError('of a library that cleans up')"], ids=["", "fails"])
def test_signals_do_not_interrupt_cleaning_up(then: str) -> None:
    """A launcher passes on what the terminal has already sent; one line tells of the first."""
    process = started(CLEANS_UP.format(then=then))
    assert process.stdout
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "cleaning up\n"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    output, complaint = process.communicate("go on\n", timeout=60)
    assert (process.returncode, output, complaint) == (128 + signal.SIGHUP, "cleaned up\n", "ended by SIGHUP\n")


FORKS = """
    if os.fork() == 0:
        print("second", flush=True)
    import time
    time.sleep(60)
"""


def test_a_forked_worker_leaves_the_line_to_its_parent() -> None:
    """A terminal that is closed tells the whole group."""
    process = started(FORKS, start_new_session=True)
    os.killpg(process.pid, signal.SIGHUP)
    output, complaint = process.communicate(timeout=60)
    assert (process.returncode, output, complaint) == (128 + signal.SIGHUP, "", "ended by SIGHUP\n")


LOSES_SIGNALS = """
    class Closing:
        def __del__(self):
            print("second", flush=True); time.sleep(60)
    import time
    Closing()
    print("goes on", flush=True); time.sleep(60)
"""


def test_a_signal_is_not_lost_where_exceptions_are() -> None:
    """Python ignores what is raised in ``__del__``, such as that of a DataLoader, and would tell of it at length."""
    process = started(LOSES_SIGNALS)
    process.send_signal(signal.SIGTERM)
    output, complaint = process.communicate(timeout=60)
    assert (process.returncode, output, complaint) == (128 + signal.SIGTERM, "goes on\n", "ended by SIGTERM\n")


@pytest.mark.parametrize("module", ["fmrl_dist.evaluate", "shards.build", "launch.sweep"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_amid_imports_is_one_line(name: str, module: str) -> None:
    number = signal.Signals[name]
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=REPOSITORY,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a shell does for a command in the background; what it means by an ignored HUP is nohup's promise.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL if name == "SIGHUP" else signal.SIG_IGN),
    )
    while process.poll() is None and not is_caught(process.pid, signal.SIGHUP):
        pass
    process.send_signal(number)
    output, complaint = process.communicate(timeout=60)
    assert (process.returncode, output, complaint) == (128 + number, "", f"ended by {name}\n")


def is_caught(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(mask >> (number - 1) & 1)


def test_importing_the_packages_changes_no_handler() -> None:
    program = (
        "import signal; before = list(map(signal.getsignal, (1, 2, 15)))\n"
        "import fmrl_dist, launch, shards; assert list(map(signal.getsignal, (1, 2, 15))) == before"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=clean_environment(), check=True)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """Some libraries end the process where there is no current folder; others resolve paths against another."""
    gone = tmp_path / "gone"
    gone.mkdir()
    ended = subprocess.run(
        ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "bash", sys.executable, "-m", "fmrl_dist.evaluate", "--help"],
        cwd=gone,
        env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    line = "error: the current folder has been removed; change to one that exists\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_USER_ERROR, "", line)


def test_a_message_is_one_line_whatever_it_names() -> None:
    then = r"raise UserError('a\nb\x1b[31m \udc80 \u202e é')"
    assert run(then, "", leave=False) == (EXIT_USER_ERROR, "error: a\\nb\\x1b[31m \\udc80 \\u202e é\n")


def test_evaluate_into_a_closed_pipe(tmp_path: Path) -> None:
    run_folder = train_here(make_shop(tmp_path), tmp_path / "run", "--train.max_steps", 1)
    (run_folder / "evaluation.json").unlink()
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "fmrl_dist.evaluate", "--checkpoint", str(run_folder), "--threads", "1"]
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        ended = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=write_end, stderr=subprocess.PIPE)
    finally:
        os.close(write_end)
    assert (ended.returncode, ended.stderr) == (EXIT_NO_READER, b"")
    assert (run_folder / "evaluation.json").exists()
