"""Which size to take: the best within each budget, and what each one is good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmrl_dist.deploy.report_page.measures import Cut, Measures

NEARLY, USEFUL, COARSE = 0.95, 0.8, 0.5  # shares of the whole network's figure


@dataclass(frozen=True)
class BestWithin:
    """From this budget on, up to the next step's, this deployment is the best."""

    budget: float
    cut: Cut


def frontier(costs: Mapping[Cut, float], measures: Measures) -> list[BestWithin]:
    """The best deployment within every budget, by increasing budget.

    Args:
        costs: of each deployment that is considered.
        measures: what they are worth.
    """
    steps: list[BestWithin] = []
    best = -1.0
    for cut, cost in sorted(costs.items(), key=lambda item: (item[1], -measures.judged(item[0]).value)):
        value = measures.judged(cut).value
        if value > best:
            best = value
            steps.append(BestWithin(cost, cut))
    return steps


def smallest_keeping(measures: Measures, share: float, of_vectors: bool) -> Cut | None:
    """The smallest deployment of a kind that keeps a share of the whole network's figure; None if there is none."""
    kept = [c for c in measures.cuts if c.of_vectors == of_vectors and measures.judged(c).share >= share]
    return min(kept, key=lambda cut: cut.size, default=None)


def is_surely_better(cut: Cut, measures: Measures) -> bool:
    """Whether even the low end of a deployment's interval is above the best baseline."""
    worth, baseline = measures.judged(cut), measures.best_baseline
    return baseline is None or (worth.value if worth.estimate is None else worth.estimate.low) > baseline[1]


def good_for(cut: Cut, measures: Measures, width: int) -> str:
    """What a deployment is good for, judged by its figure alone."""
    worth, baseline = measures.judged(cut), measures.best_baseline
    if baseline is not None and not is_surely_better(cut, measures):
        return f"not better than the baseline {baseline[0]} for sure: rather deploy that"
    if cut == Cut(width):
        return "the whole network: final ranking, where it fits"
    if worth.difference is not None and worth.difference.low > 0:
        return "better than the whole network on these users"
    if worth.difference is not None and worth.difference.high >= 0:
        kind = "a retrieval index" if cut.of_vectors else "phone, service or ranker"
        return f"no difference to the whole network that is sure: {kind}"
    if worth.share >= NEARLY:
        return "nearly the whole network: " + ("a retrieval index" if cut.of_vectors else "phone, service or ranker")
    if worth.share >= USEFUL:
        return "a retrieval index that a larger size re-ranks" if cut.of_vectors else "a phone or a busy service"
    if worth.share >= COARSE:
        return "a first shortlist that a larger size re-ranks" + ("" if cut.of_vectors else "; very small devices")
    return "only a coarse first shortlist"
