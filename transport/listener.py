# SPDX-License-Identifier: BSD-3-Clause
"""The socket that clients connect to: made from a path, or taken over from whoever started us."""

import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

BACKLOG = 8
"""Clients that may wait for the present one to leave."""

SUN_PATH_SIZE = 107
"""Bytes of a socket's path (unix(7), `sun_path` without its NUL)."""


_HINTS = {
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "a part of the path is no folder, choose another path",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that can be written to",
    errno.EADDRINUSE: "another process was faster, choose another path",
}


class ListenError(OSError):
    """The socket cannot be had; the text says why and what to do."""

    @classmethod
    def at(cls, path: Path, error: OSError) -> "ListenError":
        hint = _HINTS.get(error.errno or 0, "choose another path")
        return cls(f"cannot listen on {path}: {error.strerror or error}: {hint}")


class SocketFile:
    """The file of a listening socket that has just been made; `remove` it at the end, if it is still ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)

    def remove(self) -> None:
        if self._identity == _identity(self.path):
            self.path.unlink(missing_ok=True)


class Listener:
    """A listening AF_UNIX socket, and the file that goes with it, removed when closed."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._file = None if path is None else SocketFile(path)

    @classmethod
    def bind(cls, path: Path) -> "Listener":
        """Listen at `path`; a socket file that nobody serves any more is replaced."""
        clear_path(path)
        try:
            return cls(listen_unseen(path, _listen, socket.socket.close), path)
        except OSError as error:
            raise ListenError.at(path, error) from error

    @classmethod
    def adopt(cls, fd: int) -> "Listener | socket.socket":
        """Take over descriptor `fd`: a listening socket gives a `Listener`, a connected one is returned."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            reason = f"descriptor {fd} is not a socket: {error.strerror}: give a UNIX stream socket"
            raise ListenError(reason) from error
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()  # not ours to close: it was given by mistake
            raise ListenError(f"descriptor {fd} is no UNIX stream socket: give one that is")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return cls(sock)
        if not _connected(sock):
            sock.detach()
            raise ListenError(f"descriptor {fd} neither listens nor is connected: call listen() on it first")
        sock.setblocking(False)
        return sock

    def accept(self) -> socket.socket | None:
        """The next client, if one waits. OSError when it cannot be accepted now (too many open files)."""
        try:
            client, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        client.setblocking(False)
        return client

    def close(self) -> None:
        self.socket.close()
        if self._file is not None:
            self._file.remove()


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unseen(path: Path, listen: Callable[[Path], T], close: Callable[[T], None]) -> T:
    """`listen` under another name, and only then give the socket its own: who sees the file can connect.

    A link, for it replaces nothing. The kernel goes on showing the other name (ss -x). Where the path is too
    long for that, or the file system has no links, `listen` at the path itself. OSError.
    """
    other = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    if len(os.fsencode(other)) > SUN_PATH_SIZE:
        return listen(path)
    try:
        made = listen(other)
        try:
            if _link(other, path):
                return made
        except OSError:
            close(made)
            raise
    finally:
        other.unlink(missing_ok=True)
    close(made)
    return listen(path)


def _link(other: Path, path: Path) -> bool:
    """Whether it can be done here. OSError (EADDRINUSE): another one has the name."""
    try:
        os.link(other, path)
    except FileExistsError as error:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from error
    except OSError:
        return False
    return True


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def clear_path(path: Path) -> None:
    """Make room for a socket at `path`: remove one that nobody serves any more. ListenError: no room."""
    if len(os.fsencode(path)) > SUN_PATH_SIZE:
        raise ListenError(f"the socket path has more than {SUN_PATH_SIZE} bytes: choose a shorter one")
    try:
        _remove_stale(path)
    except ListenError:
        raise
    except OSError as error:
        raise ListenError.at(path, error) from error


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # so many clients wait there that no more can
        except OSError as error:
            reason = f"cannot tell whether {path} is served: {error.strerror}: choose another path"
            raise ListenError(reason) from error
    raise ListenError(f"{path} is served by another process: end that one or choose another path")
