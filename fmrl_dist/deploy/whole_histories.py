"""Outputs after whole histories, by the model's own pass over packed rows: for mixers other than the LRU.

The LRU is read event by event (:mod:`fmrl_dist.deploy.one_event`), which costs less, and whose state a session keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fmrl_dist.base.errors import require
from fmrl_dist.model.fmrlrec import FMRLRec

HISTORIES_AT_ONCE = 256


def check_has_state(model: FMRLRec, what: str) -> None:
    """Refuse ``what`` needs a state of fixed size, which only the LRU has.

    Raises:
        UserError: the model's mixer is another.
    """
    mixer = model.mixing.mixer
    require(
        mixer == "lru",
        f"the model's mixer is {mixer}, and {what} a state of fixed size, which mixer lru alone has; recommend from "
        "whole histories, or train with model.mixer lru",
    )


class WholeHistories:
    """A model that reads histories as a whole, in evaluation mode, on the CPU."""

    def __init__(self, model: FMRLRec) -> None:
        self._model = model

    @torch.no_grad()
    def start_output(self) -> np.ndarray:
        """Output of an empty history, float32 [D]."""
        model = self._model
        nothing = model.encoder.bias.new_zeros(0, model.width)
        return model(nothing, torch.tensor([0, 0]), torch.tensor([True]))[0].numpy()

    @torch.no_grad()
    def last_outputs(self, items: np.ndarray, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Outputs after the last event of each history, as :meth:`OneEvent.last_outputs` gives them.

        Args:
            items: embeddings [V, D].
            histories: rows of items, oldest first, B arrays of integers; none is empty.

        Returns:
            z [B, D].
        """
        outputs = np.empty((len(histories), self._model.width), np.float32)
        for first in range(0, len(histories), HISTORIES_AT_ONCE):
            some = histories[first : first + HISTORIES_AT_ONCE]
            starts = torch.from_numpy(np.cumsum([0, *map(len, some)]))
            rows = torch.from_numpy(items[np.concatenate(some)])
            z = self._model(rows, starts, torch.zeros(len(some), dtype=torch.bool))
            outputs[first : first + len(some)] = z[starts[1:] - 1].numpy()
        return outputs
