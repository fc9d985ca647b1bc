"""Which targets of a history are trained on, as rows of packed events.

A training window is a run of targets. The input of each target is the event before it; a history's first event is
predicted from the start position. ``last`` takes a user's last ``max_length`` targets, ``all`` partitions all targets,
counted from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmrl_dist.config.sections import Config


@dataclass(frozen=True)
class WindowRule:
    """Which windows of a history are trained on."""

    max_length: int  # targets per window
    windows: str  # last | all
    predict_first: bool  # whether a history's first event is a target, predicted from the start position


def window_rule(config: Config) -> WindowRule:
    """The rule of a configuration."""
    return WindowRule(config.data.max_length, config.data.windows, config.loss.predict_first)


def target_windows(lengths: np.ndarray, rule: WindowRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of targets for histories of ``lengths`` events.

    Returns:
        owner, first, last, each int64 [W]: the history of each window, and its targets first … last - 1, counted in
        events from the start of the history. Windows without targets are left out.
    """
    skipped = 0 if rule.predict_first else 1
    num_targets = np.maximum(lengths - skipped, 0)
    num_windows = -(-num_targets // rule.max_length)
    if rule.windows == "last":
        num_windows = np.minimum(num_windows, 1)
    owner = np.repeat(np.arange(len(lengths)), num_windows)
    back = ragged_rows(np.zeros_like(num_windows), num_windows)  # 0 is the last window of the history
    last = lengths[owner] - back * rule.max_length
    return owner, np.maximum(last - rule.max_length, skipped), last


def ragged_rows(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows first … first + length - 1 of all runs, concatenated, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - (ends - lengths), lengths)
