"""Which search answers: exact, or one of less work with a recall that is measured before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from fmrl_dist.base.errors import require
from fmrl_dist.deploy.approximate.ann import calibrated_ann
from fmrl_dist.deploy.approximate.calibration import calibrated_funnel
from fmrl_dist.deploy.approximate.sample_histories import sample_histories
from fmrl_dist.deploy.ranking_model import RankingModel
from fmrl_dist.deploy.retrieval import Search, top_k

METHODS = ("exact", "funnel", "ann")
DEFAULT_RECALL = 0.99
NUM_HISTORIES = 1024  # that are made up
Record = dict[str, Any]


def recall_of_command(method: str, recall: float | None) -> float:
    """A command's ``--recall``, or the default where it is not given.

    Raises:
        UserError: it would have no effect.
    """
    require(
        recall is None or method != "exact",
        f"--recall is {recall}, and --retrieval exact finds all items that belong into a list; choose another, or "
        "leave --recall out",
    )
    return DEFAULT_RECALL if recall is None else recall


def chosen_search(
    model: RankingModel, method: str, recall: float, histories: Sequence[np.ndarray] | None = None
) -> tuple[Search, Record | None]:
    """The search that a method names, and what was measured of it; None of the exact one.

    Args:
        model: whose outputs are compared with whose items.
        method: one of :data:`METHODS`.
        recall: of the exact lists, that is wanted.
        histories: of rows, to measure it with; empty ones are left out. None to make some up.

    Raises:
        UserError: there is no such method; or as :func:`calibrated_funnel` and :func:`calibrated_ann`.
    """
    require(method in METHODS, f"retrieval is {method!r}; expected one of {', '.join(METHODS)}")
    if method == "exact":
        return partial(top_k, model.item_vectors), None
    of_users = histories is not None
    if histories is None:
        histories = sample_histories(model.train_counts, NUM_HISTORIES, model.max_length)
    outputs = model.encode([rows for rows in histories if len(rows)])
    source = {"method": method, "histories": "given" if of_users else "made up"}
    if method == "ann":
        ann, found = calibrated_ann(model.item_vectors, outputs, recall)
        return ann.top_k, {**source, **asdict(found)}
    funnel, record = calibrated_funnel(model.item_vectors, outputs, recall, model.rotation_of_vectors)
    return funnel.top_k, {**source, **asdict(record)}
