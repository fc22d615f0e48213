# SPDX-License-Identifier: BSD-3-Clause
"""The descriptors that a controller passes for a state: read and written piece by piece, without waiting.

A pipe or a character device is opened anew through /proc/self/fd: O_NONBLOCK belongs to the open file, which
is the controller's too. A socket has a flag for each call. A regular file never says "not now".
"""

import fcntl
import os
import socket
import stat
from collections.abc import Generator
from typing import Protocol

from vfio_user.protocol.json_rpc import FAILED, INVALID_PARAMS, RpcError
from vfio_user.server.control_jobs import Later, Ready
from vfio_user.transport.fds import OwnedFd

PIECE = 256 << 10
"""Most bytes of one read or write."""

_SOCKET_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Sink(Protocol):
    """Where a state is written to."""

    def write(self, data: bytes) -> Generator[Later | Ready, None, None]:
        """All of `data`. RpcError."""

    def close(self) -> None:
        """Let go of it; what was written stays."""


class Source(Protocol):
    """Where a state is read from."""

    def read(self) -> Generator[Later | Ready, None, bytes]:
        """The next bytes; none at the end. RpcError."""

    def close(self) -> None:
        """Let go of it."""


class StreamFd:
    """One end of a transfer; takes ownership of `given`. RpcError when it cannot be one."""

    def __init__(self, given: OwnedFd, *, writing: bool) -> None:
        self._fd = given
        self._socket: socket.socket | None = None
        try:
            self._prepare(writing)
        except OSError as error:
            self.close()
            reason = f"the descriptor cannot be used: {error.strerror}"
            raise RpcError(INVALID_PARAMS, reason) from error
        except RpcError:
            self.close()
            raise

    def _prepare(self, writing: bool) -> None:
        number = self._fd.fileno()
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        if access not in (os.O_RDWR, os.O_WRONLY if writing else os.O_RDONLY):
            verb = "written" if writing else "read"
            raise RpcError(INVALID_PARAMS, f"the descriptor was not opened to be {verb}")
        mode = os.fstat(number).st_mode
        if stat.S_ISSOCK(mode):
            self._take_socket()
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            flags = (os.O_WRONLY if writing else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
            again = OwnedFd(os.open(f"/proc/self/fd/{number}", flags))
            self._fd.close()
            self._fd = again
        elif not stat.S_ISREG(mode):
            raise RpcError(INVALID_PARAMS, "the descriptor is no file, pipe or stream socket")

    def _take_socket(self) -> None:
        self._socket = socket.socket(fileno=self._fd.fileno())
        self._fd.detach()
        if self._socket.type != socket.SOCK_STREAM:
            raise RpcError(INVALID_PARAMS, "the descriptor is no stream socket")

    def fileno(self) -> int:
        return self._fd.fileno() if self._socket is None else self._socket.fileno()

    def write(self, data: bytes) -> Generator[Later | Ready, None, None]:
        """All of `data`. RpcError."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._write_some(rest[:PIECE]) :]
                if rest:
                    yield Later()
            except BlockingIOError:
                yield Ready(self.fileno(), writable=True)
            except OSError as error:
                raise _failed("writing", error) from error

    def _write_some(self, data: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(data, _SOCKET_FLAGS)
        return os.write(self._fd.fileno(), data)

    def read(self) -> Generator[Later | Ready, None, bytes]:
        """The next bytes; none at the end. RpcError."""
        while True:
            try:
                return self._read_some()
            except BlockingIOError:
                yield Ready(self.fileno(), writable=False)
            except OSError as error:
                raise _failed("reading", error) from error

    def _read_some(self) -> bytes:
        if self._socket is not None:
            return self._socket.recv(PIECE, socket.MSG_DONTWAIT)
        return os.read(self._fd.fileno(), PIECE)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            self._fd.close()


def _failed(doing: str, error: OSError) -> RpcError:
    return RpcError(FAILED, f"{doing} the stream failed: {error.strerror}")
