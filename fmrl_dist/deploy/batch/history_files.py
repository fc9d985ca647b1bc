"""Histories of users, streamed: from JSON Lines, from standard input, or from Parquet, a file or a folder of them.

A line of JSON Lines is an object such as ``{"user": 17, "history": ["a", "b"]}``, oldest item first; a row of a table
has a column of users and one of lists. Only what belongs to a process' share is decoded; users may repeat.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.id_columns import as_ids
from fmrl_dist.base.json_text import parse_object
from fmrl_dist.base.parquet import BoundedParquet, open_parquet
from fmrl_dist.base.table_files import table_files
from fmrl_dist.deploy.batch.user_batches import BATCH_USERS, Share, UserBatch
from fmrl_dist.deploy.item_vocabulary import ItemVocabulary

ENDINGS = (".parquet", ".jsonl")
STDIN = "-"
COLUMNS = {".parquet": ("user_id", "item_ids"), ".jsonl": ("user", "history")}  # of users and of histories
MAX_LINE_BYTES = 64_000_000
BLOCK_BYTES = 1 << 20
ROWS_AT_ONCE = 8 * BATCH_USERS  # of a table: each look-up of ids costs something by itself
MEND = "repair the line, or remove it"


@dataclass(frozen=True)
class InputFile:
    """One file of histories, as it was when it was read as a whole."""

    name: str
    num_bytes: int
    modified_ns: int
    users: int
    sha256: str

    @property
    def content(self) -> dict[str, Any]:
        """What tells it from another file, wherever and whenever it was written."""
        return {name: value for name, value in asdict(self).items() if name != "modified_ns"}


@dataclass(frozen=True)
class HistoryColumns:
    """Where users and their histories stand, and what their ids are looked up in."""

    user: str
    items: str
    vocabulary: ItemVocabulary
    skip_unknown: bool

    @property
    def id_kind(self) -> str:
        return "text" if isinstance(self.vocabulary.ids[0], str) else "integers"

    def unknown(self, item_id: object, where: str) -> UserError:
        return UserError(
            f"{where} holds item {item_id!r:.60}, which the export does not have (its ids are like "
            f"{self.vocabulary.ids[0]!r:.60}); leave unknown items out with --unknown skip"
        )


class HistoryFiles:
    """The input of a job; :meth:`of` finds it.

    Args:
        files: in order; none for standard input.
        columns: of the users and the histories.
    """

    def __init__(self, files: list[Path], columns: HistoryColumns) -> None:
        self.files, self.columns = files, columns
        self.is_parquet = bool(files) and files[0].suffix == ".parquet"
        self._stdin: Iterator[bytes] = iter(())
        if self.is_parquet:
            self.user_type = self._checked_tables()
        elif files:
            with files[0].open("rb") as file:
                first = next(_lines(file, str(files[0])), b"")
            self.user_type = self._type_of_first(first, str(files[0]))
        else:
            lines = _lines(sys.stdin.buffer, "standard input")
            first = next(lines, b"")
            self.user_type = self._type_of_first(first, "standard input")
            self._stdin = chain([first], lines)

    @classmethod
    def of(
        cls, source: str, user: str | None, items: str | None, vocabulary: ItemVocabulary, skip_unknown: bool
    ) -> HistoryFiles:
        """The input that a command names.

        Args:
            source: a file, a folder of them, or ``-``.
            user, items: names of columns or keys; None for those of :data:`COLUMNS`.
            vocabulary: the items.
            skip_unknown: leave unknown items out.

        Raises:
            UserError: nothing is there, or it has other columns or types.
        """
        is_stdin = source == STDIN
        files = [] if is_stdin else table_files(source, ENDINGS, "check the path after --histories", compressed=False)
        usual = COLUMNS[files[0].suffix if files else ".jsonl"]
        return cls(files, HistoryColumns(user or usual[0], items or usual[1], vocabulary, skip_unknown))

    def describe(self, known: Mapping[str, InputFile]) -> list[InputFile]:
        """Each file's size, hash and number of users; of a file that has not changed since, those that are known.

        Raises:
            UserError: there is no user.
        """
        found = []
        for name, path in zip(self._names(), self.files, strict=True):
            status = path.stat()
            before = known.get(name)
            if before is not None and (before.num_bytes, before.modified_ns) == (status.st_size, status.st_mtime_ns):
                found.append(before)
                continue
            sha256, num_lines = _read_whole(path)
            users = num_lines
            if self.is_parquet:
                with _opened(path) as table:
                    users = table.num_rows
            found.append(InputFile(name, status.st_size, status.st_mtime_ns, users, sha256))
        if self.files and sum(file.users for file in found) == 0:
            holds = "holds" if len(self.files) == 1 else "and the other files hold"
            raise UserError(f"{self.files[0]} {holds} no users; expected at least one")
        return found

    def pieces(self, share: Share, described: Iterable[InputFile]) -> Iterator[UserBatch]:
        """The share's users in order, in pieces none of which crosses a part's end.

        Raises:
            UserError: a line or row cannot be read, or an item is unknown; the message has its file and number.
        """
        if not self.files:
            yield from self._of_lines(self._stdin, "standard input", 0, share)
            return
        first = 0
        for path, file in zip(self.files, described, strict=True):
            if any(True for _ in share.spans(first, first + file.users)):
                if self.is_parquet:
                    yield from self._of_table(path, first, share)
                else:
                    with path.open("rb") as opened:
                        yield from self._of_lines(_lines(opened, str(path)), str(path), first, share)
            first += file.users

    def _names(self) -> list[str]:
        """Names of the files below the folder that holds them all, in which they may be moved together."""
        if len(self.files) <= 1:
            return [path.name for path in self.files]
        root = Path(os.path.commonpath([path.parent for path in self.files]))
        return [path.relative_to(root).as_posix() for path in self.files]

    # JSON Lines

    def _type_of_first(self, line: bytes, name: str) -> pa.DataType:
        require(bool(line), f"{name} holds no users; expected at least one line such as {self._example()}")
        user, _ = self._parse(line, f"{name}, line 1", None)
        return pa.int64() if isinstance(user, int) else pa.large_string()

    def _example(self) -> str:
        return f'{{"{self.columns.user}": 17, "{self.columns.items}": [{self.columns.vocabulary.ids[0]!r}, …]}}'

    def _of_lines(self, lines: Iterator[bytes], name: str, first: int, share: Share) -> Iterator[UserBatch]:
        kind = int if pa.types.is_integer(self.user_type) else str
        users: list[int | str] = []
        histories: list[np.ndarray] = []
        num_unknown, begin = 0, first

        def piece() -> UserBatch:
            return UserBatch(begin, pa.array(users, self.user_type), histories, num_unknown)

        for number, line in enumerate(lines, 1):
            place = first + number - 1
            if place == share.batch_end(begin) or not users:
                if users:
                    yield piece()
                users, histories, num_unknown, begin = [], [], 0, place
            if not share.has(place // share.part_users):
                continue
            where = f"{name}, line {number}"
            user, items = self._parse(line, where, kind)
            rows = self.columns.vocabulary.places_of(items)
            known = rows >= 0
            if not known.all():
                if not self.columns.skip_unknown:
                    raise self.columns.unknown(items[int(np.argmin(known))], where)
                num_unknown += len(rows) - int(known.sum())
                rows = rows[known]
            users.append(user)
            histories.append(rows)
        if users:
            yield piece()

    def _parse(self, line: bytes, where: str, kind: type | None) -> tuple[int | str, list[int | str]]:
        """The user, of a kind if that is known, and the items of a line."""
        user_key, items_key = self.columns.user, self.columns.items
        record = parse_object(line, f"{where},", MEND)
        for key in (user_key, items_key):
            require(key in record, f"{where} has no {key!r}; expected an object such as {self._example()}")
        user, items = record[user_key], record[items_key]
        require(
            type(user) is str or (type(user) is int and -(2**63) <= user < 2**63),
            f"{where} holds user {user!r:.60}; expected text, or an integer of 64 bits",
        )
        require(
            type(user) is int or _is_text(user),
            f"{where} holds user {user!r:.60}, half of a surrogate pair, which is no text; {MEND}",
        )
        require(
            kind is None or type(user) is kind,
            f"{where} holds user {user!r:.60}, and line 1 of the input "
            f"{'an integer' if kind is int else 'text'}; expected one kind",
        )
        require(
            isinstance(items, list) and {type(item) for item in items} <= {int, str},
            f"{where} holds {items_key} {items!r:.60}; expected a list of item ids, oldest first",
        )
        return user, items

    # Parquet

    def _checked_tables(self) -> pa.DataType:
        """The type of users' ids; all files must have the columns, of the types that they need."""
        user, items = self.columns.user, self.columns.items
        first = None
        for path in self.files:
            with _opened(path) as table:
                for column in (user, items):
                    require(
                        table.names.count(column) == 1,
                        f"table {path} has no column {column!r}, or several; it has: {', '.join(table.names)}; name "
                        "the columns with --user and --items",
                    )
                user_type, lists = table.types[user], table.types[items]
            require(
                pa.types.is_list(lists) or pa.types.is_large_list(lists),
                f"column {items!r} of {path} is of type {lists}; expected lists of item ids",
            )
            as_ids(pa.array([], lists.value_type), f"column {items!r} of {path}")
            found = "integers" if pa.types.is_integer(lists.value_type) else "text"
            require(
                # text of integers is as a store takes it; a list that is always empty has no type
                found == self.columns.id_kind or self.columns.id_kind == "text" or pa.types.is_null(lists.value_type),
                f"column {items!r} of {path} is of type {lists}; the export's ids are {self.columns.id_kind}, like "
                f"{self.columns.vocabulary.ids[0]!r:.60}",
            )
            ids = as_ids(pa.array([], user_type), f"column {user!r} of {path}").type
            first = ids if first is None else first
            require(
                ids == first, f"column {user!r} of {path} is of type {user_type}; that of {self.files[0]} is {first}"
            )
        return first

    def _of_table(self, path: Path, first: int, share: Share) -> Iterator[UserBatch]:
        columns = [self.columns.user, self.columns.items]
        with _opened(path) as opened:
            begin = first
            for group, num_rows in enumerate(opened.group_rows):
                place = begin
                if any(True for _ in share.spans(begin, begin + num_rows)):
                    for table in opened.batches(columns, ROWS_AT_ONCE, use_threads=False, groups=[group]):
                        for start, end in share.spans(place, place + len(table)):
                            taken = table.slice(start - place, end - start)
                            yield self._piece(taken, start, partial(_row_of, path, start - first))
                        place += len(table)
                begin += num_rows

    def _piece(self, table: pa.Table, first: int, row: Callable[[int], str]) -> UserBatch:
        columns = self.columns
        lists = table[columns.items].combine_chunks()
        for name, column in ((columns.user, table[columns.user]), (columns.items, lists)):
            if column.null_count:
                place = pc.index(pc.is_null(column), True).as_py()
                raise UserError(f"{row(place)} has no value in column {name!r}; fill it, or remove the row")
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(pc.list_value_length(lists).to_numpy(), out=starts[1:])
        values = pc.list_flatten(lists)
        if values.null_count:
            place = pc.index(pc.is_null(values), True).as_py()
            raise UserError(f"{_owner(row, starts, place)} has a null among its {columns.items!r}; remove it")
        where = f"{row(0)} or below: column"
        ids = as_ids(values, f"{where} {columns.items!r}", "text" if columns.id_kind == "text" else None)
        rows = columns.vocabulary.find(ids)
        known, num_unknown = rows >= 0, 0
        if not known.all():
            place = int(np.argmin(known))
            if not columns.skip_unknown:
                raise columns.unknown(values[place].as_py(), _owner(row, starts, place))
            num_unknown = len(rows) - int(known.sum())
            starts = np.concatenate(([0], np.cumsum(known)))[starts]
            rows = rows[known]
        users = as_ids(table[columns.user], f"{where} {columns.user!r}")
        return UserBatch(first, users, np.split(rows, starts[1:-1]), num_unknown)


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8; JSON's escapes can make others."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _owner(row: Callable[[int], str], starts: np.ndarray, place: int) -> str:
    return row(int(np.searchsorted(starts, place, "right")) - 1)


def _row_of(path: Path, first: int, place: int) -> str:
    return f"{path}, row {first + place + 1}"


def _lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
        require(len(line) <= MAX_LINE_BYTES, f"{name}, line {number}, is longer than {MAX_LINE_BYTES:,} bytes; {MEND}")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _read_whole(path: Path) -> tuple[str, int]:
    """SHA-256 and number of lines."""
    digest, num_lines, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_lines += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), num_lines + (last != b"\n")


@contextmanager
def _opened(path: Path) -> Iterator[BoundedParquet]:
    """A table; while it is open, what makes it unreadable is said in one line."""
    try:
        with open_parquet(path, f"table {path}") as table:
            yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"table {path} cannot be read: {problem}; is the file complete, and Parquet?") from None
