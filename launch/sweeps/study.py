"""The trials of a sweep, in a study of Optuna that all its workers share.

Its journal is a file of JSON lines on a file system that they share; nothing in it is pickled. Whoever writes holds a
lock file, made by an exclusive open, which NFS knows too. A second such lock is held from counting the trials to giving
a new one its worker, so that there are never more than were asked for, and each has one worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmrl_dist.base.errors import UserError
from launch.sweeps.space import Choices, Range, Space, as_word

JOURNAL = "journal.log"
WORKER, WHY = "worker", "why"  # what a trial notes besides: the index of its worker; how it failed


@dataclass(frozen=True)
class Trial:
    """One set of values, and what became of it."""

    number: int
    worker: int
    state: str  # running | complete | failed
    words: dict[str, str]  # of the parameters, by key
    value: float | None  # of the metric on validation; None unless complete
    why: str  # it failed; empty otherwise


class Study:
    """The journal in ``folder``, made where there is none.

    Raises:
        UserError: optuna is missing.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        self._optuna = import_optuna()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._folder, self._space = folder, space
        journal = self._optuna.storages.journal
        path = str(folder / JOURNAL)
        backend = journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
        self._storage = self._optuna.storages.JournalStorage(backend)
        name = {"storage": self._storage, "study_name": space.study}
        try:
            self._study = self._optuna.load_study(**name)  # without a word in the journal
        except KeyError:
            self._study = self._optuna.create_study(**name, direction="maximize", load_if_exists=True)

    def trials(self) -> list[Trial]:
        """All that a worker has begun, in their order."""
        return [self._trial(trial) for trial in self._study.get_trials(deepcopy=False) if WORKER in trial.user_attrs]

    def take(self, worker: int) -> Trial | None:
        """The next trial to train: the one that an earlier life of this worker left, else a new one, if any is left.

        A new one is drawn by a sampler seeded by (seed, number of the trial): a worker that starts again draws nothing
        twice, and a sweep of one worker is the same however often that happens.
        """
        with self._alone():
            trials = self.trials()
            for trial in trials:
                if (trial.worker, trial.state) == (worker, "running"):
                    return trial
            if len(trials) >= self._space.trials:
                return None
            begun = self._study.get_trials(deepcopy=False)
            for trial in begun:
                if WORKER not in trial.user_attrs and not trial.state.is_finished():  # whoever drew it died right then
                    self.fail(trial.number, "its worker died before it began")
            seed = int(np.random.SeedSequence((self._space.seed, len(begun))).generate_state(1)[0])
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            drawn = self._study.ask({key: self._distribution(p) for key, p in self._space.parameters.items()})
            drawn.set_user_attr(WORKER, worker)
            return next(trial for trial in self.trials() if trial.number == drawn.number)

    def complete(self, number: int, value: float) -> None:
        """Note a trial's value."""
        self._study.tell(number, value)

    def fail(self, number: int, why: str) -> None:
        """Note that a trial has none."""
        study = self._storage.get_study_id_from_name(self._space.study)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.set_trial_user_attr(trial, WHY, why)
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self._optuna.storages.journal.JournalFileOpenLock(str(self._folder / "take"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _distribution(self, parameter: Range | Choices) -> Any:
        kinds = self._optuna.distributions
        if isinstance(parameter, Choices):
            return kinds.CategoricalDistribution(parameter.words)
        if parameter.is_integer:
            return kinds.IntDistribution(parameter.low, parameter.high, parameter.log, parameter.step or 1)
        return kinds.FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)

    def _trial(self, trial: Any) -> Trial:
        names = self._optuna.trial.TrialState
        state = {names.COMPLETE: "complete", names.FAIL: "failed"}.get(trial.state, "running")
        words = {
            key: trial.params[key] if isinstance(parameter, Choices) else as_word(trial.params[key])
            for key, parameter in self._space.parameters.items()
        }
        attributes = trial.user_attrs
        value = trial.value if state == "complete" else None
        return Trial(trial.number, attributes[WORKER], state, words, value, attributes.get(WHY, ""))


def best_of(trials: list[Trial]) -> Trial | None:
    """The trial of the highest value, the first of equals; None where none is complete."""
    complete = [trial for trial in trials if trial.value is not None]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def import_optuna() -> Any:
    """optuna, which comes with an extra."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install it with pip install -e '.[sweep]'") from None
    return optuna
