"""``python -m fmrl_dist.compare RUN RUN …``: figures of several runs side by side, and which differences are sure.

Runs that differ in the seed alone are one model, shown as mean and standard deviation. Every other model is compared
with the first, user by user: the difference, its 95 % interval from a paired bootstrap over users, and an asterisk
where p < 0.05 after Holm's correction for all comparisons of the table. Needs the users' ranks, which
``fmrl_dist.train``, ``fmrl_dist.evaluate`` and ``fmrl_dist.baselines`` keep.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmrl_dist.base.errors import require, run_command
from fmrl_dist.base.files import write_atomically
from fmrl_dist.config.command_line import CommandParser
from fmrl_dist.evaluation.results.comparison import PROTOCOLS, compare, group_models, load_evaluated_run
from fmrl_dist.evaluation.results.user_ranks import VECTORS

METRIC = re.compile(r"(recall|ndcg|mrr)@([1-9][0-9]{0,5})")
SIGNIFICANT = 0.05


def main(argv: list[str]) -> None:
    parser = CommandParser(prog="python -m fmrl_dist.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="runs, exports or baselines; the first is the reference"
    )
    parser.add_argument("--metric", type=metric, default="ndcg@10", help="recall, ndcg or mrr at any k (ndcg@10)")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--samples", type=int, default=10_000, help="of the bootstrap (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--by-history", action="store_true", help="compare the users of each history length, too")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of comparison.json and .png (here)")
    arguments = parser.parse_args(argv)
    require(arguments.samples >= 100, f"--samples is {arguments.samples}; expected at least 100")
    require(arguments.seed >= 0, f"--seed is {arguments.seed}; expected at least 0")
    require(arguments.output.is_dir(), f"--output {arguments.output} is no folder; create it first")

    models = group_models([load_evaluated_run(path, arguments.split) for path in arguments.runs])
    result = compare(models, arguments.metric, arguments.samples, arguments.seed, arguments.by_history)
    json_path, picture_path = (arguments.output / f"comparison.{ending}" for ending in ("json", "png"))
    try:
        print("\n".join(table(result)), flush=True)
    finally:
        write_atomically(json_path, json.dumps(result, indent=1).encode() + b"\n")
        write_atomically(picture_path, draw(result))
    print(f"written: {json_path}\npicture: {picture_path}", flush=True)


def metric(text: str) -> str:
    if not METRIC.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no metric; expected recall, ndcg or mrr at k, such as ndcg@10")
    return text


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """One line per model and size; on the left all items are ranked, on the right unseen ones."""
    first = next(iter(result["models"]))
    yield (
        f"{result['metric']}, {result['split']}, {result['users']:,} users in all runs, whole catalogue ranked "
        f"({result['items']:,} items), {result['split_rule']}, ties count {result['ties']}"
    )
    if fewer := {path: n for path, n in result["users_of_runs"].items() if n != result["users"]}:
        yield "of " + ", ".join(f"{n:,} in {path}" for path, n in fewer.items())
    yield (
        f"± over seeds; difference to {first} with its 95 % interval, paired bootstrap over users "
        f"({result['samples']:,} samples); * p < {SIGNIFICANT} (Holm)"
    )
    baselines = [
        [baseline, *(f"{values[protocol]:.4f}" for protocol in PROTOCOLS.values())]
        for baseline, values in result["baselines"].items()
    ]
    yield from aligned([*cells(result["rows"]), *baselines])
    for length, group in result.get("history", {}).items():
        yield f"histories of {length} events: {group['users']:,} users"
        yield from aligned(cells(group["rows"]))


def cells(rows: list[Mapping[str, Any]]) -> list[list[str]]:
    """A row of the table for each row of the result."""
    return [[name(row), *(figure(row[protocol]) for protocol in PROTOCOLS.values())] for row in rows]


def aligned(rows: list[list[str]]) -> Iterator[str]:
    """The rows as lines, under a heading."""
    rows = [["model and size", "all items ranked", "seen items masked"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def name(row: Mapping[str, Any]) -> str:
    seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
    return f"{row['model']}{seeds} {row['row']}"


def figure(figures: Mapping[str, Any]) -> str:
    spread = figures["std_over_seeds"]
    text = f"{figures['mean']:.4f}" + (f" ±{spread:.4f}" if spread is not None else "")
    if difference := figures.get("difference"):
        star = "*" if difference["p_holm"] < SIGNIFICANT else ""
        text += f"  {difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]{star}"
    return text


def draw(result: Mapping[str, Any]) -> bytes:
    """The plot, as PNG: means with their intervals against size; what has no size is a horizontal line."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    sizes: set[int] = set()
    colour = 0
    for model in result["models"]:
        rows = [row for row in result["rows"] if row["model"] == model]
        for prefix, marker, suffix in (("", "o", ""), (VECTORS, "x", ", cut vectors")):
            sized = [row for row in rows if re.fullmatch(f"{prefix}[0-9]+", row["row"])]
            x = [int(row["row"].removeprefix(prefix)) for row in sized]
            sizes.update(x)
            if not sized:
                continue
            for protocol, style in zip(PROTOCOLS.values(), ("-", "--"), strict=True):
                points = [row[protocol] for row in sized]
                means = [point["mean"] for point in points]
                errors = [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
                label = f"{model}{suffix}, {protocol}"
                axes.errorbar(x, means, errors, fmt=style, color=f"C{colour}", marker=marker, capsize=3, label=label)
        for row in rows:
            if not re.fullmatch(f"({VECTORS})?[0-9]+", row["row"]):
                colour += 1
                for protocol, style in zip(PROTOCOLS.values(), ("-", "--"), strict=True):
                    label = f"{row['row']}, {protocol}"
                    axes.axhline(row[protocol]["mean"], linestyle=style, color=f"C{colour}", label=label, lw=1)
        colour += 1
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("model size (channels kept)")
    axes.set_ylabel(f"{result['metric']}, {result['split']}, {result['users']:,} users")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    run_command(main)
