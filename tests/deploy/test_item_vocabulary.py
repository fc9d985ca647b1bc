"""The hash of the first items of a vocabulary, by which sessions' states know their catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from fmrl_dist.deploy import item_vocabulary
from fmrl_dist.deploy.item_vocabulary import HASHED_TOGETHER, ItemId, ItemVocabulary
from tests.fixtures.exports import ids_of, vocabulary_bytes


def vocabulary_of(item_ids: list[ItemId]) -> ItemVocabulary:
    return ItemVocabulary(vocabulary_bytes(item_ids, titles=False), "vocab.parquet")


@pytest.mark.parametrize("num_items", [5, HASHED_TOGETHER, 2 * HASHED_TOGETHER + 1, 3 * HASHED_TOGETHER])
def test_the_hash_of_any_first_items(num_items: int) -> None:
    """Texts that repr escapes, too; of the whole and of each part it is what it was before, so states stay valid."""
    for item_ids in (list[ItemId](range(num_items)), [*ids_of(num_items - 2), "'\n", "é☃"]):
        vocabulary = vocabulary_of(item_ids)
        text = b""
        for count, item_id in enumerate(item_ids):
            assert vocabulary.sha256(count) == hashlib.sha256(text).hexdigest()
            text += repr(item_id).encode() + b"\n"
        assert vocabulary.sha256(num_items) == hashlib.sha256(text).hexdigest()


def test_a_client_that_asks_for_any_number_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is what its state says: neither time nor memory may grow with it, or with how many were asked for."""
    vocabulary = vocabulary_of(ids_of(20 * HASHED_TOGETHER))
    vocabulary.sha256(20 * HASHED_TOGETHER)
    hashed: list[int] = []
    hash_input = item_vocabulary._hashed

    def noted(item_ids: Sequence[ItemId]) -> bytes:
        hashed.append(len(item_ids))
        return hash_input(item_ids)

    monkeypatch.setattr(item_vocabulary, "_hashed", noted)
    kept = {name: len(value) for name, value in vars(vocabulary).items() if isinstance(value, list | dict)}
    for count in range(0, 20 * HASHED_TOGETHER, 37):
        vocabulary.sha256(count)
    assert hashed and max(hashed) < HASHED_TOGETHER
    assert kept == {name: len(value) for name, value in vars(vocabulary).items() if isinstance(value, list | dict)}
