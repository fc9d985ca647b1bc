"""``docs/paper-table.md`` and its picture, from the evaluations of the rows that are finished."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.published import MASKED, TABLE_2
from benchmarks.paper.rows import Row

METRICS = ("ndcg@10", "recall@10")
LABELS = {"ndcg@10": "NDCG@10", "recall@10": "Recall@10"}
BASELINES = ("popularity", "item_knn", "cosine")
Evaluations = Mapping[Row, dict[str, Any]]
HEAD = """# The paper's table, measured

`make paper` wrote this page: the rows of the paper's table 2 that data at hand allow, ours and the rivals', each by its
configuration, each a Matryoshka model with every size from one run. Leave-one-out, the whole catalogue ranked for every
user, ties counting half; epoch chosen on validation by the mean of all sizes. "Published" are the figures of the paper
(all items) or of the model's own paper (seen items masked). [mixers.md](mixers.md) says how the rivals here differ from
the published ones.
"""


def table_text(evaluations: Evaluations, settings: Mapping[Row, Mapping[str, str]], further: Sequence[str]) -> str:
    """The page.

    Args:
        evaluations: of the finished rows, in their order.
        settings: what each was measured with, by name.
        further: words that every row was given beside its configuration.
    """
    parts = [HEAD, _settings_text(settings)]
    if further:
        parts.append(f"Further settings of every row: `{shlex.join(further)}`\n")
    for of_set in dict.fromkeys(row.of_set for row in evaluations):
        rows = {row: evaluation for row, evaluation in evaluations.items() if row.of_set == of_set}
        parts.append(f"## {of_set.capitalize()}\n")
        for metric in METRICS:
            parts.append(_table(of_set, rows, metric))
        parts.append(f"![NDCG@10 against size](paper-table-{of_set}.png)\n")
    return "\n".join(parts)


def _settings_text(settings: Mapping[Row, Mapping[str, str]]) -> str:
    """A line per setting, with the rows it is of; only one where all rows have the same."""
    rows_of: dict[str, list[str]] = {}
    for row, setting in settings.items():
        rows_of.setdefault("; ".join(f"{name} {value}" for name, value in setting.items()), []).append(row.name)
    if len(rows_of) == 1:
        return f"Measured with {next(iter(rows_of))}.\n"
    return "\n".join(f"- {', '.join(names)}: {text}" for text, names in rows_of.items()) + "\n"


def _table(of_set: str, rows: Evaluations, metric: str) -> str:
    sizes = sorted({size for evaluation in rows.values() for size in evaluation["sizes"]}, key=int)
    lines = [
        f"{LABELS[metric]}, seen items masked &#124; all items ranked\n",
        f"| | {' | '.join(sizes)} | published, masked | published, all items |",
        f"|---|{'---:|' * (len(sizes) + 2)}",
    ]
    for row, evaluation in rows.items():
        masked, unmasked = evaluation["masked"]["sizes"], evaluation["sizes"]
        cells = [_pair(masked.get(size), unmasked.get(size), metric) for size in sizes]
        published = [_published(table, of_set, row.model, metric) for table in (MASKED, TABLE_2)]
        lines.append(f"| {row.model} | {' | '.join(cells)} | {' | '.join(published)} |")
    one = next(iter(rows.values()))
    for name in BASELINES:
        pair = _pair(one["masked"]["baselines"].get(name), one["baselines"].get(name), metric)
        if pair:
            lines.append(f"| {name.replace('_', '-')} | {' | '.join([pair] + [''] * (len(sizes) - 1))} | | |")
    return "\n".join(lines) + "\n"


def _pair(masked: Mapping[str, float] | None, unmasked: Mapping[str, float] | None, metric: str) -> str:
    return f"{masked[metric]:.4f} &#124; {unmasked[metric]:.4f}" if masked and unmasked else ""


def _published(table: Mapping[str, Mapping[str, tuple[float, float]]], of_set: str, model: str, metric: str) -> str:
    figures = table[of_set].get(model)
    return f"{figures[METRICS.index(metric)]:.4f}" if figures else ""


def draw(evaluations: Evaluations, folder: Path) -> None:
    """One picture per set: NDCG@10 against size, seen items masked."""
    from matplotlib.figure import Figure

    for of_set in dict.fromkeys(row.of_set for row in evaluations):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for row, evaluation in evaluations.items():
            if row.of_set == of_set:
                points = {int(s): values["ndcg@10"] for s, values in evaluation["masked"]["sizes"].items()}
                style = "-" if row.model.startswith("ours") else "--"
                axes.plot(list(points), list(points.values()), style, marker="o", label=row.model)
        axes.set_xscale("log", base=2)
        ticks = sorted({int(s) for row, e in evaluations.items() if row.of_set == of_set for s in e["sizes"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("size: channels of the model, and of its item vectors")
        axes.set_ylabel("NDCG@10, seen items masked")
        axes.set_title(f"{of_set.capitalize()}: every size of each model from one run")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"paper-table-{of_set}.png", dpi=110)
