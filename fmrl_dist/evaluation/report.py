"""How results are shown: the per-size table, evaluation.json, and the plot of metrics against size."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fmrl_dist import __version__
from fmrl_dist.base.files import write_atomically
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.data.store.reader import check_lost_users
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.metrics import METRICS, metrics_from_histogram


@dataclass(frozen=True)
class EvaluatedModel:
    """Which model the figures are of."""

    step: int  # of its checkpoint
    sha256: str  # of its checkpoint's record, or of an export's files
    manifest_sha256: str  # of the store that it belongs to: a run's, or the one that an export's items are of


def figures(
    histograms: Tensor, sizes: Sequence[int], protocol: EvaluationProtocol, model: EvaluatedModel
) -> dict[str, Any]:
    """The content of ``evaluation.json``; it has ``users_lost`` only if damaged blocks were left out.

    Raises:
        UserError: damaged blocks cost too many of the users (``store.max_lost_share``), or all of them.
    """
    num_users = int(histograms[0].sum())
    num_lost = num_users_in(protocol) - num_users
    check_lost_users(num_lost, num_users_in(protocol), protocol.split, protocol.store)
    return {
        "split": protocol.split,
        "users": num_users,
        **({"users_lost": num_lost} if num_lost else {}),
        "mask_seen": protocol.mask_seen,
        "sizes": {str(size): metrics_from_histogram(row) for size, row in zip(sizes, histograms, strict=True)},
        "checkpoint": {"step": model.step, "sha256": model.sha256},
        "store": protocol.store.location,
        "manifest_sha256": protocol.store.manifest.sha256,
        "fmrl_dist_version": __version__,
    }


def num_users_in(protocol: EvaluationProtocol) -> int:
    """Users of the whole split, including those in damaged blocks."""
    return sum(block.count for block in protocol.store.manifest.splits[protocol.split])


def print_and_write(result: dict[str, Any], folder: Path, model: EvaluatedModel) -> None:
    """Print the table, write the JSON and the plot, then print their paths.

    Figures on another store than the model's own get file names of their own.
    """
    lost = f" ({result['users_lost']:,} more in damaged blocks)" if "users_lost" in result else ""
    head = f"{result['split']}, {result['users']:,} users{lost}, whole catalogue ranked:"
    try:
        print(f"{head}\n{size_table(result['sizes'])}", flush=True)
    finally:  # a reader that has gone away costs nobody the figures
        json_path, picture_path = write_report(folder, result, model.manifest_sha256)
    print(f"written: {json_path}\npicture: {picture_path}", flush=True)


def size_table(sizes: dict[str, dict[str, float]]) -> str:
    """One line per size, one column per metric."""
    lines = ["  size  " + "  ".join(f"{metric:>9}" for metric in METRICS)]
    lines += [f"{size:>6}  " + "  ".join(f"{row[metric]:9.4f}" for metric in METRICS) for size, row in sizes.items()]
    return "\n".join(lines)


def write_report(folder: Path, result: dict[str, Any], own_manifest: str) -> tuple[Path, Path]:
    """Write an evaluation's JSON and plot; return their paths."""
    other_manifest = result["manifest_sha256"] if result["manifest_sha256"] != own_manifest else ""
    name = evaluation_file(result["split"], result["mask_seen"], other_manifest)
    json_path, picture_path = folder / f"{name}.json", folder / f"{name}.png"
    write_atomically(json_path, json.dumps(result, indent=1).encode() + b"\n")
    write_atomically(picture_path, _draw(result))
    return json_path, picture_path


def _draw(result: dict[str, Any]) -> bytes:
    """The plot, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [int(size) for size in result["sizes"]]
    for metric in ("recall@10", "ndcg@10"):
        axes.plot(sizes, [row[metric] for row in result["sizes"].values()], marker="o", label=metric)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("model size (channels kept)")
    masked = ", seen items masked" if result["mask_seen"] else ""
    axes.set_ylabel(f"{result['split']}, {result['users']:,} users{masked}")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
