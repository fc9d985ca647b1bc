"""One table of all commands: a new command is one more row, and every fuzzer covers it.

A command runs in a folder of its own, which holds those parts of :func:`tests.fuzz.world.make_world` that it needs. Its
result is whatever must be equal wherever and whenever the same command succeeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmrl_dist.base.files import file_sha256
from fmrl_dist.checkpoint.folder import TENSOR_FILES
from fmrl_dist.checkpoint.run_folder import FINISHED_FILE, REPORT_FILE
from shards.store.build_report import BUILD_REPORT_FILE
from tests.fixtures.training import evaluation, figures
from tests.fuzz.seeds import IS_LARGE

SIZE = 4  # that is exported
PARTIAL_STEPS = 8  # of the run that is to be resumed; one of three epochs

Result = Callable[[Path, str], Any]


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Args:
        name: for the tests' ids.
        module: after ``python -m``.
        words: its arguments; FOLDER stands for the case's folder.
        needs: parts of the world.
        result: from the folder and the output.
        writes: what it creates or changes in the folder.
        again: further arguments of the same command where an earlier one was interrupted.
        starts_processes: it runs other commands, with interpreters of their own: a case takes seconds.
    """

    name: str
    module: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    result: Result
    writes: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    starts_processes: bool = False

    def argv(self, folder: Path) -> list[str]:
        return [word.replace("FOLDER", str(folder)) for word in self.words]


def output(folder: Path, stdout: str) -> str:
    """What a command prints, without its folder, durations and progress."""
    lines = [line for line in stdout.replace(str(folder), "FOLDER").splitlines() if " elapsed, " not in line]
    return re.sub(r"in [0-9.]+ s", "in S s", "\n".join(lines))


def files_of(name: str) -> Result:
    """Hashes of all files of a subfolder, but for a build report: it has times."""
    return lambda folder, stdout: {
        path.name: file_sha256(path) for path in sorted((folder / name).iterdir()) if path.name != BUILD_REPORT_FILE
    }


def tables(folder: Path, stdout: str) -> dict[str, str]:
    """Hashes of the demo's tables."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted((folder / "demo").rglob("*.parquet"))}


def run_files(folder: Path, stdout: str) -> dict[str, Any]:
    """Weights and optimiser of a finished run's newest and best checkpoint, its figures, and its evaluation."""
    run = folder / "run"
    assert (run / FINISHED_FILE).exists()
    tensors = {
        f"{link} {name}": file_sha256(run / "checkpoints" / link / f"{name}.safetensors")
        for link in ("latest", "best")
        for name in TENSOR_FILES
    }
    after = [line for line in figures(run) if line["step"] > PARTIAL_STEPS]
    return {"tensors": tensors, "figures": after, "evaluation": evaluation(run)}


def evaluation_of(run: str, name: str) -> Result:
    """An evaluation's figures, without where its store is."""
    return lambda folder, stdout: evaluation(folder / run, name) | {"run": None}


def parts_of(folder: Path, stdout: str) -> dict[str, Any]:
    """The histograms of an evaluation's parts."""
    return {path.name: file_sha256(path) for path in sorted((folder / "run").glob("*.parts/*"))}


def export_files(folder: Path, stdout: str) -> dict[str, Any]:
    """An export, without where its store is."""
    files = files_of("out")(folder, stdout)
    del files["config.json"]
    config = json.loads((folder / "out" / "config.json").read_text())
    del config["origin"]["store"], config["sha256"]
    return {"files": files, "config": config}


