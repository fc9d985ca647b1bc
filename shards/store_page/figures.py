"""The page's charts: history lengths, popularity, events over time, coverage of features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fmrl_dist.base.pages.bars import Column, column_chart, stacked_bars
from fmrl_dist.base.pages.charts import BASELINE, NETWORK, VECTORS, Axis, Series, line_chart
from fmrl_dist.base.pages.markup import Markup, element, facts, joined, paragraph, table
from fmrl_dist.base.pages.numbers import number_of_bytes
from fmrl_dist.data.store.manifest import SPLITS, Manifest
from shards.store_page.survey import MOST_TIME_BINS, Survey, TimeBins
from shards.store_page.words import ShownItems, is_unix, shown_time

GREEN = ("#1a7f4b", "#63d19c")
COLOURS = {"train": NETWORK, "valid": VECTORS, "test": GREEN}
SPLIT_WORDS = {"train": "train", "valid": "validation", "test": "test"}
MOST_TICKS = 8
POPULARITY_POINTS = 200


def split_table(manifest: Manifest, found: Survey) -> Markup:
    """Sizes of the splits, and how long their histories are."""
    rows = []
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.name.startswith(f"{split}-")]
        counts = found.splits[split]
        numbers = [counts.users, counts.events, counts.quantile(0.5), counts.quantile(0.9), counts.longest, len(shards)]
        size = number_of_bytes(sum(shard.num_bytes for shard in shards))
        rows.append([SPLIT_WORDS[split], *(f"{number:,}" for number in numbers), size])
    head = ["split", "users", "events", "median length", "90 % have at most", "longest", "shards", "size"]
    note = paragraph(
        "The last event of a validation or test history is its target; what precedes it is what a model sees. The "
        "splits of one user overlap: events of train stand in validation and test again.",
        class_="note",
    )
    return joined((table("Histories of each split", head, rows), note))


def lengths(found: Survey) -> Markup:
    """A histogram of each split, all over the same logarithmic axis."""
    longest = max(counts.longest for counts in found.splits.values())
    edges = length_edges(longest)
    by_split = {split: _binned(found.splits[split].lengths, edges) for split in SPLITS}
    first = min((int(np.flatnonzero(counts)[0]) for counts in by_split.values() if counts.any()), default=0)
    edges = edges[first:]
    step = -(-(len(edges) - 1) // MOST_TICKS)
    ticks = [(place, f"{edges[place]}") for place in range(0, len(edges) - 1, step)]
    highest = float(max(counts.max() for counts in by_split.values()))
    charts = []
    for split, counts in by_split.items():
        columns = [
            Column(f"{_run(low, high)} events: {count:,} users", [count])
            for (low, high), count in zip(pairwise(edges), counts[first:].tolist(), strict=True)
        ]
        title = f"Length of {SPLIT_WORDS[split]} histories"
        of_split = found.splits[split]
        words = f"{of_split.users:,} users; half have at most {of_split.quantile(0.5):,} events, the longest history "
        words += f"{of_split.longest:,}."
        label = "events (log scale); height: users"
        chart = column_chart(f"lengths-{split}", title, words, columns, [COLOURS[split]], label, ticks, highest)
        charts.append(element("div", element("h3", title), chart))
    return element("div", *charts, class_="thirds")


def length_edges(longest: int) -> list[int]:
    """First lengths of bins, each about √2 times the one before, up to one above ``longest``.

    >>> length_edges(9)
    [1, 2, 3, 4, 6, 8, 11]
    """
    edges, power = [1], 2
    while edges[-1] <= longest:
        edges.append(max(round(2 ** (power / 2)), edges[-1] + 1))
        power += 1
    return edges


def _binned(counts: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Sums of ``counts`` by length over bins; what is longer than is told apart stands in the last."""
    total = np.concatenate(([0], np.cumsum(counts)))
    return np.diff(total[np.minimum(edges, len(total) - 1)])


def _run(low: int, high: int) -> str:
    return f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"


