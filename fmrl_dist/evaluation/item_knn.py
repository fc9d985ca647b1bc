"""Item-kNN, the neighbourhood baseline: items that the same users have (Deshpande and Karypis, 2004).

The similarity of two items is the cosine of their users: users with both / √(users of one · users of the other), over
the last ``LAST_EVENTS`` training events of each user. An item keeps its ``NEIGHBOURS`` most similar ones. The score of
an item for a user is the sum of its similarities to the items of the user's history of which it is a neighbour, so all
other items tie at zero. V items.

Memory: 32 bytes per training event counted, 16 per similarity kept, and pairs of a few items at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fmrl_dist.data.batches import EvaluationBlock
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.windows import ragged_rows
from fmrl_dist.evaluation.rank_counts import RankedUsers
from fmrl_dist.evaluation.target_ranks import seen_items

NEIGHBOURS = 100
LAST_EVENTS = 100
PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class ItemNeighbours:
    """The most similar items of each item."""

    starts: np.ndarray  # int64 [V + 1], first entry of each item
    items: np.ndarray  # int64
    similarities: np.ndarray  # float64, above 0

    @property
    def num_items(self) -> int:
        return len(self.starts) - 1


def item_neighbours(store: Store, num_neighbours: int = NEIGHBOURS) -> ItemNeighbours:
    """The neighbours of all items of a store, from its training histories."""
    num_items = store.manifest.num_items
    users, items = _training_pairs(store)
    num_of_user = np.bincount(users)
    starts_of_user = _starts(num_of_user)
    users_of_item, num_of_item = users[np.argsort(items, kind="stable")], np.bincount(items, minlength=num_items)
    starts_of_item = _starts(num_of_item)
    pairs_of_item = np.bincount(items, weights=num_of_user[users], minlength=num_items).astype(np.int64)

    def count_together(begin: int, end: int, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (owner · V + item) of the items that users ``begin`` … of the owners have, and how many have them."""
        who = users_of_item[begin:end]
        lengths = num_of_user[who]
        others = items[ragged_rows(starts_of_user[who], lengths)]
        return np.unique(np.repeat(owners, lengths) * num_items + others, return_counts=True)

    counts, neighbours, similarities = np.zeros(num_items, np.int64), [], []
    for first, last in _runs(pairs_of_item, PAIRS_AT_ONCE):
        begin, end = starts_of_item[first], starts_of_item[last]
        if last > first + 1:
            owners = np.repeat(np.arange(first, last), num_of_item[first:last])
            keys, together = count_together(begin, end, owners)
        else:  # one item, of which many users may have to be counted in several goes
            at_once, summed = max(PAIRS_AT_ONCE // LAST_EVENTS, 1), np.zeros(num_items, np.int64)
            for low in range(begin, end, at_once):
                high = min(low + at_once, end)
                keys, together = count_together(low, high, np.full(high - low, first))
                summed[keys - first * num_items] += together
            others = np.flatnonzero(summed)
            keys, together = first * num_items + others, summed[others]
        one, other = np.divmod(keys, num_items)
        one, other, together = (values[one != other] for values in (one, other, together))
        similarity = together / np.sqrt(num_of_item[one].astype(np.float64) * num_of_item[other])
        order = np.lexsort((other, -similarity, one))
        one, other, similarity = one[order], other[order], similarity[order]
        kept = np.arange(len(one)) - np.searchsorted(one, one) < num_neighbours
        counts[first:last] = np.bincount(one[kept] - first, minlength=last - first)
        neighbours.append(other[kept])
        similarities.append(similarity[kept])
    return ItemNeighbours(
        _starts(counts),
        np.concatenate([np.empty(0, np.int64), *neighbours]),
        np.concatenate([np.empty(0), *similarities]),
    )


def rank_by_neighbours(known: ItemNeighbours, blocks: Iterable[EvaluationBlock]) -> Iterator[RankedUsers]:
    """Target ranks [2, 1, U] of each block's users."""
    for block in blocks:
        num_users, lengths = len(block.users), block.seen_starts.diff()
        # Items of the history, once each: others than the target, and the target if it is among them.
        rows = np.repeat(np.arange(num_users), lengths.numpy())
        history = np.unique(rows * known.num_items + block.seen.numpy())
        who, item = np.divmod(history, known.num_items)
        num_found = known.starts[item + 1] - known.starts[item]
        entries = ragged_rows(known.starts[item], num_found)
        keys, place = np.unique(np.repeat(who, num_found) * known.num_items + known.items[entries], return_inverse=True)
        scores = np.bincount(place, weights=known.similarities[entries], minlength=len(keys))

        def score_of(row: np.ndarray, item: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
            wanted = row * known.num_items + item
            at = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
            return np.where(keys[at] == wanted, scores[at], 0.0) if len(keys) else np.zeros(len(wanted))

        owner = keys // known.num_items
        own = score_of(np.arange(num_users), block.targets.numpy(), keys, scores)
        num_scored = np.bincount(owner, minlength=num_users)
        higher = np.bincount(owner[scores > own[owner]], minlength=num_users)
        equal = np.bincount(owner[scores == own[owner]], minlength=num_users)
        equal = np.where(own > 0, equal, known.num_items - num_scored) - 1
        seen = seen_items(block).numpy()
        of_seen = score_of(seen[:, 0], seen[:, 1], keys, scores)
        seen_higher = np.bincount(seen[of_seen > own[seen[:, 0]], 0], minlength=num_users)
        seen_equal = np.bincount(seen[of_seen == own[seen[:, 0]], 0], minlength=num_users)
        ranks = np.stack((1 + higher + equal / 2, 1 + higher - seen_higher + (equal - seen_equal) / 2))
        yield RankedUsers(block.users, block.targets, lengths, torch.from_numpy(ranks[:, None]))


def _training_pairs(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of a user (numbered in the order of reading) and an item, int64, sorted by user."""
    users, items, num_users = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for block in store.manifest.splits["train"]:
        arrays = store.read_or_skip(block)
        if arrays is None:
            continue
        ends, num_events = arrays["starts"][1:], np.diff(arrays["starts"]).clip(max=LAST_EVENTS)
        rows = np.repeat(np.arange(len(num_events)), num_events)
        keys = np.unique(rows * store.manifest.num_items + arrays["items"][ragged_rows(ends - num_events, num_events)])
        user, item = np.divmod(keys, store.manifest.num_items)
        users.append(user + num_users)
        items.append(item)
        num_users += len(num_events)
    return np.concatenate(users), np.concatenate(items)


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))


def _runs(sizes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges whose sizes add up to at most ``most``, or that are a single one."""
    begins, first = _starts(sizes), 0
    while first < len(sizes):
        last = max(int(np.searchsorted(begins, begins[first] + most, side="right")) - 1, first + 1)
        yield first, last
        first = last
