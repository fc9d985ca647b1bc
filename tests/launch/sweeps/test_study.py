"""The study that the workers of a sweep share."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend

from launch.sweeps.report import status_text
from launch.sweeps.space import as_argument
from launch.sweeps.study import best_of
from launch.sweeps.worker import Worker
from launch.sweeps.worker import main as run_worker
from tests.fixtures.demo_runs import METRIC
from tests.fixtures.processes import REPOSITORY
from tests.fixtures.sweeps import start_sweep, trials_of, write_space
from tests.fixtures.training import refusal

TAKE_ALL = """
import sys
from pathlib import Path
from launch.sweeps.folder import open_folder
_, study = open_folder(Path(sys.argv[1]))
numbers = []
while (trial := study.take(int(sys.argv[2]))) is not None:
    study.complete(trial.number, trial.number / 7)
    numbers.append(trial.number)
print(numbers)
"""


def test_workers_share_exactly_the_requested_trials(tmp_path: Path) -> None:
    """Three processes take trials as fast as they can; no trial is taken twice, and there are as many as requested."""
    folder = tmp_path / "sweep"
    start_sweep(write_space(tmp_path, trials=12), folder)
    commands = [[sys.executable, "-c", TAKE_ALL, str(folder), str(worker)] for worker in range(3)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for command in commands]
    taken = [yaml.safe_load(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(sum(taken, [])) == list(range(12))
    trials = trials_of(folder)
    assert [trial.number for trial in trials] == list(range(12))
    for worker, numbers in enumerate(taken):
        assert numbers == [trial.number for trial in trials if trial.worker == worker]
    assert len({trial.parameters["train.lr"] for trial in trials}) == 12
    best = best_of(trials)
    assert best is not None and best.number == 11


def test_a_restarted_worker_draws_the_same_trials(tmp_path: Path) -> None:
    """A worker that restarts for every trial draws the same as one that never stops."""
    path = write_space(tmp_path, trials=12, sampler={"seed": 5})
    parameters = []
    for folder, lives in ((tmp_path / "one", 1), (tmp_path / "many", 12)):
        for _ in range(lives):
            _, study = start_sweep(path, folder)
            for _ in range(12 // lives):
                trial = study.take(0)
                assert trial is not None
                study.complete(trial.number, float(trial.parameters["train.lr"]))
        parameters.append([trial.parameters for trial in trials_of(folder)])
    assert parameters[0] == parameters[1]


def test_the_first_trial_is_the_base(tmp_path: Path) -> None:
    """It has the base's own values, also after a worker died between drawing a trial and taking it, at either point."""
    path = write_space(tmp_path, trials=3)
    space, study = start_sweep(path, tmp_path / "sweep")
    own = {"train.lr": as_argument(space.config().train.lr)}
    first, second = study.take(0), study.take(1)
    assert first is not None and second is not None
    assert first.parameters == own != second.parameters
    study.complete(first.number, 0.25)
    study.complete(second.number, 0.5)
    text = status_text(tmp_path / "sweep", space, study.trials())
    assert f"best: trial 1, validation {METRIC} 0.500000" in text
    assert f"the base's own values: trial 0, validation {METRIC} 0.250000" in text
    for died_after in ("enqueue", "ask"):
        _, study = start_sweep(path, tmp_path / died_after)
        if died_after == "enqueue":
            study._study.enqueue_trial(space.base_values())
        else:
            study._study.ask()
        taken = study.take(0)
        assert taken is not None and taken.parameters == own


def test_a_trial_stays_with_its_worker(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path, trials=2), tmp_path / "sweep"
    _, study = start_sweep(path, folder)
    first = study.take(1)
    assert start_sweep(path, folder)[1].take(1) == first
    other = study.take(0)
    assert first is not None and other is not None and (first.number, other.number) == (0, 1)
    assert study.take(2) is None
    study.fail(other.number, "FloatingPointError: loss")
    assert study.take(0) is None
    states = [(trial.state, trial.value, trial.why) for trial in trials_of(folder)]
    assert states == [("running", None, ""), ("failed", None, "FloatingPointError: loss")]
    assert best_of(trials_of(folder)) is None


def test_a_trial_whose_worker_died_while_drawing_it_does_not_count(tmp_path: Path) -> None:
    path, folder = write_space(tmp_path, trials=1), tmp_path / "sweep"
    space, study = start_sweep(path, folder)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    optuna.load_study(storage=storage, study_name=space.study).ask()  # and records no worker
    trial = study.take(0)
    assert trial is not None and trial.number == 1
    assert [trial.number for trial in trials_of(folder)] == [1]
    assert study.take(1) is None
    drawn, _ = optuna.load_study(storage=storage, study_name=space.study).trials
    assert (drawn.state.name, drawn.user_attrs) == ("FAIL", {"why": "its worker died before the trial started"})


def test_the_journal_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna unpickles the snapshots of backends that write them; ours writes lines of JSON."""

    def unpickled(*_: object) -> None:
        raise AssertionError("unpickled")

    path, folder = write_space(tmp_path, trials=120), tmp_path / "sweep"  # Optuna takes a snapshot every hundred trials
    _, study = start_sweep(path, folder)
    while (trial := study.take(0)) is not None:
        study.complete(trial.number, 0.0)
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, unpickled)
    assert len(trials_of(folder)) == 120
    assert all(isinstance(json.loads(line), dict) for line in (folder / "journal.log").read_text().splitlines())


def test_a_folder_that_goes_while_its_worker_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and no new folder."""
    folder = tmp_path / "sweep"
    start_sweep(write_space(tmp_path), folder)
    monkeypatch.setattr(Worker, "_train", lambda *_: folder.rename(tmp_path / "moved"))
    line = refusal(run_worker, folder, 0)
    assert line == f"error: the sweep's folder {folder} does not exist, or was deleted or moved meanwhile"
    assert not folder.exists()
