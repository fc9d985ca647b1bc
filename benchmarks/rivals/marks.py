"""Training of a rival under a clock: at each mark of training time its scores are written, and after the last it stops.

Only training counts: the clock stands still while scores are computed and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rivals.scores import Scores, write_scores


class Marks:
    """The marks that are left, and the training time so far.

    Args:
        minutes: of training, by the wall clock; one file each.
        folder: where ``MINUTES.npz`` is written.
        record: what is known of the run: its rival, its settings.
    """

    def __init__(self, minutes: Sequence[float], folder: Path, record: dict[str, Any]) -> None:
        self._left = sorted(minutes)
        self._folder, self._record = folder, record
        self._spent = (0.0, 0.0)  # wall-clock and processor seconds until the clock was last started
        self._started = (0.0, 0.0)

    def start(self) -> None:
        self._started = _now()

    def after_step(self, epochs: float, score: Callable[[], Scores]) -> bool:
        """Write the scores if a mark has been reached after so many epochs; whether it was the last."""
        wall_s, cpu_s = (
            spent + now - start for spent, now, start in zip(self._spent, _now(), self._started, strict=True)
        )
        if wall_s < 60 * self._left[0]:
            return False
        scores = score()
        while self._left and wall_s >= 60 * self._left[0]:
            spent = {"minutes": self._left.pop(0), "wall_s": wall_s, "cpu_s": cpu_s, "epochs": epochs}
            write_scores(self._folder / f"{spent['minutes']:g}.npz", scores, self._record | spent)
            print(
                f"{spent['minutes']:g} minutes: {wall_s:.1f} s, {cpu_s:.1f} processor s, {epochs:.2f} epochs",
                flush=True,
            )
        self._spent = (wall_s, cpu_s)
        self.start()
        return not self._left

    def lightning_hooks(self, score: Callable[[Any], Scores]) -> dict[str, Callable[..., None]]:
        """For a LambdaCallback of Lightning; ``score`` gets the module, which is not training then."""

        def on_train_start(trainer: Any, module: Any) -> None:
            self.start()

        def on_train_batch_end(trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
            epochs = trainer.current_epoch + (batch_index + 1) / trainer.num_training_batches
            trainer.should_stop = self.after_step(epochs, lambda: _evaluating(module, score))

        return {"on_train_start": on_train_start, "on_train_batch_end": on_train_batch_end}


def _evaluating(module: Any, score: Callable[[Any], Scores]) -> Scores:
    module.eval()
    scores = score(module)
    module.train()
    return scores


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
