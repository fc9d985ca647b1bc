"""The processes of a build that ``accelerate launch`` or ``torchrun`` starts: each encodes a share, the first builds.

They meet twice, through gloo: rows go through the build folder, so nothing else has to pass between them. A GPU per
process is chosen by its local rank; the launcher's precision and engine play no part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from fmrl_dist.base.errors import UserError
from fmrl_dist.base.launch_variables import is_alone, refuse_one_process_trap
from fmrl_dist.base.parts import Part

if TYPE_CHECKING:
    import torch.distributed as dist

PATIENCE = timedelta(days=30)  # one may encode for days longer than another
MEETING_PATIENCE = timedelta(minutes=10)  # but all are started together
POLL_S = 0.1


@dataclass(frozen=True)
class BuildProcesses:
    """This process among those of its build."""

    number: int = 0  # of this one
    count: int = 1
    group: dist.ProcessGroup | None = None  # in which they meet; None if there is one

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def share_of(self, part: Part) -> Part:
        """What this process does of a part of the build."""
        return Part((part.number - 1) * self.count + self.number + 1, part.count * self.count)

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            UserError: one of them has ended.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        try:
            arrival = dist.barrier(self.group, async_op=True)
            while not arrival.is_completed():  # here a signal ends this process; it would not within the call
                time.sleep(POLL_S)
            arrival.wait()
        except RuntimeError:
            raise UserError(
                "another process of this build has ended before it had encoded its share; its last line says why: "
                "mend that, and start the build again, which finds what was encoded"
            ) from None


@contextmanager
def build_processes() -> Iterator[BuildProcesses]:
    """Meet the other processes that a launcher has started with this one, if any.

    Raises:
        UserError: several processes were requested but one was started, or the launcher's variables are incomplete.
    """
    refuse_one_process_trap(os.environ)
    if is_alone(os.environ):
        yield BuildProcesses()
        return
    import torch  # which other builds do without
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("gloo", timeout=MEETING_PATIENCE)
    except RuntimeError:
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes of this build (WORLD_SIZE) did not meet within "
            f"{MEETING_PATIENCE.seconds // 60} minutes; start all of them together, with accelerate launch"
        ) from None
    try:
        yield BuildProcesses(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=PATIENCE, backend="gloo"))
    finally:
        dist.destroy_process_group()
