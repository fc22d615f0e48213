# SPDX-License-Identifier: BSD-3-Clause
"""What a request can end with, besides its reply."""

import errno as _errno
import os

from vfio_user.protocol.constants import Command
from vfio_user.protocol.errors import VfioUserError


class RemoteError(VfioUserError):
    """The server answered with an error. `errno` is what it said, and may be 0."""

    def __init__(self, command: Command, errno: int) -> None:
        super().__init__(f"{command.name}: the server answers {_name(errno)}", errno)
        self.command = command


class ReplyTimeout(VfioUserError):
    """No reply came in time. The connection stays; a late reply is dropped."""

    default_errno = _errno.ETIMEDOUT


def _name(errno: int) -> str:
    return f"{_errno.errorcode.get(errno, errno)} ({os.strerror(errno)})"
