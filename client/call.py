# SPDX-License-Identifier: BSD-3-Clause
"""One request under way, and what becomes of the descriptors on both its ways."""

import trio

from vfio_user.protocol.constants import Command
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.events import Reply, Request
from vfio_user.transport.fds import OwnedFd


class Call:
    """One request under way. `result` is set when it is over; `task` is who sleeps for it."""

    __slots__ = ("abandoned", "command", "deadline", "result", "task")

    def __init__(self, command: Command, deadline: float) -> None:
        self.command = command
        self.deadline = deadline
        self.result: Reply | VfioUserError | None = None
        self.task: trio.lowlevel.Task | None = None
        self.abandoned = False


class FdNumber:
    """A descriptor that stays the caller's, as `Connection.request` wants to see it."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Nothing: it is borrowed."""


def owned_fds(event: Reply | Request) -> list[OwnedFd]:
    """The descriptors of an event: the channel makes nothing but `OwnedFd`."""
    return [fd for fd in event.fds if isinstance(fd, OwnedFd)]
