"""``python -m fmrl_dist.recommend EXPORT``: the items to show next, to one history or to any number of users.

A history of item ids, oldest first, after EXPORT is answered with a list to read. ``--histories`` takes those of many
users, JSON Lines or Parquet, and writes a list for each: to standard output, to a file, or to a folder of parts that
several processes share (``accelerate launch``, ``--part I/N``) and that ``--resume auto`` goes on with.
"""

from __future__ import annotations

import fmrl_dist.base.parent_process  # noqa: F401  # first: importing torch takes seconds, and the launcher may die in them

# isort: split
import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from fmrl_dist.base.errors import UserError, require, run_command
from fmrl_dist.base.files import file_sha256, json_sha256
from fmrl_dist.base.id_columns import INTEGER
from fmrl_dist.base.launch_variables import is_alone, refuse_one_process_trap
from fmrl_dist.base.parts import WHOLE, Part
from fmrl_dist.base.progress import Progress
from fmrl_dist.checkpoint.export.reading import export_sha256
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.config.credentials import warn_of_credentials
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.approximate.choice import METHODS, recall_of_command
from fmrl_dist.deploy.batch.history_files import STDIN, HistoryFiles
from fmrl_dist.deploy.batch.job import ListCounts, one_thread_each, write_parts, write_stream
from fmrl_dist.deploy.batch.list_files import FORMATS, ListMaker
from fmrl_dist.deploy.batch.output_folder import JobRecord, OutputFolder
from fmrl_dist.deploy.batch.user_batches import Share, batched
from fmrl_dist.deploy.download import export_at
from fmrl_dist.deploy.item_vocabulary import Recommendation
from fmrl_dist.deploy.recommender import Recommender
from fmrl_dist.distributed.processes import Runtime, start_runtime

