"""An evaluation in parts: each job evaluates its share of the user blocks, and the last one sums the parts.

    RUN/evaluation.parts/2-of-4.json   part 2: what was evaluated and how, its histograms, their sha256

Blocks are fixed and the histograms are integers, so the sum and the figures equal those of a single evaluation, to the
last digit. This needs the same threads on the same kind of device, which round alike; others are refused. Evaluating a
part again replaces it.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import json_sha256, write_atomically
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.evaluation.metrics import CUTOFF

PART = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")
PART_FILE = re.compile(r"([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})\.json")


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse ``I/N``, as given on the command line."""
        found = PART.fullmatch(text)
        if not found or int(found[1]) > int(found[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a part; expected I/N with I from 1 to N")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def file(self) -> str:
        return f"{self.number}-of-{self.count}.json"

    def share(self, num_blocks: int) -> range:
        """The blocks of this part; none if there are fewer blocks than parts."""
        return range(self.number - 1, num_blocks, self.count)


WHOLE = Part(1, 1)


@dataclass(frozen=True)
class EvaluationIdentity:
    """What all parts of one evaluation have in common."""

    checkpoint_sha256: str  # of a checkpoint's record, or of an export's files
    manifest_sha256: str  # of the store
    split: str
    mask_seen: bool
    sizes: list[int]
    users: int  # of the whole split, including those in damaged blocks


@dataclass(frozen=True)
class ComputeSetting:
    """What a part's scores were computed with; other settings round differently."""

    threads: int  # per process
    device: str  # cpu | cuda


def parts_folder(folder: Path, evaluated: EvaluationIdentity, own_manifest: str) -> Path:
    """The folder of the parts: beside the report that they are joined into."""
    other_manifest = evaluated.manifest_sha256 if evaluated.manifest_sha256 != own_manifest else ""
    return folder / f"{evaluation_file(evaluated.split, evaluated.mask_seen, other_manifest)}.parts"


def write_part(
    folder: Path, part: Part, evaluated: EvaluationIdentity, setting: ComputeSetting, histograms: Tensor
) -> Path:
    """Write one part into ``folder``, created if needed; return its path. Histograms are int64 [S, 2·CUTOFF + 1]."""
    record = {
        "part": str(part),
        "evaluated": asdict(evaluated),
        "means": asdict(setting),
        "histograms": histograms.tolist(),
    }
    folder.mkdir(exist_ok=True)
    write_atomically(folder / part.file, json.dumps(record | {"sha256": json_sha256(record)}).encode() + b"\n")
    return folder / part.file


def join_parts(folder: Path, evaluated: EvaluationIdentity) -> Tensor:
    """The sum of all parts' histograms, int64 [S, 2·CUTOFF + 1].

    Raises:
        UserError: a part is missing, damaged or of another evaluation, or the parts differ in their number N, threads
            or device.
    """
    parts = _parts_in(folder)
    counts = sorted({part.count for part in parts})
    require(bool(counts), f"{folder} holds no parts to join; evaluate them with --part 1/N to N/N")
    require(
        len(counts) == 1,
        f"{folder} holds parts of {' and of '.join(map(str, counts))}; keep the files of one N only and join again",
    )
    wanted = [Part(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [part for part in wanted if part not in parts]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {counts[0]} parts; evaluate "
            f"{', '.join(f'--part {part}' for part in missing[:3])}{' …' if missing[3:] else ''} and join again"
        )
    settings, histograms = zip(*(_read_part(folder, part, evaluated) for part in wanted), strict=True)
    for part, own in zip(wanted, settings, strict=True):
        require(
            own == settings[0],
            f"{folder / part.file} was evaluated with {_describe(own)}, part {wanted[0]} with "
            f"{_describe(settings[0])}: they round differently; evaluate all parts with the same --threads on the same "
            "kind of device",
        )
    return torch.stack(histograms).sum(0)


def _describe(setting: ComputeSetting) -> str:
    return f"{setting.threads} thread(s) on {setting.device}"


def _parts_in(folder: Path) -> set[Part]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {Part(int(found[1]), int(found[2])) for name in names if (found := PART_FILE.fullmatch(name))}


def _read_part(folder: Path, part: Part, evaluated: EvaluationIdentity) -> tuple[ComputeSetting, Tensor]:
    path, again = folder / part.file, f"evaluate it again with --part {part}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sha256") != json_sha256(record):
            raise ValueError("its sha256 does not match the recorded one")
        _require_same(path, {"part": str(part)} | asdict(evaluated), {"part": record["part"]} | record["evaluated"])
        return ComputeSetting(**record["means"]), _checked(record["histograms"], evaluated)
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is damaged ({problem}); {again}") from None


def _require_same(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in expected.items():
        was, wanted = (v[:12] if isinstance(v, str) else v for v in (found[key], value))
        require(found[key] == value, f"{path} is of another evaluation: {key} is {was!r}, expected {wanted!r}")


def _checked(rows: list[list[int]], evaluated: EvaluationIdentity) -> Tensor:
    """The histograms, if they can belong to some of the users."""
    histograms = torch.tensor(rows, dtype=torch.int64)
    expected = (len(evaluated.sizes), 2 * CUTOFF + 1)
    if histograms.shape != expected or histograms.tolist() != rows:
        raise ValueError(f"histograms are {list(histograms.shape)}; expected integers {list(expected)}")
    sums = histograms.sum(1).tolist()
    if bool((histograms < 0).any()) or len(set(sums)) != 1 or sums[0] > evaluated.users:
        raise ValueError(f"histograms count {sums} users of {evaluated.users}")
    return histograms