def popularity(items: ShownItems) -> Markup:
    """How often each item occurs in training, the most frequent first; both axes logarithmic."""
    counts = items.vocabulary["train_count"].to_numpy()
    sorted_counts = np.sort(counts)[::-1]
    num_seen, num_events = int((counts > 0).sum()), int(counts.sum())
    if not num_seen:
        return paragraph("No item occurs in training.", class_="missing")
    ranks = np.unique(np.geomspace(1, num_seen, POPULARITY_POINTS).round().astype(np.int64))
    points = [(float(rank), float(sorted_counts[rank - 1])) for rank in ranks]
    shares = {
        share: sorted_counts[: max(1, round(share * len(counts)))].sum() / max(num_events, 1) for share in (0.01, 0.1)
    }
    top = int(counts.argmax())
    words = f"From {points[0][1]:,.0f} events of the most frequent item to {points[-1][1]:,.0f}."
    line = Series("events", points, NETWORK)
    x, y = Axis("rank of the item (log scale)", is_log=True), Axis(is_log=True)
    title = "Training events of each item (log scale)"
    chart = line_chart("popularity", title, words, [line], x, y)
    listed = facts(
        [
            ("most frequent", f"{items.title(top)}, {counts[top]:,} events"),
            ("events of the most frequent 1 % of items", f"{100 * shares[0.01]:.1f} %"),
            ("events of the most frequent 10 %", f"{100 * shares[0.1]:.1f} %"),
            ("items that training never sees", f"{len(counts) - num_seen:,} of {len(counts):,}"),
        ]
    )
    return element("div", element("div", element("h3", title), chart), element("div", listed), class_="pair")


def over_time(times: TimeBins | None) -> Markup:
    """Events by time, those that only validation or test have upon those of train."""
    if times is None or not times.counts:
        return paragraph("The store has no times: data.sequences.times was not set when it was built.", class_="note")
    first, last = min(times.counts), max(times.counts)
    span = times.high - times.low
    columns = []
    for number in range(first, last + 1):
        counts = times.counts.get(number, np.zeros(len(SPLITS), np.int64)).tolist()
        when = shown_time(number * times.width, times.high, min(span, times.width * 30))
        parts = ", ".join(f"{count:,} {SPLIT_WORDS[split]}" for split, count in zip(SPLITS, counts, strict=True))
        columns.append(Column(f"from {when}: {parts}", counts))
    step = max(1, -(-len(columns) // 5))
    ticks = [
        (place, shown_time((first + place) * times.width, times.high, span)) for place in range(0, len(columns), step)
    ]
    begin, end = (shown_time(time, times.high, 30 * 86_400) for time in (times.low, times.high))
    title = "Events over time"
    label = "date (UTC)" if is_unix(times.high) else "time, as in the raw table"
    words = f"From {begin} to {end}."
    chart = column_chart("times", title, words, columns, [COLOURS[split] for split in SPLITS], label, ticks)
    legend = element("p", *(swatch(split, f"{SPLIT_WORDS[split]}{TARGETS[split]}") for split in SPLITS))
    about = f"{words} Events of one column lie within {_width(times)}; there are at most {MOST_TIME_BINS} columns."
    return element(
        "div", element("div", element("h3", title), chart), element("div", legend, paragraph(about)), class_="pair"
    )


TARGETS = {"train": " events", "valid": " targets", "test": " targets"}


def _width(times: TimeBins) -> str:
    if not is_unix(times.high):
        return f"{times.width:,} units"
    days = times.width / 86_400
    return f"{days:,.1f} days" if days >= 1 else f"{times.width:,} seconds"


def swatch(kind: str, words: str) -> Markup:
    """An entry of a legend."""
    return element("span", element("span", class_=f"swatch {kind}"), words, class_="entry")


def coverage(manifest: Manifest) -> Markup:
    """How many items have each feature, and what made it."""
    if not manifest.features:
        return paragraph("The store has no item features: train with model.id_table.", class_="note")
    bars, rows = [], []
    for one in manifest.features:
        absent = manifest.num_items - one.present
        share = f"{100 * one.present / manifest.num_items:.1f} %"
        parts = [("have it", one.present, NETWORK), ("lack it", absent, BASELINE)]
        bars.append((f"{one.name}: {share}", [part for part in parts if part[1]]))
        rows.append(
            [one.name, f"{one.dim:,}", f"{one.present:,}", f"{absent:,}", share, one.encoder, one.revision[:24]]
        )
    title = "Items that have each feature"
    words = "; ".join(name for name, _ in bars)
    chart = stacked_bars("coverage", title, words, bars, lambda value: f"{value:,.0f} items", with_total=False)
    head = ["feature", "channels", "items with it", "without", "share", "made by", "revision"]
    figure = element("div", element("h3", title), chart, class_="narrow")
    return joined((figure, table("Item features", head, rows)))
