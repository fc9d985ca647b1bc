"""The page's sections on sizes: which to take, how good, how large, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fmrl_dist.base.pages.bars import stacked_bars
from fmrl_dist.base.pages.charts import (
    BASELINE,
    NETWORK,
    VECTORS,
    Axis,
    Series,
    line_chart,
    ramp,
)
from fmrl_dist.base.pages.markup import Markup, element, joined, paragraph, table
from fmrl_dist.base.pages.numbers import number_of_bytes, percent, three_digits
from fmrl_dist.deploy.report_page.choice import (
    NEARLY,
    BestWithin,
    frontier,
    good_for,
    is_surely_better,
    smallest_keeping,
)
from fmrl_dist.deploy.report_page.latency import BATCH, TOP, Timings
from fmrl_dist.deploy.report_page.measures import Cut, Measures
from fmrl_dist.deploy.report_page.run_facts import PROTOCOL_NAMES, Figures, RunFacts
from fmrl_dist.deploy.report_page.size_costs import FLOAT, SEEN_ITEM_BYTES, SizeCost
from fmrl_dist.deploy.report_page.words import difference, figure, fine_digits, milliseconds, tip
from fmrl_dist.evaluation.results.report import both_protocols
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN
from fmrl_dist.model.stored_tensors import DTYPES

Costs = Mapping[int, SizeCost]
ABOUT_THE_SAME = 1.5  # between the slowest and the fastest


def which_size(facts: RunFacts, measures: Measures, costs: Costs | None, timings: Timings | None) -> Markup:
    """The answers first: the best deployment within each budget, and what each one is good for."""
    width, metric = facts.sizes[-1], f"{measures.metric}, seen items masked"
    legend = paragraph(
        element("b", "network m"),
        ": all weights cut to the first m channels, a complete small model. ",
        element("b", "vectors m"),
        ": the whole network; only the vectors that are compared are rotated and cut to m channels, for an index.",
        class_="note",
    )
    budgets, notes = [], []
    if costs is not None:
        on_device = {cut: float(costs[cut.size].device_bytes) for cut in measures.cuts if not cut.of_vectors}
        in_index = {cut: float(costs[cut.size].item_bytes["float32"]) for cut in measures.cuts}
        title = "By memory: network and item vectors on one device"
        budgets.append(_budget_table(title, frontier(on_device, measures), measures, number_of_bytes))
        title = "By memory of an index: item vectors alone, the network elsewhere"
        budgets.append(_budget_table(title, frontier(in_index, measures), measures, number_of_bytes))
    if timings is not None:
        times = {cut: timings.of_cuts[cut].total_ms[0] for cut in measures.cuts}
        title = f"By time: an event and its exact top {TOP}, one thread of this machine"
        budgets.append(_budget_table(title, frontier(times, measures), measures, milliseconds))
        if max(times.values()) < ABOUT_THE_SAME * min(times.values()):
            notes.append("All deployments take about the same time on a catalogue of this size.")
    if budgets:
        notes.insert(0, "A row holds from its own budget up to the next row's.")
        notes.append(
            f"Best by {metric}. Bytes are those of float32; half and a quarter of them (float16, int8) are below, and "
            "what they lose in quality is measured by the export that makes them."
        )
        budgets.append(element("div", *(paragraph(note) for note in notes), class_="note"))
    rows = [
        (
            name_of(cut, width),
            element("div", good_for(cut, measures, width), class_="words"),
            figure(measures.judged(cut)),
            percent(measures.judged(cut).share),
            difference(measures.judged(cut)),
        )
        for cut in measures.cuts
    ]
    head = ("deployment", "good for", measures.metric, "of the whole", "difference to the whole")
    judged = table(f"What each size is good for ({metric})", head, rows)
    return joined((_summary(measures, width, costs), legend, element("div", *budgets, class_="pair"), judged))


def _summary(measures: Measures, width: int, costs: Costs | None) -> Markup:
    sentences = []
    if (baseline := measures.best_baseline) is not None and not any(
        is_surely_better(c, measures) for c in measures.cuts
    ):
        sentences.append(
            f"No deployment is surely better than the baseline {baseline[0]} ({baseline[1]:.4f}), which needs no "
            "training: train longer, or with other settings, before one is put to work."
        )
    for of_vectors, what, keep in ((False, "network", "keeps"), (True, "item vectors of the whole network", "keep")):
        cut = smallest_keeping(measures, NEARLY, of_vectors)
        if cut is None or cut.size == width:
            if not of_vectors and len(measures.cuts) > 1:
                sentences.append(f"No smaller network keeps {percent(NEARLY)} of the whole one's quality.")
            continue
        share = measures.judged(cut).share
        kept = "all" if share >= 1 else percent(share)
        saved = f" at {percent(cut.size / width)} of the bytes of an item" if costs is not None else ""
        sentences.append(f"The {what} cut to {cut.size} of {width} channels {keep} {kept} of the quality{saved}.")
    if len(measures.cuts) == 1:
        sentences.append("The run has trained one size.")
    return paragraph(" ".join(sentences), class_="lead")


def _budget_table(title: str, steps: Sequence[BestWithin], measures: Measures, shown: Callable[[float], str]) -> Markup:
    rows = [
        (
            shown(step.budget),
            element("b", step.cut.name),
            f"{measures.judged(step.cut).value:.4f}",
            percent(measures.judged(step.cut).share),
        )
        for step in steps
    ]
    return table(title, ("with at least", "take", measures.metric, "of the whole"), rows)


def name_of(cut: Cut, width: int) -> str:
    """A deployment's name among all of a run's."""
    return f"whole network {width}" if cut == Cut(width) else cut.name


def quality(facts: RunFacts, measures: Measures) -> Markup:
    """Figure 3, and every figure."""
    figures = facts.figures
    assert figures is not None
    raw = figures.raw
    lost = f" ({raw['users_lost']:,} more in damaged blocks are not counted)" if "users_lost" in raw else ""
    sure = (
        "Brackets and bars are 95 % intervals from a bootstrap over users: they say nothing of what another seed would "
        "give. Differences are between figures of the same users."
        if facts.ranks is not None
        else "There are no intervals, as the users' ranks are not there."
    )
    rule = paragraph(
        f"Figures of the {raw['split']} split, {raw['split_rule']}, {raw['users']:,} users{lost}; the whole catalogue "
        f"of {raw['items']:,} items is ranked, ties count {raw['ties']}. ",
        sure,
    )
    charts = [
        _against_size(facts.sizes, measures, figures, metric, which)
        for metric in measures.metrics
        for which in (UNSEEN, ALL)
    ]
    legend = [("cut network", "network")]
    legend += [("cut vectors of the whole network", "vectors")] * bool(figures.vectors[ALL])
    legend += [("baselines", "baseline")] * bool(figures.baselines[ALL])
    keys = (element("span", element("i", class_=f"key {kind}"), name) for name, kind in legend)
    caption = f"Figure 3. {' and '.join(measures.metrics)} against size, all sizes of one training run"
    whole = element(
        "figure", element("div", *charts, class_="charts"), element("figcaption", caption, ". ", *keys, class_="legend")
    )
    parts = [rule, whole, _quality_table(measures, figures, facts.sizes[-1])]
    parts.append(_folded("Every metric of evaluation.json", _all_metrics(figures)))
    if segments := _segments(figures, measures.metric):
        parts.append(_folded(f"By segment of the users ({measures.metric})", segments))
    return joined(parts)


def _folded(summary: str, content: Markup) -> Markup:
    return element("details", element("summary", summary), content)


def _against_size(sizes: tuple[int, ...], measures: Measures, figures: Figures, metric: str, which: int) -> Markup:
    series = []
    whole = measures.worth[Cut(sizes[-1]), which, metric]
    for of_vectors, name, colour, style, marker in (
        (False, "cut network", NETWORK, "", "circle"),
        (True, "cut vectors", VECTORS, "dashed", "diamond"),
    ):
        cuts = [cut for cut in measures.cuts if cut.of_vectors == of_vectors]
        worths = [measures.worth[cut, which, metric] for cut in cuts]
        tips = [tip(cut.name, worth) for cut, worth in zip(cuts, worths, strict=True)]
        points = [(float(cut.size), worth.value) for cut, worth in zip(cuts, worths, strict=True)]
        intervals = [(w.estimate.low, w.estimate.high) if w.estimate is not None else None for w in worths]
        if of_vectors and points:
            points.append((float(sizes[-1]), whole.value))
            tips.append(tip(f"whole network {sizes[-1]}", whole))
            intervals.append(None)
        series.append(Series(name, points, colour, style, marker, intervals, tips))
    alone = 0.5 * (len(sizes) == 1)  # room for lines on both sides of a single size
    ends = (sizes[0] - alone, sizes[-1] + alone)
    for name, row in figures.baselines[which].items():
        points = [(end, row[metric]) for end in ends]
        series.append(Series(f"{name}: {row[metric]:.4f}", points, BASELINE, "dotted", label=name))
    title = f"{metric}, {PROTOCOL_NAMES[which]}"
    listed = "; ".join(text for one in series for text in (one.tips or [one.name]))
    ticks = [(float(size), str(size)) for size in _apart(sizes)]
    chart = line_chart(
        f"size-{metric.replace('@', '-')}-{which}",
        title,
        f"{title}, against model size: {listed}.",
        series,
        Axis("model size (channels kept)", ticks, is_log=len(sizes) > 1),
        Axis(from_zero=True),
    )
    return element("div", element("h3", title), chart)


def _apart(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes whose names have room on an axis: at most nine, with the first and the last."""
    every = -(-(len(sizes) - 1) // 8) or 1
    return tuple(size for number, size in enumerate(reversed(sizes)) if number % every == 0)[::-1]


def _quality_table(measures: Measures, figures: Figures, width: int) -> Markup:
    columns = [(metric, which) for metric in measures.metrics for which in (UNSEEN, ALL)]
    rows: list[tuple[str | Markup, ...]] = []
    for cut in measures.cuts:
        rows.append((name_of(cut, width), *(figure(measures.worth[cut, which, metric]) for metric, which in columns)))
    for name in figures.baselines[ALL]:
        cells = (f"{figures.baselines[which][name][metric]:.4f}" for metric, which in columns)
        rows.append((f"baseline: {name}", *cells))
    groups = [(metric, 2) for metric in measures.metrics]
    head = ("", *(PROTOCOL_NAMES[which] for _, which in columns))
    return table("Quality of every size, in both deployments", head, rows, groups)


def _all_metrics(figures: Figures) -> Markup:
    tables = []
    for which in (UNSEEN, ALL):
        rows: list[tuple[str, ...]] = []
        for prefix, of_rows in (
            ("network ", figures.sizes),
            ("vectors ", figures.vectors),
            ("baseline: ", figures.baselines),
        ):
            for name, row in of_rows[which].items():
                rows.append((f"{prefix}{name}", *(f"{row[metric]:.4f}" for metric in figures.metrics)))
        tables.append(table(f"Every metric, {PROTOCOL_NAMES[which]}", ("", *figures.metrics), rows))
    return joined(tables)


def _segments(figures: Figures, metric: str) -> Markup | None:
    """A row for each segment that has users."""
    filled = {name: part for name, part in figures.raw.get("segments", {}).items() if part["users"]}
    if not filled:
        return None
    names = list(figures.sizes[ALL])
    rows = []
    for name, part in filled.items():
        row = both_protocols(part, ("sizes",))[UNSEEN]
        rows.append((name, f"{part['users']:,}", *(f"{row[size][metric]:.4f}" for size in names)))
    head = ("segment", "users", *(f"size {size}" for size in names))
    return table(f"{metric} of the cut network by segment, {PROTOCOL_NAMES[UNSEEN]}", head, rows)


def size_table(costs: Costs, width: int) -> Markup:
    """Parameters and bytes of every size, and Figure 4."""
    rows = []
    for size, cost in costs.items():
        of_types = (number_of_bytes(cost.network_bytes[dtype]) for dtype in DTYPES)
        items = (number_of_bytes(cost.item_bytes[dtype]) for dtype in DTYPES)
        of_user = number_of_bytes(FLOAT * size), number_of_bytes(cost.state_bytes)
        rows.append((str(size), f"{cost.parameters:,}", *of_types, *items, *of_user))
    head = ("size", "trained", *DTYPES, *DTYPES, "one item", "one user")
    groups = [("parameters", 1), ("network", 3), ("all item vectors", 3), ("float32", 2)]
    of_whole = costs[width]
    note = paragraph(
        "Trained parameters include those that embed items (projection, stand-ins, id table). To serve, a device needs "
        f"the network of one event and the item vectors, in the bytes that an export stores, and for each user the "
        f"state of a session, of at most so many bytes and {SEEN_ITEM_BYTES} more for each item seen. "
        f"Of the {of_whole.parameters:,} parameters of the whole, {of_whole.masked:,} are kept at zero by the nesting.",
        class_="note",
    )
    return joined((table("Parameters and bytes of every size", head, rows, groups), note, _against_separate(costs)))


def _against_separate(costs: Costs) -> Markup:
    """Figure 4: one run against a run for each size."""
    sizes = list(costs)
    colours = {size: ramp(number, len(sizes)) for number, size in enumerate(sizes)}
    largest = costs[sizes[-1]]
    all_parameters = sum(cost.parameters for cost in costs.values())
    factor = three_digits(all_parameters / largest.parameters)
    pictures = []
    for name, title, one, each, shown in (
        (
            "parameters",
            "Parameters",
            largest.parameters,
            {s: costs[s].parameters for s in sizes},
            lambda v: f"{v:,.0f}",
        ),
        (
            "optimiser",
            "Optimiser memory",
            largest.moment_bytes,
            {s: costs[s].moment_bytes for s in sizes},
            number_of_bytes,
        ),
    ):
        bars = [
            ("this one run, all sizes", [(f"{sizes[0]}–{sizes[-1]}", float(one), colours[sizes[-1]])]),
            (f"{len(sizes)} separate runs", [(str(s), float(each[s]), colours[s]) for s in reversed(sizes)]),
        ]
        text = f"{title}: one run {shown(one)}; separate runs {shown(sum(each.values()))}."
        pictures.append(element("div", element("h3", title), stacked_bars(f"bars-{name}", title, text, bars, shown)))
    caption = (
        f"Figure 4. One run for all sizes against a separate run for each of them: {factor} times the parameters, and "
        "as many times the optimiser's memory (two float32 moments a parameter). Separate runs can follow one another "
        "in the memory of the largest; then it is their time that adds up."
    )
    return element("figure", element("div", *pictures, class_="charts"), element("figcaption", caption))


def speed(timings: Timings | None, why_not: str, cuts: tuple[Cut, ...], width: int, peak_mb: float | None) -> Markup:
    """Latency and throughput as measured."""
    memory = (
        f"Training took at most {number_of_bytes(1e6 * peak_mb)} of memory in a process, by its own log."
        if peak_mb is not None
        else "What memory training took was not logged."
    )
    if timings is None:
        return joined((paragraph(f"Not measured: {why_not}.", class_="missing"), paragraph(memory)))
    rows = []
    for cut in cuts:
        one = timings.of_cuts[cut]
        pairs = (one.event_ms, one.list_ms, one.total_ms)
        times = (f"{fine_digits(p50)} / {fine_digits(p99)}" for p50, p99 in pairs)
        rows.append((name_of(cut, width), *times, f"{one.events_per_s:,.0f}", f"{one.lists_per_s:,.0f}"))
    head = ("deployment", "event", f"top {TOP}", "both", "events", f"top {TOP} lists")
    groups = [("median / 99th percentile, ms", 3), ("in a second", 2)]
    events = min(one.num_events for one in timings.of_cuts.values())
    note = paragraph(
        f"Measured here: {timings.machine}; beside other work unknown, so take them as a guide. One thread, float32; "
        f"{events:,} events of single users for each deployment, taking turns. An event is what a session computes "
        "after it: a step of the recurrence, or, with another mixer than lru, a pass over the events so far, 25 on "
        f"average. Its list is the exact top {TOP} of all items but those seen. In a second: {BATCH} sessions at once.",
        class_="note",
    )
    return joined((table("Time of every deployment", head, rows, groups), note, paragraph(memory)))
