"""The recommender: an export that answers, for histories of external ids or for sessions that grow by an event.

    recommender = Recommender.from_pretrained("runs/demo/export-128", size=64)
    recommender.recommend([["item-000003", "item-000014"]], k=5)

docs/deploy.md describes it. B histories, V items, W the width of what is compared: the size, or that of cut vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fmrl_dist.base.errors import require
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.checkpoint.export.reading import read_export, read_export_vocabulary
from fmrl_dist.data.store.manifest import VOCAB_FILE
from fmrl_dist.deploy.approximate.choice import DEFAULT_RECALL, Record, chosen_search
from fmrl_dist.deploy.download import export_at
from fmrl_dist.deploy.item_filters import Rows, RowsOfEach
from fmrl_dist.deploy.item_vocabulary import ItemId, ItemIds, ItemIdsOfEach, ItemVocabulary, Recommendation
from fmrl_dist.deploy.ranking_model import RankingModel
from fmrl_dist.deploy.session import Session, Sessions


class Recommender:
    """A model of one size and its catalogue; :meth:`from_pretrained` makes one.

    Args:
        exported: what an export holds.
        vocabulary: its items, in the order of the rows.
        size: one of its sizes; None for the largest.
        vectors: compare vectors of the whole network cut to so many channels; None to compare whole ones.

    Raises:
        UserError: there is no such size; vectors are cut of a cut network, or of an export without a rotation.
    """

    def __init__(
        self, exported: ExportedModel, vocabulary: ItemVocabulary, size: int | None = None, vectors: int | None = None
    ) -> None:
        require(
            len(vocabulary.ids) == len(exported.items),
            f"the vocabulary has {len(vocabulary.ids)} items, the embeddings have {len(exported.items)}; export again",
        )
        self.model = RankingModel(exported, vocabulary.train_counts, size, vectors, vocabulary.removed)
        self.vocabulary = vocabulary
        self.retrieval_record: Record | None = None  # what a search other than the exact one was measured to find

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        size: int | None = None,
        revision: str | None = None,
        vectors: int | None = None,
        retrieval: str = "exact",
        recall: float = DEFAULT_RECALL,
    ) -> Recommender:
        """The recommender of an export.

        Args:
            source: folder of an export; or the id of a repository on the Hugging Face Hub that holds one. A folder of
                that name wins.
            size: a trained size up to the export's; None for the export's.
            revision: branch, tag or commit of the repository.
            vectors: compare vectors of the whole network, rotated and cut to so many channels.
            retrieval, recall: how lists are found, see :meth:`retrieve_by`.

        Raises:
            UserError: it is no export, or damaged; or as :class:`Recommender` and :meth:`retrieve_by`.
        """
        folder = export_at(source, revision)
        exported = read_export(folder)
        vocabulary = ItemVocabulary(read_export_vocabulary(folder), str(folder / VOCAB_FILE))
        recommender = cls(exported, vocabulary, size, vectors)
        recommender.retrieve_by(retrieval, recall)
        return recommender

    def retrieve_by(
        self, method: str, recall: float = DEFAULT_RECALL, histories: Sequence[ItemIds] | None = None
    ) -> None:
        """Choose how lists are found, of this recommender and of its sessions.

        Args:
            method: ``exact``; or, faster for large catalogues, ``funnel`` (:mod:`fmrl_dist.deploy.approximate.funnel`)
                or ``ann`` (:mod:`fmrl_dist.deploy.approximate.ann`). Filters are exact in all of them.
            recall: the share of the exact lists' items that the others' must have, above 0, below 1.
            histories: some hundreds of external ids each, like those that will be asked for, to measure recall with;
                None to make some up (:mod:`fmrl_dist.deploy.approximate.sample_histories`).

        Raises:
            UserError: there is no such method; there are too few histories; recall was not reached.
        """
        rows = None if histories is None else [self.rows_of(item_ids) for item_ids in histories]
        self.model.search, self.retrieval_record = chosen_search(self.model, method, recall, rows)

    @property
    def size(self) -> int:
        """Channels of the network."""
        return self.model.size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes that the export can serve."""
        return self.model.sizes

    @property
    def width_of_vectors(self) -> int:
        """W, channels of what is compared."""
        return self.model.width_of_vectors

    @property
    def max_length(self) -> int:
        """Last events of a history that :meth:`recommend` reads."""
        return self.model.max_length

    @property
    def answers_empty(self) -> str:
        """What an empty history is answered by: "start position", or "popularity" if the former was not trained."""
        return "start position" if self.model.predict_first else "popularity"

    @property
    def num_items(self) -> int:
        """V."""
        return self.model.num_items

    @property
    def item_ids(self) -> list[ItemId]:
        """External ids, in the order of the rows."""
        return self.vocabulary.ids

    @property
    def titles(self) -> list[str | None] | None:
        """Titles, in the order of the rows; None if the items have none."""
        return self.vocabulary.titles

    @property
    def removed(self) -> np.ndarray:
        """Rows of items that are never recommended any more, int64; histories may hold them."""
        return self.vocabulary.removed

    @property
    def item_vectors(self) -> np.ndarray:
        """What outputs are compared with, float32 [V, W]; read only."""
        return self.model.item_vectors

    def rows_of(self, item_ids: ItemIds, unknown: str = "error") -> np.ndarray:
        """Rows of external ids, int64; see :meth:`~fmrl_dist.deploy.item_vocabulary.ItemVocabulary.rows_of`."""
        return self.vocabulary.rows_of(item_ids, unknown)

    def encode(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Outputs float32 [B, W] after histories of rows; see :meth:`RankingModel.encode`."""
        return self.model.encode(histories)

    def top_k(
        self,
        outputs: np.ndarray,
        k: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items for outputs of :meth:`encode`; see :func:`fmrl_dist.deploy.retrieval.top_k`."""
        return self.model.top_k(outputs, k, exclude, allow, deny)

    def recommend_rows(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        exclude_seen: bool = True,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`recommend` in rows of items: rows int64 [B, k] and scores float32 [B, k]; -1, -inf where none is."""
        return self.model.recommend_rows(histories, k, exclude_seen, allow, deny)

    def recommend(
        self,
        histories: Iterable[ItemIds],
        k: int = 10,
        exclude_seen: bool = True,
        allow: ItemIds | ItemIdsOfEach | None = None,
        deny: ItemIds | ItemIdsOfEach | None = None,
        unknown: str = "error",
    ) -> list[list[Recommendation]]:
        """The k best next items after each history, the best first.

        The model reads a history's last ``max_length`` events, as an evaluation does. An empty history is answered by
        the start position; if that was not trained (``predict_first`` is false), by the most popular items.

        Args:
            histories: external ids, oldest first, of B users.
            k: items of each list.
            exclude_seen: leave out all items of the history, also those that the model no longer reads.
            allow: ids that may be recommended, for all users; or a list for each user, None for all items.
            deny: ids that may not, likewise.
            unknown: what to do about ids that there are not: "error", or "skip" to leave them out.

        Returns:
            B lists of at most k; shorter where filters leave fewer items.

        Raises:
            UserError: there is no such item; filters are not one per user.
        """
        rows = self._histories_of(histories, unknown)
        lists = [self.vocabulary.rows_of_lists(lists, unknown) for lists in (allow, deny)]
        k = self.model.possible_k(k)
        return self.vocabulary.named(*self.model.recommend_rows(rows, k, exclude_seen, *lists))

    def _histories_of(self, histories: Iterable[ItemIds], unknown: str) -> list[np.ndarray]:
        of_users = [] if isinstance(histories, str) else list(histories)  # a generator can be read once
        require(
            not isinstance(histories, str) and not any(isinstance(ids, str | int | np.integer) for ids in of_users),
            f"histories is {histories!r:.80}; expected a list of histories, each a list of item ids: [[…], […]]",
        )
        return [self.rows_of(item_ids, unknown) for item_ids in of_users]

    def session(self, history: ItemIds = (), unknown: str = "error") -> Session:
        """A session that has observed a history; see :class:`~fmrl_dist.deploy.session.Session`."""
        session = Session(self.model, self.vocabulary)
        for row in self.rows_of(history, unknown).tolist():
            session.observe_row(row)
        return session

    def sessions(self, num_sessions: int) -> Sessions:
        """New sessions that observe and answer together; see :class:`~fmrl_dist.deploy.session.Sessions`."""
        return Sessions(self.model, self.vocabulary, num_sessions)
