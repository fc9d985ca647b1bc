"""The recall of a search: its lists against exact ones, without a filter and with filters.

n outputs, V items, W channels of vectors, d the length of the exact lists.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fmrl_dist.base.errors import require
from fmrl_dist.deploy.retrieval import Search, top_k

CUTOFFS = (1, 10, 100)  # lengths of lists that are measured
DEPTH = 250  # of exact lists: what filters leave is taken from them
EXCLUDED = 100  # of each user's best items
ALLOWED_SHARES = (1 / 2, 1 / 8)  # of the catalogue
NO_FILTERS = ("none", f"best {EXCLUDED} excluded")  # names of what leaves all items of the catalogue to others
MIN_OUTPUTS = 200
SPARED = 0.25  # of the misses that a recall allows: what chooses is held to fewer
ROUNDING = 3e-6  # of the largest score: a search may round otherwise than the exact one
SEED = 0


@dataclass(frozen=True)
class ExactLists:
    """Outputs and their exact lists."""

    outputs: np.ndarray  # float32 [n, W]
    rows: np.ndarray  # int64 [n, d], the best first
    scores: np.ndarray  # float32 [n, d]
    num_items: int

    @classmethod
    def of(cls, vectors: np.ndarray, outputs: np.ndarray) -> ExactLists:
        """For item vectors float32 [V, W]."""
        return cls(outputs, *top_k(vectors, outputs, min(DEPTH, len(vectors))), len(vectors))

    def first(self, number: int) -> ExactLists:
        """Those of the first few outputs."""
        return replace(self, outputs=self.outputs[:number], rows=self.rows[:number], scores=self.scores[:number])

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Lengths of lists that can be measured."""
        return tuple(k for k in CUTOFFS if k <= self.rows.shape[1])


def halves(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [n, W] to choose by, and those to check with.

    Raises:
        UserError: there are too few.
    """
    require(
        len(outputs) >= MIN_OUTPUTS,
        f"{len(outputs)} outputs to measure recall with; expected {MIN_OUTPUTS} or more, of as many histories",
    )
    order = np.random.default_rng(SEED).permutation(len(outputs))
    return outputs[order[: len(order) // 2]], outputs[order[len(order) // 2 :]]


def measured_recalls(search: Search, exact: ExactLists) -> dict[str, dict[str, float]]:
    """The recall of exact lists, by filter and length of the lists: a mean over outputs and the items of their lists.

    A listed item counts if it is scored no less than the exact list's last one. A filter that leaves fewer items of an
    exact list than are wanted is not measured for this output; lengths that this leaves without outputs are missing.
    """
    recalls: dict[str, dict[str, float]] = {}
    for name, filters, is_left in _filters(exact):
        for k in exact.cutoffs:
            users = np.flatnonzero(is_left.sum(1) >= k)
            if len(users) == 0:
                continue
            lists = {key: [rows[user] for user in users] if key == "exclude" else rows for key, rows in filters.items()}
            _, scores = search(exact.outputs[users], k, **lists)
            # The k-th of the items that are left.
            last = (is_left[users].cumsum(1) == k).argmax(1)
            least = exact.scores[users, last] - ROUNDING * np.abs(exact.scores[users]).max(1)
            recalls.setdefault(name, {})[str(k)] = float((scores >= least[:, None]).mean())
    return recalls


def _filters(exact: ExactLists) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """Name of a filter, the search's arguments, and which items of the exact lists it leaves, bool [n, d]."""
    yield NO_FILTERS[0], {}, np.ones(exact.rows.shape, bool)
    if exact.rows.shape[1] > EXCLUDED:
        is_left = np.broadcast_to(np.arange(exact.rows.shape[1]) >= EXCLUDED, exact.rows.shape)
        yield NO_FILTERS[1], {"exclude": exact.rows[:, :EXCLUDED]}, is_left
    for share in ALLOWED_SHARES:
        is_allowed = np.random.default_rng(SEED).random(exact.num_items) < share
        yield share_name(share), {"allow": np.flatnonzero(is_allowed)}, is_allowed[exact.rows]


def share_name(share: float) -> str:
    """The name of a filter that allows a share of the catalogue."""
    return f"{share:.1%} allowed"


def check_recall(recall: float) -> None:
    """Refuse what is no recall that a search can be chosen for."""
    require(0 < recall < 1, f"recall is {recall!r}; expected a share above 0 and below 1 (exact retrieval has 1)")


def with_spare(recall: float) -> float:
    """What must be found where a search is chosen, so that it is likely found elsewhere."""
    return 1 - (1 - recall) * (1 - SPARED)


def required(recall: float, num_lists: int, length: int) -> float:
    """What must be found in some held-out lists: a standard error more than the wanted recall, which few lists blur."""
    return min(1.0, recall + math.sqrt(recall * (1 - recall) / (num_lists * length)))


def too_low(recalls: dict[str, dict[str, float]], recall: float, num_lists: int) -> set[int]:
    """Lengths of lists that have less than :func:`required` under some filter."""
    lengths = {int(length) for each in recalls.values() for length in each}
    return {
        length
        for length in lengths
        if any(each.get(str(length), 1.0) < required(recall, num_lists, length) for each in recalls.values())
    }


def check_found(recalls: dict[str, dict[str, float]], recall: float, num_lists: int) -> None:
    """Refuse a search that has too low a recall on held-out lists.

    Raises:
        UserError: it has.
    """
    require(
        not too_low(recalls, recall, num_lists),
        f"recall is {least_recall(recalls):.4f} on held-out outputs; expected {recall} and a standard error more: give "
        "more histories, or use exact retrieval",
    )


def least_recall(recalls: dict[str, dict[str, float]]) -> float:
    """The lowest of :func:`measured_recalls`."""
    return min(recall for by_length in recalls.values() for recall in by_length.values())


def vectors_sha256(vectors: np.ndarray) -> str:
    """Hash of item vectors: what was measured on them holds for no others."""
    digest = hashlib.sha256(f"{vectors.dtype} {vectors.shape} ".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()
