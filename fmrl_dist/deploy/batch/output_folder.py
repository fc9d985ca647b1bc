"""The output of a job: a folder of parts, each complete or absent, and a record of what they are.

    FOLDER/_recommend.json       export, options and input; written before the first part
    FOLDER/part-00000.parquet    lists of the first users of the input (or .jsonl)
    FOLDER/_SUCCESS              empty; all parts are there

For one file of JSON Lines, parts are written to FILE.parts and then joined; record and mark stay there.

Readers of folders of Parquet leave out names that begin with ``_``. Each process writes the parts of its own share, and
whichever finds all parts complete writes ``_SUCCESS``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import final_name, flush, foreign_entries, json_sha256, write_atomically, written_aside
from fmrl_dist.base.json_text import read_object
from fmrl_dist.deploy.batch.history_files import BLOCK_BYTES, InputFile
from fmrl_dist.deploy.batch.list_files import JsonLinesPart, ParquetPart, parquet_identity

RECORD_FILE, FINISHED_FILE = "_recommend.json", "_SUCCESS"
FORMAT_VERSION = 1
OUR_FILE = re.compile(r"part-[0-9]{5,}\.(parquet|jsonl)|_recommend\.json|_SUCCESS", re.ASCII)
BEGIN_ANEW = "begin anew with --overwrite, or choose another --output"


@dataclass(frozen=True)
class JobRecord:
    """What determines the bytes of the parts."""

    options: dict[str, Any]  # of the command, and the export's hash
    part_users: int
    input: list[InputFile]  # none: standard input

    @property
    def identity(self) -> str:
        """Hash of all of it, but for when the files were written."""
        return json_sha256(self.content())

    def content(self) -> dict[str, Any]:
        return {**self.options, "part_users": self.part_users, "input": [file.content for file in self.input]}

    @property
    def num_users(self) -> int:
        return sum(file.users for file in self.input)

    @property
    def num_parts(self) -> int:
        return -(-self.num_users // self.part_users)

    def users_of(self, part: int) -> int:
        """Number of users of a part."""
        return min(self.part_users, self.num_users - part * self.part_users)


class OutputFolder:
    """A folder of parts.

    Args:
        path: of the folder.
        format_name: "parquet" or "jsonl".
        joined: file that the parts are joined to; None for none.
    """

    def __init__(self, path: Path, format_name: str, joined: Path | None = None) -> None:
        self.path, self.format_name, self.joined = path, format_name, joined

    @classmethod
    def of(cls, output: Path, format_name: str | None) -> OutputFolder:
        """What ``--output`` and ``--format`` name."""
        if output.suffix == ".jsonl":
            require(format_name in (None, "jsonl"), f"{output} is JSON Lines by its name; leave --format out")
            return cls(output.with_name(f"{output.name}.parts"), "jsonl", output)
        require(output.suffix != ".parquet", f"output {output}: Parquet is written as a folder; leave .parquet out")
        return cls(output, format_name or "parquet")

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse what the options do not permit to go on with or to replace, before anything is loaded."""
        if self.joined is not None:
            require(not self.joined.is_dir(), f"output {self.joined} is a folder; choose another name")
            require(
                overwrite or not self.joined.exists() or (self.path / RECORD_FILE).exists(),
                f"output {self.joined} exists, and nothing says what it is of; replace it (--overwrite), or choose "
                "another --output",
            )
        require(self.path.is_dir() or not self.path.exists(), f"output {self.path} is a file; choose another --output")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        foreign = foreign_entries(self.path, lambda name: OUR_FILE.fullmatch(final_name(name)) is not None)
        require(
            not foreign,
            f"{self.path} holds {', '.join(foreign[:3])}, which this command does not write; choose another --output",
        )
        require(
            resume or overwrite,
            f"output {self.joined or self.path} exists; go on with it (--resume auto), replace it (--overwrite), or "
            "choose another --output",
        )

    def known_input(self) -> dict[str, InputFile]:
        """The files of an earlier start of the job, by name."""
        record = self._read() if (self.path / RECORD_FILE).exists() else None
        return {} if record is None else {file.name: file for file in record.input}

    def clear(self) -> None:
        """Remove an earlier job's files: the mark that it is finished first, its record last."""
        if not self.path.is_dir():
            return
        self.reopen()
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == RECORD_FILE):
            if OUR_FILE.fullmatch(final_name(path.name)):
                path.unlink()

    def reopen(self) -> None:
        """Take the mark that all parts are there away; to be called before a missing one is written."""
        (self.path / FINISHED_FILE).unlink(missing_ok=True)

    def claim(self, record: JobRecord) -> None:
        """Write the record, or, if there is one, refuse another job's.

        Raises:
            UserError: the folder's parts are of another export, input or other options.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RECORD_FILE).exists():
            parts = sorted(path.name for path in self.path.glob("part-*"))
            require(not parts, f"{self.path} holds {parts[:1]} but no {RECORD_FILE}; {BEGIN_ANEW}")
            self._create(record)
        found = self._read()
        was, now = found.content(), record.content()
        for key in now.keys() | was.keys():
            require(
                key in now and key in was and was[key] == now[key],
                f"the parts in {self.path} are of another job: {_difference(key, was.get(key), now.get(key))}; "
                f"{BEGIN_ANEW}",
            )

    def _create(self, record: JobRecord) -> None:
        """Of processes that start at once, one writes it."""
        values = {"format_version": FORMAT_VERSION, **record.options, "part_users": record.part_users}
        values["input"] = [asdict(file) for file in record.input]
        data = json.dumps(values | {"sha256": json_sha256(values)}, indent=2, ensure_ascii=False).encode() + b"\n"
        path = self.path / RECORD_FILE
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            aside.write_bytes(data)
            flush(aside)
            os.link(aside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            write_atomically(path, data)
        finally:
            aside.unlink(missing_ok=True)

    def _read(self) -> JobRecord:
        path = self.path / RECORD_FILE
        values = read_object(path, "record", BEGIN_ANEW)
        try:
            require(values.pop("sha256") == json_sha256(values), f"record {path} is damaged; {BEGIN_ANEW}")
            version = values.pop("format_version")
            require(
                version == FORMAT_VERSION, f"record {path} has version {version!r}, not {FORMAT_VERSION}; {BEGIN_ANEW}"
            )
            files, part_users = [InputFile(**file) for file in values.pop("input")], values.pop("part_users")
        except (LookupError, TypeError) as error:
            raise UserError(f"record {path} is damaged ({type(error).__name__}: {error}); {BEGIN_ANEW}") from None
        return JobRecord(values, part_users, files)

    def file(self, part: int) -> Path:
        return self.path / f"part-{part:05d}.{self.format_name}"

    def missing(self, record: JobRecord, parts: range) -> frozenset[int]:
        """Those parts that are not there.

        Raises:
            UserError: one is there that is none of this job's, or is damaged.
        """
        if self.is_joined():
            return frozenset()
        return frozenset(part for part in parts if not self._has(record, part))

    def _has(self, record: JobRecord, part: int) -> bool:
        path, expected = self.file(part), record.users_of(part)
        if not path.exists():
            return False
        try:
            users, identity = parquet_identity(path) if self.format_name == "parquet" else (_num_lines(path), None)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); remove it") from None
        require(
            users == expected and identity in (None, record.identity),
            f"{path} holds {users:,} users of {'this' if identity in (None, record.identity) else 'another'} job; "
            f"expected {expected:,} of this one: remove it",
        )
        return True

    @contextmanager
    def part(self, part: int, identity: str) -> Iterator[ParquetPart | JsonLinesPart]:
        """A part to write; it is there when the block ends, unless it raises. Of several writers, one wins."""
        is_whole = False
        try:
            with written_aside(self.file(part)) as file:
                writer = (ParquetPart if self.format_name == "parquet" else JsonLinesPart)(file, identity)
                try:
                    yield writer
                finally:
                    writer.close()
                is_whole = True
        except UserError:
            # Another has written the same bytes, found all parts and cleared this temporary file away.
            if not is_whole or not (self.file(part).exists() or self.is_joined()):
                raise

    def is_joined(self) -> bool:
        return self.joined is not None and self.joined.exists() and (self.path / FINISHED_FILE).exists()

    def has_all(self, num_parts: int) -> bool:
        return all(self.file(part).exists() for part in range(num_parts))

    def finish(self) -> None:
        """Mark the output, all of whose parts are there, as finished, and join them if they are to be one file."""
        for left in self.path.glob(".part-*"):  # by killed processes
            if OUR_FILE.fullmatch(final_name(left.name)):
                left.unlink(missing_ok=True)
        if self.joined is None:
            write_atomically(self.path / FINISHED_FILE, b"")
            return
        parts = sorted(self.path.glob("part-*.jsonl"), key=lambda path: (len(path.name), path.name))
        with written_aside(self.joined) as file:
            for path in parts:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file, BLOCK_BYTES)
        write_atomically(self.path / FINISHED_FILE, b"")
        for path in parts:
            path.unlink()


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))


def _difference(key: str, was: Any, now: Any) -> str:
    if key == "input":
        return "the input has changed"
    return f"{key} was {was!r:.60}, and is {now!r:.60}"
