# SPDX-License-Identifier: BSD-3-Clause
"""Eventfds that a client has sent: signalled and read without ever waiting for the client."""

import errno
import logging
import os
import select
import stat

from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.transport.fds import OwnedFd

logger = logging.getLogger(__name__)

_ONE = (1).to_bytes(8, "little")


def require_eventfd(fd: OwnedFd) -> None:
    """RemoteProtocolError (EINVAL) unless `fd` is an eventfd: the kernel's VFIO takes nothing else either.

    On a pipe or socket a write may block, fail with SIGPIPE or be read as data by somebody.
    """
    try:
        name = os.readlink(f"/proc/self/fd/{fd.fileno()}")
    except OSError:  # no /proc: an anonymous inode at least is no pipe, socket or file
        good = stat.S_IFMT(os.fstat(fd.fileno()).st_mode) == 0
    else:
        good = name == "anon_inode:[eventfd]"
    if not good:
        raise RemoteProtocolError("a file descriptor of SET_IRQS is not an eventfd")


def drain(fd: int) -> bool:
    """Take the count of an eventfd, if there is one. Whether there was.

    The other side holds the same open file, may have read it a moment ago and may have made it blocking,
    so it is asked with RWF_NOWAIT (position -1: as read(2) does).
    """
    try:
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    except BlockingIOError:
        return False


class Eventfd:
    """Owns the client's eventfd.

    Its O_NONBLOCK flag is left as it is: the flag belongs to the open file that the client shares, and a
    client that waits in a blocking read would get EAGAIN. So `signal` asks first whether the counter has
    room. (A client that fills its own blocking counter to 2**64 - 2 between the question and the write
    could still hold us up, until it reads it.)
    """

    __slots__ = ("_fd", "_poll", "_reported")

    def __init__(self, fd: OwnedFd) -> None:
        require_eventfd(fd)
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd.fileno(), select.POLLOUT)
        self._reported = False

    def fileno(self) -> int:
        return self._fd.fileno()

    def signal(self) -> None:
        """Add one. A full counter needs nothing: its reader has not seen the last signal yet."""
        try:
            if self._poll.poll(0):
                os.write(self._fd.fileno(), _ONE)
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        if error.errno != errno.EAGAIN and not self._reported:
            self._reported = True
            logger.error("an eventfd of the client cannot be used: %s", error.strerror)

    def close(self) -> None:
        self._fd.close()
