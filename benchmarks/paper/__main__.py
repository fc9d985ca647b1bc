"""``make paper``: the paper's table 2 from one harness, hours on two cores; interrupted, it goes on where it was.

Every row is a configuration, trained by ``fmrl_dist.train --resume auto``; finished rows are not repeated. ``--submit``
hands the rows to SLURM instead, a chain of jobs each, and a later ``--table`` writes the page of those that have ended.
The page is made of ``--records``, one per finished row, which can be committed.
Further ``--section.key value`` go to every row.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import REPOSITORY
from benchmarks.paper.records import Records, keep_record, read_records
from benchmarks.paper.rows import (
    MODELS,
    SETS,
    Places,
    Row,
    build_command,
    start,
    submit_command,
    train_command,
)
from benchmarks.paper.table import draw, table_text
from fmrl_dist.base.errors import require, run_command

POLL_S = 2.0


def main(argv: list[str]) -> None:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python -m benchmarks.paper", description=description, allow_abbrev=False)
    parser.add_argument("--data", default="../shared/data", help="folder of the raw tables (default: %(default)s)")
    parser.add_argument("--stores", type=Path, default=Path("stores"), help="of the sets (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="one per row (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    parser.add_argument(
        "--records",
        type=Path,
        default=REPOSITORY / "benchmarks" / "results" / "paper",
        help="folder of the figures of finished rows (default: benchmarks/results/paper)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the commands")
    what.add_argument("--submit", action="store_true", help="to SLURM")
    what.add_argument("--table", action="store_true", help="only write the page of what is finished")
    arguments, further = parser.parse_known_args(argv)
    require(arguments.jobs >= 1, f"--jobs is {arguments.jobs}; expected at least 1")
    require(arguments.threads >= 1, f"--threads is {arguments.threads}; expected at least 1")
    places = Places(
        str(Path(arguments.data).resolve()), arguments.stores.resolve(), arguments.runs.resolve(), tuple(further)
    )
    rows = [Row(*pair) for pair in itertools.product(arguments.sets, arguments.models)]
    if arguments.dry_run:
        for row in rows:
            print(shlex.join(build_command(row, places)))
            print(shlex.join(train_command(row, places, arguments.threads)))
        return
    if arguments.submit:
        for row in rows:
            places.check_is_the_rows(row)
            places.begin(row)
            submitted = subprocess.run(submit_command(row, places), cwd=REPOSITORY, check=False)
            require(submitted.returncode == 0, f"{row.name} was not submitted, nor what follows it; see the line above")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the rows are told, too
    failed = [] if arguments.table else train_all(rows, places, arguments.jobs, arguments.threads, arguments.records)
    for row in rows:
        keep_record(row, places, arguments.threads, arguments.records)
    records = read_records(rows, places, arguments.records)
    if records or not failed:
        write_page(records, places, arguments.output)
    require(
        not failed,
        f"{len(failed)} of {len(rows)} rows failed: {', '.join(failed)}; the logs in {places.runs} say why, and the "
        "same command goes on with them",
    )


def train_all(rows: list[Row], places: Places, num_jobs: int, num_threads: int, records: Path) -> list[str]:
    """Build, train and record what is not finished, some rows at a time; the names of those that failed."""
    waiting = [row for row in rows if not places.is_finished(row)]
    print(f"{len(rows) - len(waiting)} of {len(rows)} rows are finished", flush=True)
    running: dict[Row, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                row = waiting.pop(0)
                built = start(build_command(row, places), log_of(row, places)).wait()
                if built != 0:
                    failed.append(row.name)
                    continue
                places.begin(row)
                running[row] = start(train_command(row, places, num_threads), log_of(row, places))
                print(f"{row.name}: begun, {len(waiting)} wait; log {log_of(row, places)}", flush=True)
            for row, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[row]
                print(f"{row.name}: {'finished' if code == 0 else f'exit code {code}'}", flush=True)
                if code == 0:
                    keep_record(row, places, num_threads, records)
                else:
                    failed.append(row.name)
            time.sleep(POLL_S)
    finally:  # interrupted: they save a checkpoint, and the next call resumes them
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def log_of(row: Row, places: Places) -> Path:
    return places.runs / f"{row.name}.log"


def write_page(records: Records, places: Places, folder: Path) -> None:
    """The page and its pictures, of the rows that have a record."""
    require(len(records) > 0, f"no row in {places.runs} is finished, nor recorded; run without --table first")
    evaluations = {row: record["evaluation"] for row, record in records.items()}
    settings = {row: record["setting"] for row, record in records.items()}
    text = table_text(evaluations, settings, places.further)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "paper-table.md").write_text(text, encoding="utf-8")
    draw(evaluations, folder)
    print(f"written: {folder / 'paper-table.md'}")


if __name__ == "__main__":
    run_command(main)
