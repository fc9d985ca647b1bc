"""The SLURM of the tests itself: its message when it cannot start, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shlex
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
TEST_TWICE = """
import os, sys
import pytest
arguments = ["-p", "no:cacheprovider", sys.argv[1]]
os.environ.pop("CI", None)
here = pytest.main(arguments)
os.environ["CI"] = "true"
print("exit codes:", int(here), int(pytest.main(arguments)))
"""


def processes_of(folder: Path) -> list[str]:
    """The processes of the cluster with this state folder, on all its machines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or belongs to another user
            if process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                found.append(process.name())
    return found


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def test_two_clusters_at_once(slurm: SlurmCluster) -> None:
    """They share neither addresses nor this machine's network; the second does not disturb the first."""
    before = interfaces()
    with SlurmCluster(2) as other:
        assert interfaces() == before
        assert sorted(other.call("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]
        assert {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"} <= set(processes_of(other.folder))
        other.submit("--wrap=sleep 100", "--output=/dev/null")
    assert processes_of(other.folder) == []
    assert not other.folder.exists()
    assert sorted(slurm.call("srun", "--nodes=2", "hostname").split()) == ["node1", "node2"]


def test_without_slurm(slurm: SlurmCluster) -> None:
    """On a machine whose slurmd cannot run, a test is skipped and names the reason; where CI is set, it fails."""
    test = f"{Path(__file__).relative_to(REPOSITORY)}::test_failed_start"
    slurmd = shutil.which("slurmd", path=SYSTEM_PATH)
    command = shlex.join([sys.executable, "-c", TEST_TWICE, test])
    result = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"mount --bind /dev/null {slurmd} && {command}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    here, in_ci = result.stdout.split("short test summary info")[1:]
    reason = f"no SLURM cluster without slurmd; as root: apt-get install {PACKAGES}\n"
    assert "= 1 skipped in " in here and reason in here
    assert "= 1 error in " in in_ci and reason in result.stdout.split("= 1 skipped in ")[1]
    assert result.stdout.endswith("exit codes: 0 1\n")


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
