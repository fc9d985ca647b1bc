"""Which mixer a block has: what lets the events of a history see each other.

    lru            the paper's linear recurrence (eq. 8-9), :mod:`~fmrl_dist.model.mixers.lru`
    attention      causal attention, as SASRec has it, :mod:`~fmrl_dist.model.mixers.attention`
    filter         a learned causal filter, :mod:`~fmrl_dist.model.mixers.filter`
    circular       the same filter as FMLP-Rec publishes it, over all of a window
    bsarec         causal attention beside a rescaling of high frequencies, over all of a window, as BSARec has it
    bidirectional  attention over all of a history, trained to fill in masked items, as BERT4Rec has it

Every mixer is a module ``mixer(x [P, D], starts) → [P, D]`` of packed rows. lru, attention and filter see no later
event, so a history can grow event by event: ``initial_state(B)`` and ``step(state, x [B, D]) → state, y [B, D]``. The
others have no step, and their outputs at any but a history's last event have seen that event's future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fmrl_dist.model.mixers.attention import Attention
from fmrl_dist.model.mixers.bsarec import BSARec
from fmrl_dist.model.mixers.filter import Filter
from fmrl_dist.model.mixers.lru import LRU

MIXERS = ("lru", "attention", "filter", "circular", "bsarec", "bidirectional")
POSITIONS = ("rotary", "learned", "none")
Mixer = LRU | Attention | Filter | BSARec
READ_AHEAD = ("circular", "bsarec", "bidirectional")  # an event's output depends on later ones
ATTEND = ("attention", "bsarec", "bidirectional")  # to other events by what they are: they need positions


@dataclass(frozen=True)
class Mixing:
    """Settings of a model's mixers; each reads its own."""

    mixer: str = "lru"
    r_min: float = 0.0  # lru: the ring of |Λ| at initialisation
    r_max: float = 0.1
    head_width: int = 32  # attention: channels of a head, at most
    positions: str = "rotary"  # attention: one of ``POSITIONS``
    window: int = 50  # attention, filters: events that are read, and that a step remembers
    low_pass: int = 5  # bsarec: number of low frequencies that are kept
    low_pass_share: float = 0.7  # bsarec: share of the rescaled frequencies in the mix

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS or self.positions not in POSITIONS:
            raise ValueError(
                f"mixer {self.mixer!r} with positions {self.positions!r}; expected of {MIXERS}, {POSITIONS}"
            )
        if min(self.head_width, self.window, self.low_pass) < 1:
            numbers = self.head_width, self.window, self.low_pass
            raise ValueError(f"head_width, window and low_pass are {numbers}; expected at least 1")

    @property
    def arguments(self) -> dict[str, Any]:
        """What defines the mixer, as JSON can carry it. The LRU's are those of exports before there were others."""
        if self.mixer == "lru":
            return {"r_min": self.r_min, "r_max": self.r_max}
        chosen: dict[str, Any] = {"mixer": self.mixer, "window": self.window}
        if self.mixer in ATTEND:
            chosen |= {"head_width": self.head_width, "positions": self.positions}
        if self.mixer == "bsarec":
            chosen |= {"low_pass": self.low_pass, "low_pass_share": self.low_pass_share}
        return chosen

    @property
    def has_step(self) -> bool:
        """Whether a history can grow event by event."""
        return self.mixer not in READ_AHEAD

    @property
    def has_limit(self) -> bool:
        """Whether no sequence may be longer than the window. The LRU has none, the causal filter forgets by itself."""
        return self.mixer not in ("lru", "filter")

    @property
    def learns_positions(self) -> bool:
        """Whether the model adds a learned row per position to its input."""
        return self.mixer in ATTEND and self.positions == "learned"


def build_mixer(mixing: Mixing, sizes: Sequence[int], matmul_dtype: torch.dtype | None, scan: str) -> Mixer:
    """A freshly initialised mixer. ``scan``: "plain" for any mixer's specification, else the LRU's implementation."""
    plain = scan == "plain"
    if mixing.mixer == "lru":
        return LRU(sizes, mixing.r_min, mixing.r_max, matmul_dtype, scan)
    if mixing.mixer in ATTEND:
        rotary, causal = mixing.positions == "rotary", mixing.mixer != "bidirectional"
        impl = "plain" if plain else "grouped"
        attention = Attention(sizes, mixing.head_width, mixing.window, rotary, causal, matmul_dtype, impl)
        if mixing.mixer != "bsarec":
            return attention
        return BSARec(attention, mixing.low_pass_share, mixing.low_pass, "plain" if plain else "spectrum")
    assert mixing.mixer in ("filter", "circular"), mixing.mixer
    impl = "plain" if plain else "spectrum"
    return Filter(sizes[-1], mixing.window, causal=mixing.mixer == "filter", impl=impl)
