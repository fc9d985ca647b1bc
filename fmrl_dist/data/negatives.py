"""Negatives of a sampled softmax: a pure function of (seed, step, lane), independent of the number of processes.

A lane's negatives are K items drawn for it, or the targets of its own positions (``in_batch``), or both. Each comes
with the logarithm of its expected count among them. If a position's own target is among the negatives, as it always is
in-batch, the loss masks it.

    kind         negatives of a lane with P positions    expected count of item i
    uniform      K drawn                                 K / V
    popularity   K drawn                                 K · (count_i + 1)^power / Σ
    in_batch     P targets, one of them its own          (P - 1) · share of i among an epoch's targets
    mixed        K drawn uniformly and P targets         the sum of both
    stratified   the T distinct targets, each once,      1
                 and those K' of K drawn uniformly
                 that are none of them                   K' / (V - T)

Drawn items that no softmax scores (``scored``) are left out: then K is the number of those left, V that of all that are
scored, and Σ theirs.

``stratified`` takes the items that the batch is about as they are, and estimates only the rest: where T is a good part
of V, with much less variance than ``mixed``.
"""

from __future__ import annotations

import numpy as np

from fmrl_dist.config.sections import Config
from fmrl_dist.data.alias import draw
from fmrl_dist.data.item_statistics import popularity_table, scored_items, target_log_shares
from fmrl_dist.data.store.reader import Store
from fmrl_dist.data.windows import window_rule

STREAM = 0x6E656761  # "nega": a separate random stream


class NegativeSampler:
    """Draws the negatives of each lane.

    Args:
        num_items: V.
        num_drawn: K, 0 for none.
        seed: for all draws.
        popularity: alias table to draw from; None draws uniformly.
        target_log_shares: [V], for ``in_batch`` and ``mixed``; None uses no targets as drawn ones.
        stratified: whether the distinct targets are negatives, each exactly once, besides those drawn.
        scored: bool [V], which items may be negatives; None for all.
    """

    def __init__(
        self,
        num_items: int,
        num_drawn: int,
        seed: int,
        popularity: np.ndarray | None = None,
        target_log_shares: np.ndarray | None = None,
        stratified: bool = False,
        scored: np.ndarray | None = None,
    ) -> None:
        self.num_drawn = num_drawn
        self._num_items, self._seed = num_items, seed
        self._popularity, self._target_log_shares = popularity, target_log_shares
        self._stratified, self._scored = stratified, scored
        self._num_scored = num_items if scored is None else int(np.count_nonzero(scored))
        self._log_scored = 0.0  # log of the scored items' share of all draws by popularity
        if popularity is not None and scored is not None:
            self._log_scored = float(np.log(np.exp(popularity["log_share"][scored].astype(np.float64)).sum()))

    @property
    def needs_targets(self) -> bool:
        """Whether a lane's negatives depend on its targets."""
        return self._stratified or self._target_log_shares is not None

    def lane(self, step: int, lane: int) -> np.ndarray:
        """The K items drawn for ``lane`` at ``step`` of the whole run, int64."""
        generator = np.random.default_rng((STREAM, self._seed, step, lane))
        if self._popularity is not None:
            return draw(self._popularity, self.num_drawn, generator)
        return generator.integers(self._num_items, size=self.num_drawn)

    def negatives(self, drawn: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [K'] and logs of expected counts float32 [K'] for positions that share negatives.

        Args:
            drawn: ids drawn for them, of one lane or several.
            targets: of these positions; unused unless ``needs_targets``.
        """
        if self._scored is not None:
            drawn = drawn[self._scored[drawn]]
        if self._stratified:
            return self._strata(drawn, np.unique(targets))
        ids = np.concatenate((drawn, targets)) if self.needs_targets else drawn
        parts = []
        if len(drawn):
            parts.append(np.log(len(drawn)) + self._log_shares(ids))
        if self._target_log_shares is not None:
            with np.errstate(divide="ignore"):
                parts.append(np.log(max(len(targets) - 1, 0)) + self._target_log_shares[ids])
        if not parts:  # all that was drawn is left out
            return ids, np.empty(0, np.float32)
        return ids, np.logaddexp.reduce(parts).astype(np.float32)

    def _log_shares(self, ids: np.ndarray) -> np.ndarray:
        """Log of the share of each of ``ids`` in what is drawn and scored."""
        if self._popularity is None:
            return np.full(len(ids), -np.log(self._num_scored))
        shares: np.ndarray = self._popularity["log_share"][ids] - self._log_scored
        return shares

    def _strata(self, drawn: np.ndarray, certain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ``certain`` items, and the drawn ones as a uniform sample of all others."""
        others = drawn[~np.isin(drawn, certain)]
        log_expected = np.zeros(len(certain) + len(others), np.float32)
        if len(others):
            log_expected[len(certain) :] = np.log(len(others)) - np.log(self._num_scored - len(certain))
        return np.concatenate((certain, others)), log_expected


def make_sampler(config: Config, store: Store) -> NegativeSampler | None:
    """The sampler of a configuration; None for the full softmax."""
    loss = config.loss
    if loss.softmax == "full":
        return None
    in_batch = loss.negatives in ("in_batch", "mixed")
    return NegativeSampler(
        num_items=store.manifest.num_items,
        num_drawn=0 if loss.negatives == "in_batch" else loss.num_negatives,
        seed=config.train.seed,
        popularity=popularity_table(store, loss.popularity_power) if loss.negatives == "popularity" else None,
        target_log_shares=target_log_shares(store, window_rule(config)) if in_batch else None,
        stratified=loss.negatives == "stratified",
        scored=scored_items(store, loss.score_untrained) if loss.negatives != "in_batch" else None,
    )
