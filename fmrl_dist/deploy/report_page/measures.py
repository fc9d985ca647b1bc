"""What each deployment of a run is worth: its figures, how sure they are, and what is kept of the largest size's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmrl_dist.base.errors import UserError, require
from fmrl_dist.deploy.report_page.run_facts import Figures, RunFacts
from fmrl_dist.evaluation.metrics import metric_of_users
from fmrl_dist.evaluation.results.bootstrap import Estimate, bootstrap
from fmrl_dist.evaluation.results.user_ranks import VECTORS, UserRanks
from fmrl_dist.evaluation.target_ranks import ALL, UNSEEN

SAMPLES = 2000  # of the bootstrap
ROUNDING = 1e-9  # by which two sums of the same numbers may differ


@dataclass(frozen=True)
class Cut:
    """One way to deploy a run: the network cut to a size, or the whole network and its vectors cut to it."""

    size: int
    of_vectors: bool = False

    @property
    def row(self) -> str:
        """Its name in a file of users' ranks."""
        return f"{VECTORS}{self.size}" if self.of_vectors else str(self.size)

    @property
    def name(self) -> str:
        return f"vectors {self.size}" if self.of_vectors else f"network {self.size}"


def cuts_of(sizes: tuple[int, ...], with_vectors: bool = True) -> list[Cut]:
    """Every way to deploy a run; vectors of the full width are those of the whole network."""
    return [Cut(size) for size in sizes] + [Cut(size, True) for size in sizes[:-1] if with_vectors]


@dataclass(frozen=True)
class Worth:
    """One figure, a mean over users."""

    value: float
    share: float  # of the whole network's; 0 if that is 0
    estimate: Estimate | None = None  # with its interval; None without the users' ranks
    difference: Estimate | None = None  # to the whole network, of the same users; None for the whole network itself


@dataclass(frozen=True)
class Measures:
    """Figures of every deployment."""

    metric: str  # that deployments are judged by
    metrics: tuple[str, ...]  # that are shown with intervals: that one, and another of the same cut-off
    worth: Mapping[tuple[Cut, int, str], Worth]  # (deployment, ALL or UNSEEN, metric)
    cuts: tuple[Cut, ...]
    best_baseline: tuple[str, float] | None  # name, and its figure of ``metric``, seen items masked

    def judged(self, cut: Cut) -> Worth:
        """What a deployment is judged by: seen items are masked, as nobody recommends them again."""
        return self.worth[cut, UNSEEN, self.metric]


def measure(facts: RunFacts) -> Measures | None:
    """Figures of a run with their intervals; None if there are no figures. Adds to ``facts.missing``."""
    figures = facts.figures
    if figures is None:
        return None
    metrics = _shown_metrics(facts.config.eval.metric, figures)
    cuts = tuple(cuts_of(facts.sizes, bool(figures.vectors[ALL])))
    ranks = facts.ranks
    worth: dict[tuple[Cut, int, str], Worth] = {}
    try:
        worth = {key: _worth(figures, ranks, key, facts.sizes[-1]) for key in _keys(cuts, metrics)}
    except UserError as error:
        facts.missing.append(f"no intervals: {error}; evaluate again")
        worth = {key: _worth(figures, None, key, facts.sizes[-1]) for key in _keys(cuts, metrics)}
    baselines = {name: row[metrics[0]] for name, row in figures.baselines[UNSEEN].items()}
    best = max(baselines.items(), key=lambda item: item[1], default=None)
    return Measures(metrics[0], metrics, worth, cuts, best)


def _keys(cuts: tuple[Cut, ...], metrics: tuple[str, ...]) -> list[tuple[Cut, int, str]]:
    return [(cut, which, metric) for cut in cuts for which in (UNSEEN, ALL) for metric in metrics]


def _shown_metrics(chosen: str, figures: Figures) -> tuple[str, ...]:
    """The metric that chose the checkpoint, if there are figures of it, and another one of the same cut-off."""
    known = figures.metrics
    ndcgs = [metric for metric in known if metric.startswith("ndcg@")]
    first = chosen if chosen in known else (ndcgs or known)[-1]
    others = [m for m in known if m != first and m.split("@")[1] == first.split("@")[1]]
    preferred = [m for m in others if m.startswith("recall@")] or others
    return (first, *preferred[:1])


def _worth(figures: Figures, ranks: UserRanks | None, key: tuple[Cut, int, str], width: int) -> Worth:
    """A figure, with intervals if there are ranks.

    Raises:
        UserError: the ranks do not have this figure as their mean.
    """
    cut, which, metric = key
    rows = (figures.vectors if cut.of_vectors else figures.sizes)[which]
    value, whole = rows[str(cut.size)][metric], figures.sizes[which][str(width)][metric]
    share = value / whole if whole else 0.0
    if ranks is None or not len(ranks.lengths):
        return Worth(value, share)
    seed = [which, cut.size, cut.of_vectors, *metric.encode()]
    of_users = metric_of_users(ranks.ranks[which, cut.row], metric)
    estimate = bootstrap(of_users, SAMPLES, seed)
    require(
        abs(estimate.mean - value) < ROUNDING,
        f"the users' ranks give {metric} {estimate.mean:.6f} for {cut.name}, evaluation.json {value:.6f}",
    )
    difference = None
    if cut != Cut(width):
        difference = bootstrap(of_users - metric_of_users(ranks.ranks[which, str(width)], metric), SAMPLES, seed)
    return Worth(value, share, estimate, difference)
