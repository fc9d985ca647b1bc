"""A real SLURM cluster of several nodes on this machine, for the length of a test session (root only).

The head and every node are a :class:`~tests.machine.Machine`. The head's network namespace holds a bridge, and every
node's ``eth0`` is on it. No namespace has a route to anywhere else, so nothing reaches the cluster from outside or
leaves it, and several clusters can be up at once: they share no address, port, name or file. SLURM's commands are
called from within the head's network (:meth:`SlurmCluster.call`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.machine import NAMESPACES, Machine
from tests.processes import REPOSITORY, TAIL_CHARACTERS, clean_environment

PROGRAMS = (
    *("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "scontrol", "sinfo", "sacct", "sacctmgr"),
    *("mariadb-install-db", "mariadbd", "mariadb", "ip", "nsenter", "unshare"),
)
PACKAGES = "munge slurmctld slurmd slurmdbd slurm-client mariadb-server iproute2 util-linux"
MUNGE_FILES = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "munged.seed"}
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
CPUS_PER_NODE, GPUS_PER_NODE = 8, 2  # what a node claims to have, whatever this machine has
POLL_S = 0.2
START_S = 60.0
CALL_S = 30.0
JOB_S = 240.0
RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def what_is_missing() -> str:
    """One line that says what a cluster needs and this machine lacks, and how to get it; empty where all is there."""
    if absent := [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]:
        return f"no SLURM cluster without {', '.join(absent)}; as root: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "no SLURM cluster without root: its nodes are namespaces of this machine; run the tests as root"
    made = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no SLURM cluster: this machine makes no namespaces ({made.stderr.strip()}); run where root may"
    return ""


@dataclass(frozen=True)
class Job:
    """A job that has ended."""

    id: int
    state: str  # COMPLETED | FAILED | …
    exit_code: str  # of the batch script, and the signal that ended it: "0:0"
    log: str


class SlurmCluster:
    """A head and nodes ``node1``, ``node2``, …; as a context, it begins with all nodes idle and leaves no trace."""

    def __init__(self, num_nodes: int):
        self.node_names = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="fmrl-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)  # munged refuses a socket that not every user could reach
        self._machines: dict[str, Machine] = {}
        self._environment = client_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Power on all machines; returns when every node is idle.

        Raises:
            RuntimeError: that did not happen; the message ends with what the daemons wrote.
        """
        write_configuration(self.folder, self.node_names)
        self._power_on_head()
        self._wait_until("the head answers", lambda: self._try("scontrol", "ping").endswith("UP"))
        for number in range(1, len(self.node_names) + 1):
            self._power_on_node(number)
        idle = [f"{name} idle" for name in self.node_names]
        query = ("sinfo", "--noheader", "--Node", "--format=%N %T")
        self._wait_until("all nodes are idle", lambda: sorted({*self._try(*query).splitlines()}) == idle)

    def stop(self) -> None:
        """Power off all machines and remove the state folder."""
        for machine in reversed(self._machines.values()):
            machine.power_off()
        shutil.rmtree(self.folder)

    def call(self, *words: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Run one of SLURM's commands from the repository's root, as a user at the head would; returns its output.

        Raises:
            AssertionError: it failed; the message is what it wrote.
        """
        result = self.command(*words, environment=environment)
        assert result.returncode == 0, f"{shlex.join(map(str, words))}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def command(
        self, *words: str | Path, environment: Mapping[str, str] | None = None, timeout_s: float = CALL_S
    ) -> subprocess.CompletedProcess[str]:
        """Run any command as :meth:`call` does, however it ends."""
        return subprocess.run(
            self._machines["head"].inside(*words),
            cwd=REPOSITORY,
            env=self._environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def submit(self, *words: object, environment: Mapping[str, str] | None = None) -> int:
        """``sbatch words`` from the repository's root, with ``environment`` on top; returns the job's id."""
        return int(self.call("sbatch", "--parsable", *map(str, words), environment=environment))

    def facts(self, job_id: int | str) -> dict[str, str]:
        """What ``scontrol show job`` knows about a job, or about an array's task (``12_3``): JobState, StdOut, …"""
        words = self.call("scontrol", "-o", "show", "job", str(job_id)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: int | str, timeout_s: float = JOB_S) -> Job:
        """Wait for a job, or an array's task (``12_3``), to end, however it ends.

        Raises:
            AssertionError: it was not over after ``timeout_s``; it is cancelled, and the message shows its log's end.
        """
        deadline = time.monotonic() + timeout_s
        while not self._has_ended(job_id):
            facts = self.facts(job_id)
            if time.monotonic() > deadline:
                self.call("scancel", str(job_id))
                end = f"{read_log(facts)[-TAIL_CHARACTERS:]}\n{self._tails()}"
                raise AssertionError(f"job {job_id} was {facts['JobState']} after {timeout_s} s:\n{end}")
            time.sleep(POLL_S)
        facts = self.facts(job_id)
        return Job(int(facts["JobId"]), facts["JobState"], facts["ExitCode"], read_log(facts))

    def _has_ended(self, job_id: int | str) -> bool:
        """Whether a job is over, and stays so: one that is submitted again looks as if it were, for a moment."""
        for pause_s in (0.0, 2.0):
            time.sleep(pause_s)
            if self.facts(job_id)["JobState"] in RUNNING:
                return False
        return True

    def run(self, *words: object, environment: Mapping[str, str] | None = None, timeout_s: float = JOB_S) -> Job:
        """Submit a job and wait for it to complete.

        Raises:
            AssertionError: it ended otherwise, or not in time; the message shows the end of its log.
        """
        job = self.wait(self.submit(*words, environment=environment), timeout_s)
        ending = f"job {job.id} is {job.state}, exit code {job.exit_code}:\n{job.log[-TAIL_CHARACTERS:]}"
        assert job.state == "COMPLETED", ending
        return job

    def crash(self, node: str) -> None:
        """Cut a node's power, in the middle of whatever it does."""
        self._machines.pop(node).power_off()

    def boot(self, node: str) -> None:
        """Power a node on again."""
        self._power_on_node(int(node.removeprefix("node")))

    def _power_on_head(self) -> None:
        munge = [f"--{kind}-file={self.folder / name}" for kind, name in MUNGE_FILES.items()]
        services: list[list[str | Path]] = [
            ["munged", f"--socket={self.folder / 'munge.socket'}", *munge],
            ["bash", self.folder / "accounting"],
            ["slurmctld"],
        ]
        head = self._machines["head"] = Machine("head", self.folder, services, self._environment)
        self._network(head, "link", "add", "bridge", "type", "bridge")
        self._network(head, "addr", "add", f"{address('head')}/24", "dev", "bridge")
        self._network(head, "link", "set", "bridge", "up")
        head.start_services()

    def _power_on_node(self, number: int) -> None:
        name, head, port = f"node{number}", self._machines["head"], f"port{number}"
        node = self._machines[name] = Machine(name, self.folder, [["slurmd", "-N", name]], self._environment)
        ends = ["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid)]
        self._network(head, *ends)
        self._network(head, "link", "set", port, "master", "bridge", "up")
        self._network(node, "addr", "add", f"{address(name)}/24", "dev", "eth0")
        self._network(node, "link", "set", "eth0", "up")
        node.start_services()

    def _network(self, machine: Machine, *words: str) -> None:
        subprocess.run(machine.inside("ip", *words), env=self._environment, check=True, timeout=CALL_S)

    def _try(self, *words: str) -> str:
        """A command's output, or nothing where it fails."""
        try:
            return self.call(*words)
        except (AssertionError, subprocess.TimeoutExpired):
            return ""

    def _wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            off = [machine.name for machine in self._machines.values() if not machine.is_on()]
            if off or time.monotonic() > deadline:
                why = f"{', '.join(off)} went off" if off else f"not within {START_S} s"
                raise RuntimeError(f"SLURM did not start ({what}: {why})\n{self._tails()}")
            time.sleep(POLL_S)

    def _tails(self) -> str:
        """The end of what every machine and daemon has written."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-TAIL_CHARACTERS:]}" for log in logs)


def client_environment() -> dict[str, str]:
    """The environment without what a launcher, or SLURM around pytest, has set; daemons can be found in its PATH."""
    kept = clean_environment().items()
    environment = {name: value for name, value in kept if not name.startswith(("SLURM", "SBATCH_", "SRUN_", "FMRL_"))}
    return environment | {"PATH": SYSTEM_PATH, "CUDA_VISIBLE_DEVICES": ""}


def address(machine: str) -> str:
    return f"10.0.0.{254 if machine == 'head' else machine.removeprefix('node')}"


def write_configuration(folder: Path, node_names: Sequence[str]) -> None:
    """What the daemons read: slurm.conf, slurmdbd.conf, gres.conf, munge's key, and /etc/hosts of every machine."""
    machines = ["head", *node_names]
    hosts = ["127.0.0.1 localhost", *(f"{address(name)} {name}" for name in machines)]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for number in range(GPUS_PER_NODE):  # slurmd counts the device files that it finds
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
    (folder / "state").mkdir()
    write_accounting(folder)
    nodes = [
        f"NodeName={name} NodeAddr={address(name)} CPUs={CPUS_PER_NODE} Gres=gpu:{GPUS_PER_NODE}" for name in node_names
    ]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"head({address('head')})",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire=5",  # a requeued job waits as long
        "SlurmUser": "root",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "SlurmdParameters": "config_overrides",  # a node has the CPUs it claims
        "ProctrackType": "proctrack/linuxproc",  # control groups cannot be had everywhere
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "GresTypes": "gpu",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=2",  # seconds until it looks again
        "MinJobAge": 3600,  # seconds that scontrol remembers a job
        "ReturnToService": 2,
        "SlurmdTimeout": 10,  # then a node is down
        "KillWait": 20,  # from TERM to KILL
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": address("head"),
        "AccountingStoragePass": folder / "munge.socket",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    common = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP"
    lines += [*nodes, f"PartitionName=main Default=YES {common} PriorityTier=1 GraceTime=20"]
    lines += [f"PartitionName=urgent {common} PriorityTier=2 PreemptMode=OFF"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def write_accounting(folder: Path) -> None:
    """slurmdbd.conf, and the script that starts accounting, which sacct asks: a database on the head, and slurmdbd.

    Nothing but the cluster reaches the database, so it knows no users; nothing is kept, so it waits for no disk.
    """
    settings = {
        "DbdHost": "head",
        "DbdAddr": address("head"),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'}",
        "SlurmUser": "root",
        "LogFile": folder / "slurmdbd.log",
        "PidFile": folder / "slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1",
        "StorageUser": "root",
        "CommitDelay": 1,
    }
    (folder / "slurmdbd.conf").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    (folder / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists
    socket = f"--socket={folder / 'database.socket'}"
    options = [
        *("--no-defaults", "--user=root", f"--datadir={folder / 'database'}", socket, f"--tmpdir={folder}"),
        *("--innodb-log-file-size=4M", "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"),
    ]
    run = ["--bind-address=127.0.0.1", "--skip-grant-tables", f"--pid-file={folder / 'database.pid'}"]
    steps = [
        "set -e",
        f"{shlex.join(['mariadb-install-db', *options, '--skip-test-db'])} > {folder / 'database.log'} 2>&1",
        f"{shlex.join(['mariadbd', *options, *run])} >> {folder / 'database.log'} 2>&1 &",
        f"until mariadb --no-defaults {socket} --execute='' 2> /dev/null; do kill -0 $!; sleep 0.05; done",
        "slurmdbd",
        "until sacctmgr --immediate add cluster test > /dev/null 2>&1; do sleep 0.05; done",
    ]
    (folder / "accounting").write_text("\n".join(steps) + "\n")


def read_log(facts: Mapping[str, str]) -> str:
    """What a job has written, both streams; nothing where it has not started."""
    path = Path(facts["StdOut"])
    return path.read_text(errors="replace") if path.exists() else ""
