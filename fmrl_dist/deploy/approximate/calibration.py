"""Which prefix and which margins a funnel needs for a wanted recall, measured on outputs of users.

Half of the outputs choose. For every item of their exact lists, the margin is known that would have let it into the
shortlist; the margin that is taken covers all but a share of what the recall leaves. Of all widths, the one is taken
that costs least by :func:`_expected_cost_ns`. The other half checks: lists of the funnel against exact ones, with
filters too. Of the lengths of lists whose recall is too low there, margins are widened, and it is checked again.

n outputs, V items, W channels of vectors, m of a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fmrl_dist.deploy.approximate.funnel import FunnelSearch, Margins, is_small
from fmrl_dist.deploy.approximate.int8_prefix import BLOCK_ITEMS, Int8Prefix, RotatedInt8
from fmrl_dist.deploy.approximate.recall import (
    SEED,
    ExactLists,
    check_found,
    check_recall,
    halves,
    measured_recalls,
    too_low,
    vectors_sha256,
    with_spare,
)
from fmrl_dist.model.rotation import learn_rotation

MAX_WIDENINGS = 40
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the channels: prefixes to choose from
PROBES = 128  # outputs whose shortlists are counted
ROTATION_ITEMS = 8192  # that a rotation is learned from
# What a user's list costs among 64, as measured on one core of an EPYC with AVX-512; they only choose a width.
SCAN_NS, SCAN_NS_PER_CHANNEL = 0.2, 0.0075  # of each item
ITEM_NS, ITEM_NS_PER_CHANNEL = 50, 1  # of each item of the shortlist
BLOCK_NS_PER_CHANNEL = 0.05  # of each item of its blocks


@dataclass(frozen=True)
class FunnelRecord:
    """What was chosen, and what was measured."""

    recall: float  # wanted
    width: int  # channels of the prefix
    channels: int  # W
    margins: Margins
    widenings: int  # of the margins, before held-out outputs had the wanted recall
    choosing_outputs: int
    held_out_outputs: int
    held_out_recall: dict[str, dict[str, float]]  # by filter and length of the list
    shortlist_mean: float  # of held-out outputs, lists of ten: items that are ranked by whole vectors
    shortlist_p99: float
    vectors_sha256: str


def calibrated_funnel(
    vectors: np.ndarray, outputs: np.ndarray, recall: float = 0.99, rotation: np.ndarray | None = None
) -> tuple[FunnelSearch, FunnelRecord]:
    """A funnel for a wanted recall of exact lists, and its record.

    Args:
        vectors: of all items, float32 [V, W].
        outputs: of histories like those that will be asked for, float32 [n, W].
        recall: above 0, below 1.
        rotation: orthogonal, float32 [W, W]; None to learn one from half of the outputs.

    Raises:
        UserError: ``recall`` is no such number, or there are too few outputs.
    """
    check_recall(recall)
    choosing, checking = halves(outputs)
    candidates = widths(vectors.shape[1])
    if is_small(len(vectors)):  # nothing will be asked of the prefix
        candidates, rotation = candidates[:1], np.eye(vectors.shape[1], dtype=np.float32)
    if rotation is None:
        rotation = _learned_rotation(vectors, choosing)
    rotated, chosen = RotatedInt8.of_vectors(vectors, rotation), ExactLists.of(vectors, choosing)
    funnels = [
        FunnelSearch(vectors, rotation, Int8Prefix.of_rotated(rotated, width), Margins((1,), (0.0,)))
        for width in candidates
    ]
    funnel = min(funnels, key=lambda funnel: _expected_cost_ns(funnel, chosen.first(PROBES), recall))
    funnel.margins = _margins(funnel, chosen, chosen.cutoffs, recall)
    held_out = ExactLists.of(vectors, checking)
    widenings, recalls = 0, measured_recalls(funnel.top_k, held_out)
    while (lengths := too_low(recalls, recall, len(checking))) and widenings < MAX_WIDENINGS:
        widenings, funnel.margins = widenings + 1, funnel.margins.widened(lengths)
        recalls = measured_recalls(funnel.top_k, held_out)
    check_found(recalls, recall, len(checking))
    shortlists = funnel.shortlist_lengths(checking, held_out.cutoffs[:2][-1])
    record = FunnelRecord(
        recall=recall,
        width=funnel.prefix.width,
        channels=vectors.shape[1],
        margins=funnel.margins,
        widenings=widenings,
        choosing_outputs=len(choosing),
        held_out_outputs=len(checking),
        held_out_recall=recalls,
        shortlist_mean=float(shortlists.mean()),
        shortlist_p99=float(np.quantile(shortlists, 0.99)),
        vectors_sha256=vectors_sha256(vectors),
    )
    return funnel, record


def widths(channels: int) -> list[int]:
    """Widths of prefixes to choose from, multiples of eight and the whole."""
    return sorted({min(channels, max(8, round(share * channels / 8) * 8)) for share in SHARES})


def _learned_rotation(vectors: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    channels = vectors.shape[1]
    sizes = [width for width in widths(channels) if width < channels]
    if not sizes:
        return np.eye(channels, dtype=np.float32)
    rows = np.random.default_rng(SEED).permutation(len(vectors))[:ROTATION_ITEMS]
    return learn_rotation(torch.from_numpy(outputs), torch.from_numpy(vectors[np.sort(rows)]), sizes).numpy()


def _margins(funnel: FunnelSearch, exact: ExactLists, cutoffs: tuple[int, ...], recall: float) -> Margins:
    """Margins that cover all items of the exact lists but a share of what the recall leaves."""
    needed = [funnel.needed_margins(exact.outputs, exact.rows[:, :k]) for k in cutoffs]
    quantiles = [float(np.quantile(margins, with_spare(recall), method="higher")) for margins in needed]
    return Margins(cutoffs, tuple(max(0.0, quantile) for quantile in quantiles))


def _expected_cost_ns(funnel: FunnelSearch, exact: ExactLists, recall: float) -> float:
    """About what a list of ten costs among a batch of outputs: the scan, and the ranking of the shortlists."""
    width, channels, k = funnel.prefix.width, funnel.vectors.shape[1], exact.cutoffs[:2][-1]
    margin = _margins(funnel, exact, (k,), recall).values[0]
    funnel.margins = Margins((1,), (margin,))
    scan = len(funnel.vectors) * (SCAN_NS + SCAN_NS_PER_CHANNEL * width)
    item = ITEM_NS + ITEM_NS_PER_CHANNEL * channels + BLOCK_ITEMS * BLOCK_NS_PER_CHANNEL * width
    return scan + item * float(funnel.shortlist_lengths(exact.outputs, k).mean())
