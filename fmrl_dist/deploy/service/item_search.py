"""Items by words of their titles, the most popular first. V items."""

from __future__ import annotations

import numpy as np

from fmrl_dist.deploy.item_vocabulary import ItemId, ItemVocabulary


class ItemSearch:
    """Search of a vocabulary: items whose title or id contains every word, whatever its case; without removed ones."""

    def __init__(self, vocabulary: ItemVocabulary) -> None:
        self._ids, self._titles = vocabulary.ids, vocabulary.titles
        order = np.argsort(-vocabulary.train_counts, kind="stable")
        order = order[~np.isin(order, vocabulary.removed)]
        self._texts = [(row, f"{self.title(row) or ''} {self._ids[row]}".casefold()) for row in order.tolist()]
        self._has_integers = isinstance(self._ids[0], int) if self._ids else False

    def title(self, row: int) -> str | None:
        """The title of a row, if it has one."""
        return None if self._titles is None else self._titles[row]

    def rows(self, query: str, limit: int) -> list[int]:
        """At most ``limit`` rows; of an empty query, those of the most popular items. Time grows with V."""
        words = query.casefold().split()
        found: list[int] = []
        for row, text in self._texts:
            if len(found) == limit:
                break
            if all(word in text for word in words):
                found.append(row)
        return found

    def id_of(self, text: str) -> ItemId:
        """The external id that a text in an address stands for: a number if ids are numbers."""
        is_number = self._has_integers and text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20
        return int(text) if is_number and str(int(text)) == text else text
