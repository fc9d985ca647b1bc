"""One evaluation by all ranks, each of which ranks for its own users; a signal ends it on all of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fmrl_dist.catalogue import Catalogue
from fmrl_dist.data.histories import RankingBlock
from fmrl_dist.evaluation import rank_histograms
from fmrl_dist.model import FMRLRec
from fmrl_dist.runtime import Runtime
from fmrl_dist.signals import StopRequest


def count_together(
    runtime: Runtime,
    model: FMRLRec,
    catalogue: Catalogue,
    blocks: Iterable[RankingBlock],
    mask_seen: bool,
    normalize: bool,
    stop: StopRequest | None = None,
) -> Tensor:
    """:func:`rank_histograms` of every rank's blocks, added up, on each of them.

    Raises:
        Stopped: on all ranks; some of them was told to ``stop`` before it was done.
    """
    stop = stop or StopRequest()
    histograms = rank_histograms(model, catalogue, blocks, mask_seen, normalize, stop.until_told)
    stop.raise_together(runtime, stop.cut_short)
    return runtime.sum(histograms)
