# SPDX-License-Identifier: BSD-3-Clause
"""File descriptors with one owner each, closed exactly once."""

import contextlib
import os
import socket
import stat
import struct
import warnings
from collections.abc import Iterable
from types import TracebackType


class OwnedFd:
    """Owns a descriptor: whoever holds this object closes it, or passes the object on.

    One that is lost without `close` or `detach` is closed with a ResourceWarning: that is a bug.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor. ValueError when it has been closed or detached."""
        if self._fd < 0:
            raise ValueError("this file descriptor has been closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to close."""
        return self._fd < 0

    def detach(self) -> int:
        """Give the descriptor away: the caller closes it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def duplicate(self) -> "OwnedFd":
        """A second descriptor of the same open file, with an owner of its own."""
        return OwnedFd(os.dup(self.fileno()))

    def close(self) -> None:
        """Close the descriptor; harmless when it is closed already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _do_not_linger(fd)
            os.close(fd)

    def __enter__(self) -> "OwnedFd":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd if self._fd >= 0 else 'closed'}>"

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()


_NO_LINGER = struct.pack("ii", 0, 0)


def _do_not_linger(fd: int) -> None:
    """Let `close` return at once: on a TCP socket with SO_LINGER (socket(7)) it waits for the other end, as
    long as whoever sent us the socket has chosen."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)  # said, so that none is looked up
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        sock.detach()


def own(fds: Iterable[int]) -> list[OwnedFd]:
    """Take ownership of plain descriptors, as the kernel hands them out."""
    return [OwnedFd(fd) for fd in fds]


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close each of them."""
    for fd in fds:
        fd.close()
