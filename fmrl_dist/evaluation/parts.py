"""An evaluation in parts: each job evaluates its share of the user blocks, and the last one sums the parts.

    RUN/evaluation.parts/2-of-4.json          part 2: what was evaluated and how, its histograms, their sha256
    RUN/evaluation.parts/2-of-4.safetensors   each of its users' ranks, and how often items are listed, if asked for

Blocks are fixed and the histograms are integers, so the sum and the figures equal those of a single evaluation, to the
last digit. This needs the same threads on the same kind of device, which round alike; others are refused. Evaluating a
part again replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.base.files import json_sha256, write_atomically
from fmrl_dist.base.parts import Part
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.evaluation.rank_counts import RankCounts, sorted_users

OUR_FILE = re.compile(r"\.?[1-9][0-9]{0,5}-of-[1-9][0-9]{0,5}\.(json|safetensors)(\.[0-9a-f]{16})?", re.ASCII)
PART_FILE = re.compile(r"([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})\.json")


@dataclass(frozen=True)
class EvaluationIdentity:
    """What all parts of one evaluation have in common."""

    checkpoint_sha256: str  # of a checkpoint's record, or of an export's files
    manifest_sha256: str  # of the store
    split: str
    mask_seen: bool
    sizes: list[int]
    vector_sizes: list[int]  # of cut vectors
    users: int  # of the whole split, including those in damaged blocks
    cells: int  # of segments
    cutoff: int  # last rank that is counted
    keep_users: bool  # whether each user's ranks are kept
    list_lengths: list[int]  # of lists whose items are counted

    @property
    def histograms_shape(self) -> tuple[int, ...]:
        return (self.cells, 2, self.num_rows, 2 * self.cutoff + 1)

    @property
    def num_rows(self) -> int:
        """Figures of each kind: one per size and deployment."""
        return len(self.sizes) + len(self.vector_sizes)


@dataclass(frozen=True)
class ComputeSetting:
    """What a part's scores were computed with; other settings round differently."""

    threads: int  # per process
    device: str  # cpu | cuda
    rotation: str = ""  # sha256 of what cut vectors were rotated with


def parts_folder(folder: Path, evaluated: EvaluationIdentity, own_manifest: str) -> Path:
    """The folder of the parts: beside the report that they are joined into."""
    other_manifest = evaluated.manifest_sha256 if evaluated.manifest_sha256 != own_manifest else ""
    return folder / f"{evaluation_file(evaluated.split, evaluated.mask_seen, other_manifest)}.parts"


def write_part(
    folder: Path, part: Part, evaluated: EvaluationIdentity, setting: ComputeSetting, counts: RankCounts
) -> Path:
    """Write one part into ``folder``, created if needed; return the path of its JSON."""
    folder.mkdir(exist_ok=True)
    record = {
        "part": str(part),
        "evaluated": asdict(evaluated),
        "means": asdict(setting),
        "histograms": counts.histograms.tolist(),
    }
    tensors = {"users": counts.users.table.contiguous()} if counts.users is not None else {}
    if counts.exposures is not None:
        tensors["exposures"] = counts.exposures.cpu().contiguous()
    if tensors:
        content = save(tensors)
        record["tensors_sha256"] = hashlib.sha256(content).hexdigest()
        write_atomically(_tensors_file(folder / _part_file(part)), content)
    write_atomically(folder / _part_file(part), json.dumps(record | {"sha256": json_sha256(record)}).encode() + b"\n")
    return folder / _part_file(part)


def join_parts(folder: Path, evaluated: EvaluationIdentity) -> RankCounts:
    """The sum of all parts' counts, and their users.

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
    settings, histograms, tensors = zip(*(_read_part(folder, part, evaluated) for part in wanted), strict=True)
    for part, own in zip(wanted, settings, strict=True):
        require(
            own == settings[0],
            f"{folder / _part_file(part)} was evaluated with {_describe(own)}, part {wanted[0]} with "
            f"{_describe(settings[0])}: they round differently; evaluate all parts with the same --threads on the same "
            "kind of device",
        )
    users = sorted_users([each["users"] for each in tensors], evaluated.num_rows) if evaluated.keep_users else None
    exposures = sum(each["exposures"] for each in tensors) if evaluated.list_lengths else None
    return RankCounts(torch.stack(histograms).sum(0), users, exposures)


def _describe(setting: ComputeSetting) -> str:
    rotated = f", rotation {setting.rotation[:12]}" if setting.rotation else ""
    return f"{setting.threads} thread(s) on {setting.device}{rotated}"


def _part_file(part: Part) -> str:
    return f"{part.number}-of-{part.count}.json"


def _parts_in(folder: Path) -> set[Part]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {Part(int(found[1]), int(found[2])) for name in names if (found := PART_FILE.fullmatch(name))}


def remove_parts(folder: Path) -> None:
    """Remove all parts, also what killed processes left of them; the folder stays where others put files into it."""
    for path in folder.iterdir():
        if OUR_FILE.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def _tensors_file(part_file: Path) -> Path:
    return part_file.with_suffix(".safetensors")


def _read_part(
    folder: Path, part: Part, evaluated: EvaluationIdentity
) -> tuple[ComputeSetting, Tensor, dict[str, Tensor]]:
    """How a part was evaluated, its histograms, and what else it has."""
    path, again = folder / _part_file(part), f"evaluate it again with --part {part}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sha256") != json_sha256(record):
            raise ValueError("its sha256 does not match the recorded one")
        _require_same(path, {"part": str(part)} | asdict(evaluated), {"part": record["part"]} | record["evaluated"])
        histograms = _checked(record["histograms"], evaluated)
        needs_tensors = evaluated.keep_users or evaluated.list_lengths
        tensors = _read_tensors(_tensors_file(path), record["tensors_sha256"]) if needs_tensors else {}
        return ComputeSetting(**record["means"]), histograms, tensors
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is damaged ({problem}); {again}") from None


def _require_same(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in expected.items():
        was, wanted = (v[:12] if isinstance(v, str) else v for v in (found[key], value))
        require(found[key] == value, f"{path} is of another evaluation: {key} is {was!r}, expected {wanted!r}")


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"the sha256 of {path.name} does not match the recorded one")
    return load(content)


def _checked(rows: Any, evaluated: EvaluationIdentity) -> Tensor:
    """The histograms, if they can belong to some of the users."""
    histograms = torch.tensor(rows, dtype=torch.int64)
    expected = evaluated.histograms_shape
    if histograms.shape != expected or histograms.tolist() != rows:
        raise ValueError(f"histograms are {list(histograms.shape)}; expected integers {list(expected)}")
    sums = histograms.sum(3)  # users of each cell, the same for all ranks of theirs
    if bool((histograms < 0).any()) or bool((sums != sums[:, :1, :1]).any()):
        raise ValueError("histograms do not count the same users at every size")
    if not 0 <= int(sums[:, 0, 0].sum()) <= evaluated.users:
        raise ValueError(f"histograms count {int(sums[:, 0, 0].sum())} users of {evaluated.users}")
    return histograms
