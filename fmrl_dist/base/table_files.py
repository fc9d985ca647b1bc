"""The files of a table: one file, a folder of parts as Spark, Dask and others write them, a pattern, a URL, or a list.

Parts are read in the order of their names, numbers compared as numbers (``part.2`` before ``part.10``); those of a list
in the order of the list. Names that begin with ``_`` or ``.`` are no parts (``_SUCCESS``, checksums). Folders
``key=value`` (Hive partitions) are read in order, but their key is no column: what a table needs must be in its files.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.url_copies import copies_of
from fmrl_dist.base.urls import hide_credentials, is_url

ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
COMPRESSIONS = (".gz", ".zst")  # of text; Parquet compresses by itself
SAME_KIND = {".json": ".jsonl"}  # both are JSON Lines
PARTITION = re.compile(r"([^=]+)=.*", re.DOTALL)
MEND = "check data.root and the path in the config"
NOT_PLAIN = {  # what marks a folder whose files are not simply the table
    "_temporary": "its writer has not finished; run it again, or wait for it",
    "_delta_log": "it is a Delta table, whose old versions are files too; write it as plain Parquet",
    "_spark_metadata": "it is the output of a stream, whose failed writes are files too; write it as plain Parquet",
}


def rooted(root: str | Path, path: str | Sequence[str]) -> tuple[str, ...]:
    """The places that a path, or a list of paths, names below ``root``; URLs and absolute paths stay as they are."""
    paths = (path,) if isinstance(path, str) else path
    return tuple(place if is_url(place) else str(Path(root) / place) for place in paths)


def shown_places(places: Sequence[str]) -> str:
    """For messages."""
    return hide_credentials(", ".join(places))


def table_kind(file: Path) -> str:
    """What a file holds by its name: its ending without that of a compression, one for each kind of :data:`ENDINGS`."""
    name = file.name
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    ending = Path(name).suffix
    return SAME_KIND.get(ending, ending)


def table_files(
    path: str | Path | Sequence[str],
    endings: Sequence[str] = ENDINGS,
    mend: str = MEND,
    downloads: Path | None = None,
    any_ending: bool = False,
    compressed: bool = True,
) -> list[Path]:
    """The files of the table at ``path``, in order; all are of one kind.

    Args:
        path: one place, or a list of them, each a file, a folder, a pattern (``*``, ``?``, ``[ab]``, ``**``) or a URL.
        endings: allowed.
        mend: what helps where nothing is there.
        downloads: folder into which files of URLs are copied.
        any_ending: whether names may end in anything: the caller knows what they hold.
        compressed: whether text may be, and then ends in one of :data:`COMPRESSIONS` too.

    Raises:
        UserError: nothing is there, it is not plainly a table, a file is named twice, or a URL cannot be read.
    """
    places = [str(path)] if isinstance(path, str | Path) else list(path)
    if compressed:
        endings = [*endings, *(e + c for e in endings for c in COMPRESSIONS if e != ".parquet")]
    require(bool(places), f"the list of a table's files is empty; {mend}")
    files: list[Path] = []
    for place in places:
        files += _files_at(place, endings, mend, downloads, any_ending)
    seen: dict[Path, Path] = {}
    for file in files:
        same = seen.setdefault(file.resolve(), file)
        require(same is file, f"table {shown_places(places)} names {file} twice; name each file once")
    if not any_ending:
        others = [file.name for file in files if table_kind(file) != table_kind(files[0])]
        require(
            not others,
            f"table {shown_places(places)} holds {files[0].name} and {', '.join(others[:1])}; expected one kind",
        )
    return files


def partition_keys(path: Path, files: list[Path]) -> list[str]:
    """Names of the table's Hive partitions."""
    folders = {part for file in files for part in file.relative_to(path).parts[:-1]}
    return sorted({match[1] for folder in folders if (match := PARTITION.fullmatch(folder))})


def listed(endings: Sequence[str]) -> str:
    """``.a, .b or .c``, with what may follow those of text."""
    short = [ending for ending in endings if not ending.endswith(COMPRESSIONS)]
    words = " or ".join(filter(None, (", ".join(short[:-1]), short[-1])))
    return words if len(short) == len(endings) else f"{words} (text also with {' or '.join(COMPRESSIONS)})"


def _files_at(place: str, endings: Sequence[str], mend: str, downloads: Path | None, any_ending: bool) -> list[Path]:
    if is_url(place):
        require(downloads is not None, f"table {shown_places([place])} is a URL; copy the file here first")
        assert downloads is not None
        files = copies_of(place, downloads)
    elif (path := Path(place)).is_dir():
        files = _parts(path, endings)
        require(bool(files), f"table {path} is a folder without {listed(endings)} files; {mend}")
        return files
    elif not path.exists() and glob.has_magic(place):
        files = _matches(place)
        require(bool(files), f"no file matches {place}; {mend}")
    else:
        if not path.is_file():
            raise UserError(f"table {path} does not exist; {mend}")
        files = [path]
    for file in [] if any_ending else files:
        suffix = "".join(file.suffixes[-2:]) if file.suffix in COMPRESSIONS else file.suffix
        require(_fits(file, endings), f"table {file} ends in {suffix!r}; expected {listed(endings)}")
    return files


def _matches(pattern: str) -> list[Path]:
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = [path for path in found if path.is_file() and not path.name.startswith(("_", "."))]
    return sorted(set(files), key=lambda path: [_natural(part) for part in path.parts])


def _parts(folder: Path, endings: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for path in sorted(folder.iterdir(), key=lambda path: _natural(path.name)):
        if path.name in NOT_PLAIN:
            raise UserError(f"table {folder} holds {path.name}: {NOT_PLAIN[path.name]}")
        if path.name.startswith(("_", ".")):
            continue
        if path.is_dir() and PARTITION.fullmatch(path.name):
            files += _parts(path, endings)
        elif path.is_file() and _fits(path, endings):
            files.append(path)
        else:
            raise UserError(
                f"table {folder} holds {path.name}; expected only {listed(endings)} files, or folders key=value"
            )
    return files


def _fits(file: Path, endings: Sequence[str]) -> bool:
    return file.name.endswith(tuple(endings))


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]+)", name)]
