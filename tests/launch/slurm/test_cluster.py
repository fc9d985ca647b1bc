"""The SLURM of the tests itself: what it says when it cannot start, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.fixtures.processes import REPOSITORY
from tests.fixtures.slurm_cluster import PACKAGES, SYSTEM_PATH, SlurmCluster

pytestmark = pytest.mark.slurm

START_AND_SLEEP = """
import time
from tests.fixtures.slurm_cluster import SYSTEM_PATH, SlurmCluster
with SlurmCluster(1) as cluster:
    print(cluster.folder, flush=True)
    time.sleep(100)
"""


def processes_of(folder: Path) -> list[str]:
    """The processes, on this machine or one of the cluster's, that belong to the cluster with this state folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile, or is not ours
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                found.append(process.name())
    return found


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def test_two_clusters_at_once(slurm: SlurmCluster) -> None:
    """They share neither addresses nor anything of this machine's network; the second leaves the first alone."""
    before = interfaces()
    with SlurmCluster(2) as other:
        assert interfaces() == before
        assert sorted(other.call("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]
        assert {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"} <= set(processes_of(other.folder))
        other.submit("--wrap=sleep 100", "--output=/dev/null")
    assert processes_of(other.folder) == []
    assert not other.folder.exists()
    assert sorted(slurm.call("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]


@pytest.mark.parametrize(("variables", "ending"), [({}, "1 skipped"), ({"CI": "true"}, "1 error")], ids=["here", "CI"])
def test_without_slurm(variables: dict[str, str], ending: str, slurm: SlurmCluster) -> None:
    """On a machine whose slurmd cannot be run: skipped with the reason, but CI fails."""
    test = f"{Path(__file__).relative_to(REPOSITORY)}::test_failed_start"
    slurmd = shutil.which("slurmd", path=SYSTEM_PATH)
    command = f"mount --bind /dev/null {slurmd} && {sys.executable} -m pytest -p no:cacheprovider {test}"
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | variables
    result = subprocess.run(
        ["unshare", "--mount", "bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert f"= {ending} in " in result.stdout
    assert (result.returncode == 0) == ("CI" not in variables)
    assert f"no SLURM cluster without slurmd; as root: apt-get install {PACKAGES}\n" in result.stdout


def test_failed_start(slurm: SlurmCluster) -> None:
    cluster = SlurmCluster(1)
    (cluster.folder / "munge.socket").mkdir()  # where munged makes a socket
    with pytest.raises(RuntimeError, match=r"SLURM did not start \(the head answers: head went off\)") as said, cluster:
        pass
    assert "munged" in str(said.value)
    assert processes_of(cluster.folder) == []
    assert not cluster.folder.exists()


def test_nothing_outlives_the_process_that_started_it(slurm: SlurmCluster) -> None:
    command = [sys.executable, "-c", START_AND_SLEEP]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"} <= set(processes_of(folder))
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(folder) == []
    shutil.rmtree(folder)
