"""The demo's histories: lengths, times, popularity, and that order, text and images each carry signal.

The signal is measured without training, by naive-Bayes oracles that know the attributes of the last item. Their
transition counts are from the training events (all but the last two of a history); they are scored on the last item,
the test target.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from shards.demo.catalogue import MOTIFS, NUM_HUES, NUM_LEAVES, NUM_TIERS, Attributes, make_attributes
from shards.demo.histories import make_histories
from tests.fixtures.demo import ITEMS, USERS


@pytest.fixture(scope="module")
def histories(demo: Path) -> list[NDArray[np.int64]]:
    """The histories as rows of the item table, read back from the files."""
    row = {item_id: row for row, item_id in enumerate(pq.read_table(demo / "items.parquet")["item_id"].to_pylist())}
    sequences = pq.read_table(demo / "sequences.parquet")["item_ids"].to_pylist()
    return [np.array([row[item_id] for item_id in sequence]) for sequence in sequences]


def test_histories_have_no_repeats_and_go_forward_in_time(demo: Path) -> None:
    table = pq.read_table(demo / "sequences.parquet")
    sequences, times = table["item_ids"].to_pylist(), table["timestamps"].to_pylist()
    lengths = np.array([len(sequence) for sequence in sequences])
    assert len(set(table["user_id"].to_pylist())) == USERS
    assert lengths.min() == 5
    assert lengths.max() <= 40
    assert 10 <= lengths.mean() <= 12
    assert all(len(set(sequence)) == len(sequence) for sequence in sequences)
    assert [len(time) for time in times] == lengths.tolist()
    assert all((np.diff(time) > 0).all() for time in times)


def test_items_are_mildly_long_tailed(histories: list[NDArray[np.int64]]) -> None:
    count = np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=ITEMS)
    assert 0.3 < (count < 10).mean() < 0.6, "share of the items with fewer than ten training events"
    assert (count == 0).mean() < 0.03
    top_tenth = np.sort(count)[-ITEMS // 10 :].sum() / count.sum()
    assert 0.25 < top_tenth < 0.45


def test_small_catalogue() -> None:
    histories = make_histories(make_attributes(10, 0), users=50, seed=0).items
    assert {len(history) for history in histories} == {5}
    assert all(len(set(history.tolist())) == 5 for history in histories)


Scores = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def log_popularity(histories: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    return np.log(1 + np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=ITEMS))


@pytest.fixture(scope="module")
def log_lift(histories: list[NDArray[np.int64]], attributes: Attributes) -> dict[str, NDArray[np.float64]]:
    """For each attribute [V, V]: log of P(next item's value | last item's value) / P(value), from training events."""
    lifts = {}
    last = np.concatenate([history[:-3] for history in histories])
    following = np.concatenate([history[1:-2] for history in histories])
    for name, values in (("leaf", NUM_LEAVES), ("tier", NUM_TIERS), ("hue", NUM_HUES), ("motif", len(MOTIFS))):
        of_item = getattr(attributes, name)
        count = np.zeros((values, values))
        np.add.at(count, (of_item[last], of_item[following]), 1)
        prior = (1 + count.sum(axis=0)) / (1 + count.sum(axis=0)).sum()
        lift = (count + 5 * prior) / (count.sum(axis=1, keepdims=True) + 5) / prior
        lifts[name] = np.log(lift)[of_item][:, of_item]
    return lifts


def ndcg_at_10(histories: list[NDArray[np.int64]], scores: Scores) -> float:
    """Mean over the users of 1 / log2(1 + r), r the target rank of the last item; 0 beyond 10. Ties count half."""
    total = 0.0
    for history in histories:
        score, target = scores(history[:-1]), history[-1]
        target_rank = 1 + (score > score[target]).sum() + 0.5 * ((score == score[target]).sum() - 1)
        total += 1 / np.log2(1 + target_rank) if target_rank <= 10 else 0.0
    return total / len(histories)


@pytest.fixture(scope="module")
def oracle(
    log_popularity: NDArray[np.float64], log_lift: dict[str, NDArray[np.float64]]
) -> Callable[[tuple[str, ...]], Scores]:
    """Scores from the popularity, and from the given attributes of the last item."""
    return lambda names: lambda history: log_popularity + sum(log_lift[name][history[-1]] for name in names)


TEXT, IMAGE = ("leaf", "tier"), ("hue", "motif")


def test_attributes_of_the_last_item_beat_popularity(
    histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]
) -> None:
    popularity, both = ndcg_at_10(histories, oracle(())), ndcg_at_10(histories, oracle(TEXT + IMAGE))
    assert 0.005 < popularity < 0.025  # 0.0147
    assert both > 0.2  # 0.268


def test_text_and_image_both_carry_signal(
    histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]
) -> None:
    popularity, text, image, both = (ndcg_at_10(histories, oracle(names)) for names in ((), TEXT, IMAGE, TEXT + IMAGE))
    assert text > 5 * popularity  # 0.140
    assert image > 2.5 * popularity  # 0.051
    assert both > 1.5 * text
    assert both > 3 * image


def test_tastes_carry_signal(histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]) -> None:
    assert ndcg_at_10(histories, oracle(TEXT + IMAGE)) > 1.04 * ndcg_at_10(histories, oracle(("leaf", "hue")))


def test_order_matters(histories: list[NDArray[np.int64]], oracle: Callable[[tuple[str, ...]], Scores]) -> None:
    rng = np.random.default_rng(0)
    shuffled = [np.append(rng.permutation(history[:-1]), history[-1]) for history in histories]
    scores = oracle(TEXT + IMAGE)
    assert ndcg_at_10(shuffled, scores) < 0.3 * ndcg_at_10(histories, scores)  # 0.043


def test_attributes_beat_ids(
    histories: list[NDArray[np.int64]],
    log_popularity: NDArray[np.float64],
    oracle: Callable[[tuple[str, ...]], Scores],
) -> None:
    """The same oracle over ids (counts of item pairs, else popularity) has too few events."""
    pairs = np.zeros((ITEMS, ITEMS), np.float32)
    for history in histories:
        np.add.at(pairs, (history[:-3], history[1:-2]), 1)
    ids = ndcg_at_10(histories, lambda history: 100 * pairs[history[-1]] + log_popularity)
    assert ndcg_at_10(histories, oracle(TEXT + IMAGE)) > 1.3 * ids  # 0.173