PART_USERS = 65_536
SHOWN_ITEMS = 5  # of a history


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.recommend", description=__doc__, allow_abbrev=False)
    parser.add_argument("export", help="folder of an export, or the id of a repository on the Hugging Face Hub")
    parser.add_argument("history", nargs="*", metavar="ITEM", help="ids of items, oldest first (none: a new user)")
    parser.add_argument(
        "--histories", metavar="PATH", help="of many users: .jsonl or .parquet, a file or folder; - for stdin"
    )
    parser.add_argument("--user", metavar="NAME", help="column or key of users (default: user_id, in JSON Lines user)")
    parser.add_argument("--items", metavar="NAME", help="of histories (default: item_ids, in JSON Lines history)")
    parser.add_argument("--output", type=Path, help="folder, or FILE.jsonl, to write (default: JSON Lines to stdout)")
    parser.add_argument("--format", choices=FORMATS, help="of the files in a folder (default: parquet)")
    parser.add_argument("--size", type=int, help="one of the export's sizes (default: the largest)")
    parser.add_argument(
        "--vectors", type=int, metavar="K", help="compare vectors of the whole network cut to K channels"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument("--retrieval", choices=METHODS, default="exact", help="how lists are found (default: exact)")
    parser.add_argument("--recall", type=float, help="of the exact lists' items, for others (default: 0.99)")
    parser.add_argument("-k", type=int, default=10, help="items of each list (default: 10)")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument(
        "--allow", type=Path, metavar="FILE", help="recommend only items whose ids are in FILE, one a line"
    )
    parser.add_argument("--deny", type=Path, metavar="FILE", help="recommend none of the items whose ids are in FILE")
    parser.add_argument(
        "--unknown", choices=("error", "skip"), default="error", help="ids that the export does not have"
    )
    parser.add_argument("--titles", action="store_true", help="also write the items' titles")
    parser.add_argument(
        "--resume", choices=("auto",), help="go on with an output whose process was ended, if there is one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--part", type=Part.parse, metavar="I/N", help="write only every Nth part of the output, from the Ith"
    )
    parser.add_argument("--part-users", type=int, default=PART_USERS, help=f"of each part (default: {PART_USERS})")
    parser.add_argument("--threads", type=int, default=0, help="threads per process (default: cores / processes)")
    arguments = parser.parse_intermixed_args(argv)
    warn_of_credentials(argv)
    check(arguments)
    arguments.recall = recall_of_command(arguments.retrieval, arguments.recall)
    folder = export_at(arguments.export, arguments.revision)
    if arguments.histories is None:
        show(load(folder, arguments), arguments)
    elif arguments.output is None:
        stream(folder, arguments)
    else:
        write(folder, arguments)


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: likewise.
    """
    require(arguments.k >= 1, f"-k is {arguments.k}; expected 1 or more items")
    require(arguments.part_users >= 1, f"--part-users is {arguments.part_users}; expected at least 1")
    require(arguments.threads >= 0, f"--threads is {arguments.threads}; expected at least 1, or 0 to share the cores")
    require(not (arguments.resume and arguments.overwrite), "--resume goes on with an output, --overwrite replaces it")
    many, output = arguments.histories is not None, arguments.output is not None
    require(not (many and arguments.history), "give item ids, or --histories with those of many users, not both")
    require(many or not output, "--output is for --histories; one history is answered on standard output")
    for name in ("user", "items", "titles"):
        require(many or not getattr(arguments, name), f"--{name} is for --histories")
    for name in ("format", "resume", "overwrite", "part"):
        require(output or not getattr(arguments, name), f"--{name} is for --output")
    alone = arguments.histories != STDIN or not (arguments.resume or arguments.part)
    require(alone, "standard input is read once, by one process; write it to a file for --resume and --part")
    joins = output and arguments.output.suffix == ".jsonl" and arguments.part is not None
    require(
        not joins, f"parts of {arguments.output} would not be joined; give a folder as --output, and --format jsonl"
    )
    overwrites = arguments.part is not None and arguments.overwrite
    require(
        not overwrites, "with --part, others may be writing the output; remove it beforehand instead of --overwrite"
    )


def load(folder: Path, arguments: argparse.Namespace) -> Recommender:
    """The recommender. What a funnel chooses depends on the threads that measure it, so one does."""
    threadpool_limits(1, user_api="blas")  # of the whole process, for good: Torch's settings are not NumPy's
    one_thread_each()
    settings = {"vectors": arguments.vectors, "retrieval": arguments.retrieval, "recall": arguments.recall}
    return Recommender.from_pretrained(folder, arguments.size, **settings)


def read_ids(path: Path | None, recommender: Recommender) -> list[int | str] | None:
    """The ids in a file, one a line."""
    if path is None:
        return None
    require(path.is_file(), f"{path} is no file; expected ids of items, one a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected ids of items, one a line") from None
    return typed([line.strip() for line in lines if line.strip()], recommender)


def typed(words: list[str], recommender: Recommender) -> list[int | str]:
    """Words as ids of the export's kind; what is no integer stays text, which no integer equals."""
    if isinstance(recommender.item_ids[0], str):
        return list(words)
    return [int(word) if re.match(INTEGER, word) else word for word in words]


def known_ids(path: Path | None, recommender: Recommender, skip_unknown: bool) -> list[int | str] | None:
    """:func:`read_ids`, without unknown ones if they are to be skipped.

    Raises:
        UserError: an id is unknown.
    """
    ids = read_ids(path, recommender)
    if ids is None:
        return None
    rows = recommender.vocabulary.places_of(ids)
    unknown = [item_id for item_id, row in zip(ids, rows.tolist(), strict=True) if row < 0]
    require(
        skip_unknown or not unknown,
        f"{path} holds {len(unknown)} ids of no item, such as {unknown[:1]}; leave them out with --unknown skip",
    )
    if unknown:
        print(f"{path}: {len(unknown):,} unknown ids left out", file=sys.stderr)
    return [item_id for item_id, row in zip(ids, rows.tolist(), strict=True) if row >= 0]


def list_maker(recommender: Recommender, arguments: argparse.Namespace) -> ListMaker:
    skip = arguments.unknown == "skip"
    allow, deny = (known_ids(path, recommender, skip) for path in (arguments.allow, arguments.deny))
    return ListMaker(recommender, arguments.k, not arguments.include_seen, allow, deny, arguments.titles)


# One history


def show(recommender: Recommender, arguments: argparse.Namespace) -> None:
    """Print the list of one history."""
    skip = arguments.unknown == "skip"
    history = typed(arguments.history, recommender)
    rows = recommender.rows_of(history, "skip") if skip else known_rows(history, recommender)
    allow, deny = (known_ids(path, recommender, skip) for path in (arguments.allow, arguments.deny))
    seen = [recommender.item_ids[row] for row in rows.tolist()]
    (items,) = recommender.recommend([seen], arguments.k, not arguments.include_seen, allow, deny)
    vectors = f", vectors cut to {arguments.vectors}" if arguments.vectors else ""
    left_out = f" ({len(history) - len(seen)} unknown left out)" if len(history) > len(seen) else ""
    print(
        f"size {recommender.size}{vectors}, {recommender.num_items:,} items; {described(seen, recommender)}{left_out}"
    )
    for line in table_of(items):
        print(line)
    if not items:
        print("no item is left")


def known_rows(history: list[int | str], recommender: Recommender) -> Any:
    """Rows of a history.

    Raises:
        UserError: an id is unknown; what to do about it is said in words of this command.
    """
    rows = recommender.vocabulary.places_of(history)
    unknown = [item_id for item_id, row in zip(history, rows.tolist(), strict=True) if row < 0]
    require(
        not unknown,
        f"{', '.join(f'{item_id!r:.60}' for item_id in unknown[:3])}: no such item; ids are like "
        f"{recommender.item_ids[0]!r:.60}; leave unknown ones out with --unknown skip",
    )
    return rows


def described(seen: list[int | str], recommender: Recommender) -> str:
    """A history in words."""
    if not seen:
        return f"for a new user, by {recommender.answers_empty}"
    titles = recommender.titles
    names = [
        str(item_id) if titles is None or titles[row] is None else str(titles[row])
        for item_id, row in zip(seen, recommender.rows_of(seen).tolist(), strict=True)
    ]
    before = f"{len(names) - SHOWN_ITEMS} more, " if len(names) > SHOWN_ITEMS else ""
    return f"after {before}{', '.join(names[-SHOWN_ITEMS:])}"


def table_of(items: list[Recommendation]) -> list[str]:
    """Lines of place, score, id and title."""
    width = max((len(str(item.item_id)) for item in items), default=0)
    return [
        f"{place:4d}  {item.score:9.4f}  {item.item_id!s:{width}}  {item.title or ''}".rstrip()
        for place, item in enumerate(items, 1)
    ]


# Many histories


def stream(folder: Path, arguments: argparse.Namespace) -> None:
    """Answer all users on standard output."""
    refuse_one_process_trap(os.environ)
    require(is_alone(os.environ), "several processes cannot share standard output; give --output")
    recommender = load(folder, arguments)
    make_lists = list_maker(recommender, arguments)
    histories = open_histories(recommender, arguments)
    described = histories.describe({})
    total = sum(file.users for file in described) if described else None
    progress = Progress("user", total, enabled=sys.stderr.isatty())  # elsewhere its lines would be among the lists
    share = Share(PART_USERS)
    batches = batched(histories.pieces(share, described), share)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    try:
        counts = write_stream(batches, make_lists, sys.stdout.buffer, threads, progress)
    finally:
        progress.close()
    print(summary(counts, recommender), file=sys.stderr)


def write(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the share of this process, and say when all is there."""
    output = OutputFolder.of(arguments.output, arguments.format)
    runtime = start_runtime(arguments.threads or "auto", lanes=None)
    alone = arguments.histories != STDIN or runtime.world_size == 1
    require(alone, "several processes cannot share standard input; write it to a file")
    if runtime.is_main:
        output.check(arguments.resume is not None, arguments.overwrite)
    recommender = load(folder, arguments)
    make_lists = list_maker(recommender, arguments)
    histories = open_histories(recommender, arguments)
    record = claimed(
        output, histories, options_of(folder, recommender, histories, output, arguments), runtime, arguments
    )

    own = my_parts(record, runtime, arguments.part or WHOLE)
    missing = None if own is None else output.missing(record, own)
    if missing is None or missing:
        output.reopen()
    share = Share(record.part_users, missing)
    name = f"process {runtime.rank + 1} of {runtime.world_size}" if runtime.world_size > 1 else ""
    total = None if own is None else Share(record.part_users, frozenset(own)).num_users(record.num_users)
    left = 0 if total is None else share.num_users(record.num_users)
    progress = Progress("user", total, (total or 0) - left, name, enabled=runtime.is_main)
    batches = batched(histories.pieces(share, record.input), share)
    try:
        counts = write_parts(batches, make_lists, output, record, share, runtime.threads, progress)
    finally:
        progress.close()
    of_all = ListCounts(*runtime.agree(counts.users, counts.empty, counts.unknown))  # waits for the others
    if runtime.is_main:
        finish(output, record, of_all, recommender)
    runtime.leave()


def finish(output: OutputFolder, record: JobRecord, counts: ListCounts, recommender: Recommender) -> None:
    """Mark an output finished whose parts are all there, and say so."""
    where = output.joined or output.path
    if counts.users:
        print(summary(counts, recommender), flush=True)
    if not record.input or output.has_all(record.num_parts):
        output.finish()
    elif not output.is_joined():
        print(f"{where} still lacks parts, which are other processes' to write", flush=True)
        return
    print(f"finished: {where}", flush=True)


def open_histories(recommender: Recommender, arguments: argparse.Namespace) -> HistoryFiles:
    return HistoryFiles.of(
        arguments.histories, arguments.user, arguments.items, recommender.vocabulary, arguments.unknown == "skip"
    )


def options_of(
    folder: Path,
    recommender: Recommender,
    histories: HistoryFiles,
    output: OutputFolder,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All but the input that determines the output's bytes."""
    ids = {name: read_ids(getattr(arguments, name), recommender) for name in ("allow", "deny")}
    return {
        "export_sha256": json_sha256([export_sha256(folder), file_sha256(folder / VOCAB_FILE)]),
        "size": recommender.size,
        "vectors": arguments.vectors,
        "retrieval": arguments.retrieval,
        "recall": arguments.recall if recommender.retrieval_record else None,
        "retrieval_sha256": json_sha256(recommender.retrieval_record),
        "k": arguments.k,
        "include_seen": arguments.include_seen,
        **{f"{name}_sha256": None if given is None else json_sha256(given) for name, given in ids.items()},
        "unknown": arguments.unknown,
        "titles": arguments.titles,
        "format": output.format_name,
        "user": histories.columns.user,
        "items": histories.columns.items,
    }


def claimed(
    output: OutputFolder,
    histories: HistoryFiles,
    options: dict[str, Any],
    runtime: Runtime,
    arguments: argparse.Namespace,
) -> JobRecord:
    """The record of the job, which is in the output's folder when this returns.

    The first process reads the input as a whole; the others take what it found, if the files are the same.
    """
    record = None
    if runtime.is_main:
        known = output.known_input() if arguments.resume else {}
        record = JobRecord(options, arguments.part_users, histories.describe(known))
        if arguments.overwrite:
            output.clear()
        output.claim(record)
    runtime.agree(0)
    if record is None:
        record = JobRecord(options, arguments.part_users, histories.describe(output.known_input()))
        output.claim(record)
    return record


def my_parts(record: JobRecord, runtime: Runtime, part: Part) -> range | None:
    """The parts of this process among all; None if nobody knows how many there are."""
    return part.share(record.num_parts)[runtime.rank :: runtime.world_size] if record.input else None


def summary(counts: ListCounts, recommender: Recommender) -> str:
    """What was done, in words."""
    empty = f", {counts.empty:,} of them without history (answered by {recommender.answers_empty})"
    unknown = f", {counts.unknown:,} unknown ids left out"
    return f"{counts.users:,} users{empty * (counts.empty > 0)}{unknown * (counts.unknown > 0)}"


if __name__ == "__main__":
    run_command(main)
