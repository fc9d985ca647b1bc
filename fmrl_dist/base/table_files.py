"""The files of a table: one file, or a folder of parts, as Spark, Dask and others write them.

Parts are read in the order of their names, numbers compared as numbers (``part.2`` before ``part.10``). Names that
begin with ``_`` or ``.`` are no parts (``_SUCCESS``, checksums). Folders ``key=value`` (Hive partitions) are read in
order, but their key is no column: what a table needs must be in its files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fmrl_dist.base.errors import UserError, require

ENDINGS = (".parquet", ".csv")
PARTITION = re.compile(r"([^=]+)=.*", re.DOTALL)
NOT_PLAIN = {  # what marks a folder whose files are not simply the table
    "_temporary": "its writer has not finished; run it again, or wait for it",
    "_delta_log": "it is a Delta table, whose old versions are files too; write it as plain Parquet",
    "_spark_metadata": "it is the output of a stream, whose failed writes are files too; write it as plain Parquet",
}


def table_files(
    path: Path, endings: Sequence[str] = ENDINGS, mend: str = "check data.root and the path in the config"
) -> list[Path]:
    """The files of the table at ``path``, in order; all have the same of ``endings``.

    Raises:
        UserError: nothing is there, which ``mend`` helps with, or it is not plainly a table.
    """
    kinds = " or ".join(endings)
    if path.is_dir():
        files = _parts(path, endings)
        require(bool(files), f"table {path} is a folder without {kinds} files; {mend}")
        others = [file.name for file in files if file.suffix != files[0].suffix]
        require(not others, f"table {path} holds {files[0].name} and {', '.join(others[:1])}; expected one kind")
        return files
    if not path.is_file():
        raise UserError(f"table {path} does not exist; {mend}")
    require(path.suffix in endings, f"table {path} ends in {path.suffix!r}; expected {kinds}")
    return [path]


def partition_keys(path: Path, files: list[Path]) -> list[str]:
    """Names of the table's Hive partitions."""
    folders = {part for file in files for part in file.relative_to(path).parts[:-1]}
    return sorted({match[1] for folder in folders if (match := PARTITION.fullmatch(folder))})


def _parts(folder: Path, endings: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for path in sorted(folder.iterdir(), key=_natural):
        if path.name in NOT_PLAIN:
            raise UserError(f"table {folder} holds {path.name}: {NOT_PLAIN[path.name]}")
        if path.name.startswith(("_", ".")):
            continue
        if path.is_dir() and PARTITION.fullmatch(path.name):
            files += _parts(path, endings)
        elif path.is_file() and path.suffix in endings:
            files.append(path)
        else:
            raise UserError(
                f"table {folder} holds {path.name}; expected only {' or '.join(endings)} files, or folders key=value"
            )
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers in a name count as numbers."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]+)", path.name)]