def page_of_run(folder: Path, stdout: str) -> str:
    """A report, without its folder and dates."""
    page = (folder / "run" / REPORT_FILE).read_text().replace(str(folder), "FOLDER")
    return re.sub(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{5} UTC", "DATE", page)


def sweep_values(folder: Path, stdout: str) -> list[Any]:
    """The value of each trial."""
    from tests.fixtures.sweeps import trials_of  # needs an extra

    return [(trial.number, trial.state, trial.value) for trial in trials_of(folder / "sweep")]


CONFIG = (
    *("--config", "FOLDER/shop.yaml", "--data.root", "FOLDER/raw"),
    *("--store.path", "FOLDER/store", "--run.dir", "FOLDER/run"),
)
STORE = ("--store", "FOLDER/store")
ARRAYS = (
    *("--items", "FOLDER/raw/items.parquet"),
    *("--feature", "vector=FOLDER/raw/vector.npy", "--feature", "colour=FOLDER/raw/colour.npy"),
)

COMMANDS = [
    Command("build", "shards.build", CONFIG, ("raw",), files_of("store"), ("store",)),
    Command(
        "build --overwrite", "shards.build", (*CONFIG, "--overwrite"), ("raw", "store"), files_of("store"), ("store",)
    ),
    Command("build --keep", "shards.build", (*CONFIG, "--keep"), ("raw", "store"), output),
    Command("verify", "shards.verify", ("FOLDER/store",), ("store",), output),
    Command("inspect", "shards.inspect", ("FOLDER/store",), ("store",), output),
    Command(
        "demo",
        "shards.demo.__main__",
        ("--out", "FOLDER", "--users", "20", "--items", "15"),
        (),
        tables,
        ("demo",),
    ),
    Command("plan", "fmrl_dist.plan", (*CONFIG, "--items", "1000", "--cpus", "1"), ("raw", "store"), output),
    Command("train", "fmrl_dist.train", CONFIG, ("store",), run_files, ("run", "store.derived"), ("--resume", "auto")),
    Command(
        "train --resume",
        "fmrl_dist.train",
        (*CONFIG, "--resume", "auto"),
        ("store", "partial"),
        run_files,
        ("run", "store.derived"),
    ),
    Command(
        "train --resume, finished",
        "fmrl_dist.train",
        (*CONFIG, "--resume", "auto"),
        ("store", "run"),
        evaluation_of("run", "evaluation"),
        ("run", "store.derived"),
    ),
    Command(
        "evaluate",
        "fmrl_dist.evaluate",
        ("--checkpoint", "FOLDER/run", "--split", "valid", *STORE),
        ("store", "run"),
        evaluation_of("run", "evaluation-valid"),
        ("run", "store.derived"),
    ),
    Command(
        "evaluate --part",
        "fmrl_dist.evaluate",
        ("--checkpoint", "FOLDER/run", "--part", "1/2", *STORE),
        ("store", "run"),
        parts_of,
        ("run", "store.derived"),
    ),
    Command(
        "evaluate an export",
        "fmrl_dist.evaluate",
        ("--checkpoint", "FOLDER/export", *STORE),
        ("store", "export"),
        evaluation_of("export", "evaluation"),
        ("export", "store.derived"),
    ),
    Command(
        "export",
        "fmrl_dist.export",
        ("--checkpoint", "FOLDER/run", "--size", str(SIZE), "--output", "FOLDER/out", *STORE),
        ("store", "run"),
        export_files,
        ("out", "store.derived"),
    ),
    Command(
        "report", "fmrl_dist.report", ("FOLDER/run", "--no-timing", *STORE), ("store", "run"), page_of_run, ("run",)
    ),
    Command(
        "encode",
        "shards.encode",
        ("FOLDER/export", *ARRAYS, "--output", "FOLDER/encoded"),
        ("raw", "export"),
        files_of("encoded"),
        ("encoded",),
    ),
    Command(
        "add_items --remove",
        "fmrl_dist.add_items",
        ("FOLDER/export", "--remove", "FOLDER/ids.txt", "--output", "FOLDER/out"),
        ("export",),
        files_of("out"),
        ("out",),
    ),
    Command(
        "add_items --update",
        "fmrl_dist.add_items",
        ("FOLDER/export", *ARRAYS, "--update", "--output", "FOLDER/out"),
        ("raw", "export"),
        files_of("out"),
        ("out",),
        starts_processes=True,
    ),
    Command(
        "submit --dry-run", "launch.submit", (*CONFIG, "--cluster", "local", "--dry-run"), ("raw", "store"), output
    ),
    Command(
        "submit",
        "launch.submit",
        (*CONFIG, "--cluster", "local", "--stages", "shards"),
        ("raw",),
        files_of("store"),
        ("store", "run.jobs"),
        starts_processes=True,
    ),
    Command(
        "sweep --dry-run",
        "launch.sweep",
        ("FOLDER/space.yaml", "--folder", "FOLDER/sweep", "--cluster", "local", "--dry-run"),
        ("raw", "store"),
        output,
    ),
    Command(
        "sweep",
        "launch.sweep",
        ("FOLDER/space.yaml", "--folder", "FOLDER/sweep", "--cluster", "local"),
        ("raw", "store"),
        sweep_values,
        ("sweep", "store.derived"),
        starts_processes=True,
    ),
]
QUICK = [command for command in COMMANDS if IS_LARGE or not command.starts_processes]
BY_NAME = {command.name: command for command in COMMANDS}
