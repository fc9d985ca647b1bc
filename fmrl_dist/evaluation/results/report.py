"""How results are shown: the tables, evaluation.json, the plot of metrics against size, and every user's ranks.

Figures among all items and among unseen ones always stand side by side, and so do both deployments: the network cut to
a size, and the whole network's vectors cut to it.
"""

from __future__ import annotations

import io
import json
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fmrl_dist.base.files import write_atomically
from fmrl_dist.checkpoint.run_folder import evaluation_file
from fmrl_dist.evaluation.cut_vectors import cut_sizes
from fmrl_dist.evaluation.histograms import EvaluationProtocol
from fmrl_dist.evaluation.rank_counts import RankCounts
from fmrl_dist.evaluation.results.figures import EvaluatedModel, Rows, figures, origin
from fmrl_dist.evaluation.results.user_ranks import row_names, write_user_ranks
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

COLUMNS = 6  # metrics side by side in a table


def report(
    counts: RankCounts,
    baselines: Mapping[str, Tensor],
    sizes: Sequence[object],
    protocol: EvaluationProtocol,
    model: EvaluatedModel,
    folder: Path,
) -> None:
    """Print the tables, write JSON, plot and users' ranks, then print their paths.

    Figures on another store than the model's own get file names of their own.

    Raises:
        UserError: damaged blocks cost too many of the users.
    """
    result = figures(counts, baselines, sizes, protocol, model)
    try:
        print(describe(result), flush=True)
    finally:  # a reader that has gone away costs nobody the figures
        json_path, picture_path = write_report(folder, result, model.manifest_sha256)
        name = evaluation_file(protocol.split, False, other_manifest(result, model.manifest_sha256))
        users_path = folder / f"{name}-users.parquet"
        if counts.users is not None:
            names = row_names(sizes, cut_sizes(sizes, protocol))
            write_user_ranks(users_path, counts.users, names, protocol.store, origin(protocol, model))
    print(f"written: {json_path}\npicture: {picture_path}", flush=True)
    if counts.users is not None:
        print(f"users: {users_path}", flush=True)


def describe(result: Mapping[str, Any]) -> str:
    """The tables: every size, and segments at the largest one."""
    lost = f" ({result['users_lost']:,} more in damaged blocks)" if "users_lost" in result else ""
    lines = [
        f"{result['split']}, {result['users']:,} users{lost}, whole catalogue ranked ({result['items']:,} items), "
        f"{result['split_rule']}, ties count {result['ties']};",
        "pairs of figures: all items ranked | seen items masked",
        *pair_table("size", *both_protocols(result)),
    ]
    if "vectors" in result:
        what = "cut vectors: the whole network, its outputs and item vectors rotated, then cut:"
        lines += ["", what, *pair_table("size", *both_protocols(result, ("vectors",)))]
    for key, suffix in (("lists", ""), ("vector_lists", ", cut vectors")):
        if key in result:
            lines += ["", f"of the items recommended{suffix}:", *pair_table("size", *both_protocols(result, (key,)))]
    filled = {name: part for name, part in result["segments"].items() if part["users"]}
    if filled:
        largest = list(result["sizes"])[-1]
        pairs = {f"{name} ({part['users']:,})": both_protocols(part) for name, part in filled.items()}
        rows = [{name: pair[which][largest] for name, pair in pairs.items()} for which in (ALL, UNSEEN)]
        what = f"at size {largest}" if largest.isdigit() else f"of {largest}"
        lines += ["", f"by segment (users), {what}:", *pair_table("segment", *rows)]
    return "\n".join(lines)


def both_protocols(figures: Mapping[str, Any], keys: Sequence[str] = ("sizes", "baselines")) -> tuple[Rows, Rows]:
    """Figures of every size and baseline, among all items and among unseen ones."""
    other = figures.get("masked") or figures["unmasked"]
    first, second = (dict(ChainMap(*(part.get(key, {}) for key in reversed(keys)))) for part in (figures, other))
    return (first, second) if "masked" in figures else (second, first)


def pair_table(head: str, unmasked: Rows, masked: Rows) -> Iterator[str]:
    """One line per row, and for each metric two figures; metrics beyond ``COLUMNS`` go into further tables."""
    metrics = list(next(iter(unmasked.values()), {}))
    width = max(map(len, (head, *unmasked)), default=0) + 2
    for first in range(0, len(metrics), COLUMNS):
        shown = metrics[first : first + COLUMNS]
        yield f"{head:>{width}}" + "".join(f"{metric:>17}" for metric in shown)
        for name, row in unmasked.items():
            pairs = (f"{row[metric]:10.4f} {masked[name][metric]:.4f}" for metric in shown)
            yield f"{name:>{width}}" + "".join(pairs)


def other_manifest(result: Mapping[str, Any], own_manifest: str) -> str:
    """The manifest of the store that was evaluated on, where that is not the model's own."""
    return str(result["manifest_sha256"]) if result["manifest_sha256"] != own_manifest else ""


def write_report(folder: Path, result: dict[str, Any], own_manifest: str) -> tuple[Path, Path]:
    """Write an evaluation's JSON and plot; return their paths."""
    name = evaluation_file(result["split"], result["mask_seen"], other_manifest(result, own_manifest))
    json_path, picture_path = folder / f"{name}.json", folder / f"{name}.png"
    write_atomically(json_path, json.dumps(result, indent=1).encode() + b"\n")
    write_atomically(picture_path, _draw(result))
    return json_path, picture_path


def _draw(result: dict[str, Any]) -> bytes:
    """The plot, as PNG: the metrics of the largest cut-off against size, masked ones dashed, cut vectors thin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    sizes = list(result["sizes"])
    are_sizes = all(size.isdigit() for size in sizes)
    x = [int(size) for size in sizes] if are_sizes else list(range(len(sizes)))
    unmasked, masked = both_protocols(result)
    vectors = both_protocols(result, ("vectors",))
    metrics = list(next(iter(unmasked.values())))
    cutoff = metrics[-1].split("@")[1]
    for colour, metric in enumerate(name for name in metrics if name.split("@")[1] == cutoff):
        for which, (style, suffix) in enumerate((("-", ""), ("--", ", seen items masked"))):
            rows, color = (unmasked, masked)[which], f"C{colour}"
            values = [rows[size][metric] for size in sizes]
            axes.plot(x, values, style if are_sizes else "", color=color, marker="o", label=metric + suffix)
            if vectors[which]:
                of_vectors = [vectors[which][size][metric] for size in sizes[:-1]] + values[-1:]
                axes.plot(x, of_vectors, style, color=color, marker="x", alpha=0.5, lw=1)
    if vectors[0]:
        axes.plot([], [], color="gray", marker="x", alpha=0.5, lw=1, label="the same, cut vectors")
    if are_sizes:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("model size (channels kept)")
    axes.set_xticks(x, sizes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{result['split']}, {result['users']:,} users")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
