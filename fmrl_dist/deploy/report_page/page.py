"""The whole page, from a run's folder and a measurement on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmrl_dist.base.errors import UserError, one_line
from fmrl_dist.base.files import write_atomically
from fmrl_dist.base.pages.document import Heading, Section, document
from fmrl_dist.base.pages.markup import Markup, element, paragraph
from fmrl_dist.base.pages.numbers import number_of_bytes
from fmrl_dist.checkpoint.run_folder import REPORT_FILE
from fmrl_dist.data.store.reader import Store
from fmrl_dist.deploy.report_page import run_sections, worth_sections
from fmrl_dist.deploy.report_page.latency import Timings, time_cuts
from fmrl_dist.deploy.report_page.measures import Cut, Measures, cuts_of, measure
from fmrl_dist.deploy.report_page.run_facts import RunFacts, read_run
from fmrl_dist.deploy.report_page.size_costs import SizeCost, size_costs

NOT_WANTED = "it was left out; python -m fmrl_dist.report measures it"
FINAL_SHARE, FINAL_MOST_S, FINAL_LEAST_S = 0.03, 1.5, 0.3  # of what training took; below the least, no measurement


@dataclass(frozen=True)
class WrittenPage:
    """What was written."""

    path: Path
    state: str  # of the run
    missing: tuple[str, ...]


def write_page(
    folder: Path, output: Path | None = None, timing_s: float = 0.0, store: Store | str | None = None
) -> WrittenPage:
    """Write the page about a run.

    Args:
        folder: of the run.
        output: file to write; ``report.html`` in the run by default.
        timing_s: seconds that the measurement of latency may take; 0 leaves it out.
        store: of the run's catalogue, opened or its location; None for the recorded one.

    Raises:
        UserError: the folder is not a run's, or the file cannot be written.
    """
    run = read_run(folder, store)
    measures = measure(run)
    costs, timings, why_not = None, None, NOT_WANTED
    if run.checkpoint is not None:
        costs = size_costs(
            run.config.model, run.checkpoint.features, run.checkpoint.num_items, run.config.data.max_length
        )
        if timing_s > 0:
            cuts = measures.cuts if measures is not None else cuts_of(run.sizes)
            try:
                timings = time_cuts(run.checkpoint, run.config, run.store, cuts, timing_s)
            except UserError as error:
                why_not = str(error)
                run.missing.append(f"no latency: {error}")
    else:
        why_not = "there is no checkpoint"
    path = output or folder / REPORT_FILE
    write_atomically(path, page(run, measures, costs, timings, why_not).encode())
    return WrittenPage(path, run.state, tuple(run.missing))


def write_final_page(folder: Path, store: Store, took_s: float) -> None:
    """Write the page at the end of training, and print its path. Whatever fails, the run is finished: it is a warning.

    Latency is measured for a short time, little beside what training took.

    Args:
        folder: of the run.
        store: that it was trained on.
        took_s: seconds that training took in this process.
    """
    timing_s = min(FINAL_SHARE * took_s, FINAL_MOST_S)
    try:
        path = write_page(folder, None, timing_s if timing_s >= FINAL_LEAST_S else 0.0, store).path
    except Exception as error:  # of any kind: the figures are there, and the page can be made again
        problem = f"{type(error).__name__}: {error}"
        mend = f"python -m fmrl_dist.report {folder} tries again"
        print(one_line(f"warning: no report was written ({problem}); {mend}"), end="", flush=True)
        return
    print(f"report: {path}", flush=True)


def page(
    run: RunFacts,
    measures: Measures | None,
    costs: dict[int, SizeCost] | None,
    timings: Timings | None,
    why_not_timed: str,
) -> Markup:
    """The HTML."""
    name = run.folder.resolve().name
    no_figures = paragraph("There are no figures yet: see what is missing, below.", class_="missing")
    width = run.sizes[-1]
    cuts = measures.cuts if measures is not None else tuple(cuts_of(run.sizes))
    sections = [
        Section(
            "choose",
            "Which size do I need?",
            no_figures if measures is None else worth_sections.which_size(run, measures, costs, timings),
        ),
        Section(
            "quality",
            "How good is each size?",
            no_figures if measures is None else worth_sections.quality(run, measures),
        ),
        Section(
            "bytes",
            "How large is each size?",
            paragraph("Not known without a checkpoint.", class_="missing")
            if costs is None
            else worth_sections.size_table(costs, width),
        ),
        Section(
            "speed", "How fast is each size?", worth_sections.speed(timings, why_not_timed, cuts, width, run.peak_mb)
        ),
        Section("training", "How did training go?", run_sections.curves(run)),
        Section("data", "Data", run_sections.data(run)),
        Section("settings", "Settings", run_sections.settings(run.config)),
        Section("origin", "Where this came from", run_sections.provenance(run)),
    ]
    if run.missing:
        lines = element("ul", *(element("li", line) for line in run.missing))
        sections.append(Section("missing", "What is missing", lines))
    return document(f"{name}: report of the run", _heading(name, run, measures, costs), sections)


def _heading(name: str, run: RunFacts, measures: Measures | None, costs: dict[int, SizeCost] | None) -> Heading:
    width = run.sizes[-1]
    tiles: list[tuple[str, str | Markup]] = [("sizes from one run", " · ".join(map(str, run.sizes)))]
    if measures is not None:
        tiles.append(
            (f"{measures.metric}, whole network, seen items masked", f"{measures.judged(Cut(width)).value:.4f}")
        )
        if measures.best_baseline is not None:
            tiles.append((f"best baseline, {measures.best_baseline[0]}", f"{measures.best_baseline[1]:.4f}"))
    if costs is not None:
        ends = [number_of_bytes(costs[size].device_bytes) for size in dict.fromkeys((run.sizes[0], width))]
        tiles.append(("network and item vectors, float32", " … ".join(ends)))
    state = element("p", run.state, class_="state" if run.state.startswith("finished") else "state unfinished")
    return Heading("fmrl-dist · one training run, every size", name, state, tiles)
