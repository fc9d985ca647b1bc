"""The trials of a sweep, in a study of Optuna that all its workers share.

Its journal is a file of JSON lines on a shared file system; nothing in it is pickled. A writer holds a lock file, made
by an exclusive open, which works on NFS too. A second such lock covers counting the trials and assigning a new one to
its worker, so that there are never more trials than requested, and each has one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.json_text import read_objects
from launch.sweeps.space import NumberRange, SearchSpace, ValueChoices, as_argument

JOURNAL = "journal.log"
WORKER, WHY = "worker", "why"  # attributes of a trial: the index of its worker; why it failed


@dataclass(frozen=True)
class Trial:
    """One set of parameters, and what became of it."""

    number: int
    worker: int
    state: str  # running | complete | failed
    parameters: dict[str, str]  # arguments, by key
    value: float | None  # of the metric on validation; None unless complete
    why: str  # it failed; empty otherwise


class SweepStudy:
    """The study whose journal is in ``folder``; created where there is none.

    Raises:
        UserError: optuna is missing, or the journal is damaged.
    """

    def __init__(self, folder: Path, space: SearchSpace) -> None:
        self._optuna = import_optuna()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._folder, self._space = folder, space
        journal = self._optuna.storages.journal
        path = str(folder / JOURNAL)
        backend = journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
        try:
            self._storage = self._optuna.storages.JournalStorage(backend)  # reads all lines
        except OSError:
            raise
        except Exception as error:  # each kind of damage has its own
            _refuse_damaged(folder / JOURNAL, error)
        name = {"storage": self._storage, "study_name": space.study}
        try:
            self._study = self._optuna.load_study(**name)  # writes nothing to the journal
        except KeyError:
            self._study = self._optuna.create_study(**name, direction="maximize", load_if_exists=True)

    def trials(self) -> list[Trial]:
        """All trials that have a worker, by number."""
        return [self._trial(trial) for trial in self._study.get_trials(deepcopy=False) if WORKER in trial.user_attrs]

    def take(self, worker: int) -> Trial | None:
        """The next trial to train: the unfinished one of this worker, else a new one; None if none is left.

        The first one has the base's own values, where the space has them.
        A new one is drawn by a sampler seeded by (seed, number of the trial): a restarted worker draws no trial twice,
        and a sweep with one worker has the same trials however often the worker restarts.
        """
        with self._exclusively():
            trials = self.trials()
            for trial in trials:
                if (trial.worker, trial.state) == (worker, "running"):
                    return trial
            if len(trials) >= self._space.trials:
                return None
            drawn_before = self._study.get_trials(deepcopy=False)
            waiting = self._optuna.trial.TrialState.WAITING
            for trial in drawn_before:
                if WORKER not in trial.user_attrs and not trial.state.is_finished() and trial.state != waiting:
                    self.fail(trial.number, "its worker died before the trial started")
            seed = int(np.random.SeedSequence((self._space.seed, len(drawn_before))).generate_state(1)[0])
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            base_values = self._space.base_values()
            if base_values is not None and not trials and all(trial.state != waiting for trial in drawn_before):
                self._study.enqueue_trial(base_values)  # the next one asked for
            drawn = self._study.ask({key: self._distribution(p) for key, p in self._space.parameters.items()})
            drawn.set_user_attr(WORKER, worker)
            return next(trial for trial in self.trials() if trial.number == drawn.number)

    def complete(self, number: int, value: float) -> None:
        """Record a trial's value."""
        self._study.tell(number, value)

    def fail(self, number: int, why: str) -> None:
        """Record that a trial failed."""
        study = self._storage.get_study_id_from_name(self._space.study)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.set_trial_user_attr(trial, WHY, why)
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        lock = self._optuna.storages.journal.JournalFileOpenLock(str(self._folder / "take"))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _distribution(self, parameter: NumberRange | ValueChoices) -> Any:
        kinds = self._optuna.distributions
        if isinstance(parameter, ValueChoices):
            return kinds.CategoricalDistribution(parameter.arguments)
        if parameter.is_integer:
            return kinds.IntDistribution(parameter.low, parameter.high, parameter.log, parameter.step or 1)
        return kinds.FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)

    def _trial(self, trial: Any) -> Trial:
        names = self._optuna.trial.TrialState
        state = {names.COMPLETE: "complete", names.FAIL: "failed"}.get(trial.state, "running")
        parameters = {
            key: trial.params[key] if isinstance(parameter, ValueChoices) else as_argument(trial.params[key])
            for key, parameter in self._space.parameters.items()
        }
        return Trial(
            number=trial.number,
            worker=trial.user_attrs[WORKER],
            state=state,
            parameters=parameters,
            value=trial.value if state == "complete" else None,
            why=trial.user_attrs.get(WHY, ""),
        )


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    """Say what is wrong with a journal that optuna cannot read.

    Raises:
        UserError: always; with the first line that is not an object, if there is one.
    """
    mend = "restore it from a copy, or start the sweep in another --folder"
    for _ in read_objects(path, mend):
        pass
    problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UserError(f"{path} is not a sweep's journal ({problem}); {mend}") from None


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest value, the first of equals; None if none is complete."""
    complete = [trial for trial in trials if trial.value is not None]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def import_optuna() -> Any:
    """optuna, which is in an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install it with pip install -e '.[sweep]'") from None
    return optuna
