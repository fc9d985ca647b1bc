"""A computer that is only a process in network, host name, IPC, mount and PID namespaces of its own (root only).

A machine is on as long as its standard input is open. Whatever ends the test process, also ``kill -9``, closes it; the
kernel then ends all processes of the machine's PID namespace, and with the last of them the network is gone. There is
nothing to find and clean up but the state folder.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.processes import TAIL_CHARACTERS

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


class Machine:
    """One computer, on from its construction until :meth:`power_off`."""

    def __init__(self, name: str, folder: Path, services: Sequence[Sequence[str | Path]], environment: dict[str, str]):
        """Power on, with ``folder / "hosts"`` as /etc/hosts.

        Args:
            name: the host name.
            folder: where the machine writes its log.
            services: commands that go into the background by themselves; :meth:`start_services` starts them in turn.
            environment: of the services.

        Raises:
            RuntimeError: the namespaces cannot be made; the message ends with why.
        """
        self.name, self.log = name, folder / f"{name}.log"
        boot = [
            "set -e",
            f"hostname {name}",
            f"mount --bind {folder / 'hosts'} /etc/hosts",
            "ip link set lo up",
            "echo up",
            "read -r _",
            *(shlex.join(map(str, command)) for command in services),
            "cat",  # ends with standard input; meanwhile bash, the first process, reaps what others leave behind
            "exit",  # so that cat is not the last command, for which bash would make room
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", *NAMESPACES, "bash", "-c", "\n".join(boot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # an interrupt at the keyboard is for pytest alone, which then powers off
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            self.power_off()
            raise RuntimeError(f"{name} did not start: {self.tail()}")

    @property
    def pid(self) -> int:
        """A process in the machine's network."""
        return self._process.pid

    def inside(self, *words: str | Path) -> list[str]:
        """The command ``words``, to be run in the machine's network and otherwise outside it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *map(str, words)]

    def start_services(self) -> None:
        """Start the services, once the network is plugged in; one that fails powers the machine off."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def is_on(self) -> bool:
        return self._process.poll() is None

    def power_off(self) -> None:
        """End every process of the machine, at once; returns when none is left."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL_CHARACTERS:]
