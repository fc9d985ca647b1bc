"""A model of one size and its catalogue, in rows of items: histories to outputs, outputs to lists.

B histories, V items, D the size, W the width of what is compared: D, or K of cut vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrl_dist.base.errors import require
from fmrl_dist.checkpoint.export.parts import ExportedModel
from fmrl_dist.deploy.item_filters import Rows, RowsOfEach, lists_of_users, with_denied
from fmrl_dist.deploy.one_event import OneEvent
from fmrl_dist.deploy.retrieval import Search, top_k
from fmrl_dist.deploy.whole_histories import WholeHistories, check_has_state
from fmrl_dist.model.embed_catalogue import check_rankable
from fmrl_dist.model.fmrlrec import FMRLRec
from fmrl_dist.model.rotation import rotate_tiles


class RankingModel:
    """What ranks the catalogue.

    Args:
        exported: what an export holds.
        train_counts: how often each item was trained on, int64 [V].
        size: one of its sizes; None for the largest.
        vectors: compare vectors of the whole network cut to so many channels; None to compare whole ones.
        removed: rows that are never recommended, int64; histories may hold them. None for none.

    Raises:
        UserError: there is no such size; vectors are cut of a cut network, or of an export without a rotation.
    """

    def __init__(
        self,
        exported: ExportedModel,
        train_counts: np.ndarray,
        size: int | None = None,
        vectors: int | None = None,
        removed: np.ndarray | None = None,
    ) -> None:
        width = exported.model.width
        self.sizes: tuple[int, ...] = exported.model.sizes  # that the export can serve
        self.size: int = width if size is None else size
        require(
            not isinstance(size, bool) and self.size in self.sizes,
            f"size {size!r} is not one of this export; expected one of {list(self.sizes)}",
        )
        self.train_counts = train_counts
        self.removed: np.ndarray = np.empty(0, np.int64) if removed is None else removed
        self.max_length: int = exported.max_length  # last events of a history that recommend() reads
        self.predict_first: bool = exported.predict_first  # whether the model answers an empty history
        self.normalize: bool = exported.normalize  # whether scores are cosines
        self.model: FMRLRec = exported.model if self.size == width else exported.model.truncate(self.size)
        self.embeddings: Tensor = exported.items[:, : self.size].contiguous()  # read by the model, float32 [V, D]
        check_rankable(self.embeddings, "item embeddings")
        self.item_inputs: np.ndarray = self.embeddings.numpy()  # the same memory
        self._rotation: Tensor | None = None
        if vectors is not None:
            self._rotation = self._cut_rotation(exported, vectors)
        self.width_of_vectors: int = self.size if vectors is None else vectors  # W
        compared = self.embeddings
        if exported.rotation is not None and self._rotation is not None:
            compared = rotate_tiles(compared, exported.rotation)[:, : self.width_of_vectors].contiguous()
        if self.normalize:
            compared = F.normalize(compared, eps=torch.finfo(compared.dtype).tiny)
        self.item_vectors: np.ndarray = compared.numpy()  # what outputs are compared with, float32 [V, W]
        self.rotation_of_vectors: np.ndarray | None = None  # [W, W]: its first channels carry the most; None: not known
        of_search = exported.rotation if exported.search_rotation is None else exported.search_rotation
        if vectors is None and self.size == width and of_search is not None:
            self.rotation_of_vectors = of_search.numpy()
        self.search: Search = partial(top_k, self.item_vectors)  # what :meth:`top_k` does

    def _cut_rotation(self, exported: ExportedModel, vectors: int) -> Tensor:
        require(
            self.size == self.sizes[-1],
            f"vectors are cut of the whole network, of size {self.sizes[-1]}; leave size or vectors out",
        )
        require(
            exported.rotation is not None,
            "the export has no rotation, without which its vectors cannot be cut; export a run again whose store has "
            "validation users, or leave vectors out",
        )
        require(
            not isinstance(vectors, bool) and vectors in self.sizes,
            f"vectors is {vectors!r}; expected one of {list(self.sizes)}",
        )
        assert exported.rotation is not None
        return exported.rotation[:, :vectors].contiguous()

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.embeddings)

    def encode(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """What the items are compared with after each history, of which the last ``max_length`` events are read.

        Args:
            histories: rows of items, oldest first, B arrays of int64; an empty one is answered by the start position.

        Returns:
            float32 [B, W]; of unit length if scores are cosines.

        Raises:
            UserError: a history is empty and the start position was not trained; or outputs are not finite.
        """
        return self.compared_outputs(self.last_outputs(histories))

    def last_outputs(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """The network's outputs after each history, float32 [B, D]; see :meth:`encode`.

        Raises:
            UserError: a history is empty and the start position was not trained.
        """
        read = [rows[-self.max_length :] for rows in histories]
        is_empty = np.array([len(rows) == 0 for rows in read], bool)
        require(
            self.predict_first or not is_empty.any(),
            "a history is empty, and the model was trained without loss.predict_first: it has no output for it",
        )
        z = np.empty((len(read), self.size), np.float32)
        z[is_empty] = self.start_output
        z[~is_empty] = self._reader.last_outputs(self.item_inputs, [rows for rows in read if len(rows)])
        return z

    def compared_outputs(self, z: np.ndarray) -> np.ndarray:
        """The network's outputs [B, D] as they are compared with items, [B, W]: rotated and cut, of unit length.

        Raises:
            UserError: they are not finite, or too large.
        """
        outputs = torch.from_numpy(z)
        check_rankable(outputs, "outputs")
        if self._rotation is not None:
            outputs = outputs @ self._rotation
        if self.normalize:
            outputs = F.normalize(outputs, eps=torch.finfo(outputs.dtype).tiny)
        return outputs.numpy()

    def top_k(
        self,
        outputs: np.ndarray,
        k: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items for outputs of :meth:`encode`, exactly unless :attr:`search` is another.

        See :func:`fmrl_dist.deploy.retrieval.top_k`.
        """
        return self.search(outputs, k, exclude, allow, with_denied(deny, self.removed))

    def popular(
        self,
        num_users: int,
        k: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`top_k`, of the items with the most training events; scores are their shares of all events."""
        denied = with_denied(deny, self.removed)
        return top_k(self._popularity, np.ones((num_users, 1), np.float32), k, exclude, allow, denied)

    def possible_k(self, k: int) -> int:
        """``k``, or the number of items if there are fewer: no list is longer, and rows of k numbers cost memory."""
        return min(k, len(self.train_counts)) if isinstance(k, int | np.integer) else k

    @cached_property
    def _popularity(self) -> np.ndarray:
        counts = self.train_counts
        return (counts[:, None] / max(int(counts.sum()), 1)).astype(np.float32)

    def recommend_rows(
        self,
        histories: Sequence[np.ndarray],
        k: int = 10,
        exclude_seen: bool = True,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items after each history: rows int64 [B, k] and scores float32 [B, k].

        Where a user has fewer than k items, rows are -1 and scores -inf. Empty histories are answered by the start
        position, or, if that was not trained, by :meth:`popular`.
        """
        outputs = np.zeros((len(histories), self.width_of_vectors), np.float32)
        answered = np.array([len(rows) > 0 or self.predict_first for rows in histories], bool)
        outputs[answered] = self.encode([histories[user] for user in np.flatnonzero(answered).tolist()])
        return self.top_k_or_popular(outputs, answered, k, list(histories) if exclude_seen else None, allow, deny)

    def top_k_or_popular(
        self,
        outputs: np.ndarray,
        answered: np.ndarray,
        k: int,
        exclude: RowsOfEach | None = None,
        allow: Rows | RowsOfEach | None = None,
        deny: Rows | RowsOfEach | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`top_k` for users who have outputs, answered bool [B], and :meth:`popular` for the others."""
        if answered.all():
            return self.top_k(outputs, k, exclude, allow, deny)
        rows, scores = self.popular(len(outputs), k, exclude, allow, deny)
        users = np.flatnonzero(answered).tolist()
        exclude, allow, deny = (lists_of_users(lists, users) for lists in (exclude, allow, deny))
        rows[users], scores[users] = self.top_k(outputs[users], k, exclude, allow, deny)
        return rows, scores

    @cached_property
    def one_event(self) -> OneEvent:
        """The model's step.

        Raises:
            UserError: its mixer has no state of fixed size.
        """
        check_has_state(self.model, "reading event by event needs")
        return OneEvent(self.model)

    @property
    def has_state(self) -> bool:
        """Whether the model has a state of fixed size; sessions of others read their last events anew."""
        return self.model.mixing.mixer == "lru"

    @cached_property
    def _reader(self) -> OneEvent | WholeHistories:
        """What reads histories."""
        return self.one_event if self.has_state else WholeHistories(self.model)

    @cached_property
    def start_output(self) -> np.ndarray:
        """The network's output after an empty history, float32 [D]."""
        return self._reader.start_output()

    @cached_property
    def model_sha256(self) -> str:
        """Hash of what a session's state depends on: sizes and the weights that turn item embeddings into outputs."""
        digest = hashlib.sha256(repr(self.model.sizes).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if not name.startswith("encoder.") or name == "encoder.bias":
                digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()
