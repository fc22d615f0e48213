# SPDX-License-Identifier: BSD-3-Clause
"""Connecting to a UNIX socket without holding up anything else."""

import os
import socket

import trio

AGAIN = 0.02
"""Seconds between two attempts where so many wait already that the kernel takes no more."""


async def connect_unix(path: str | os.PathLike[str]) -> socket.socket:
    """A connected, non-blocking stream socket. OSError when nobody listens at `path`.

    A full backlog is waited for without end: give it a time-out. The kernel answers EAGAIN then, and has
    begun nothing (connect(2)): trio and asyncio would take the socket for one that connects, and it is not.
    """
    sock = new_socket()
    try:
        while not try_connect(sock, path):  # noqa: ASYNC110 - nobody tells when there is room
            await trio.sleep(AGAIN)
    except BaseException:
        sock.close()
        raise
    return sock


def new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def try_connect(sock: socket.socket, path: str | os.PathLike[str]) -> bool:
    """Whether it is connected now; False when there is no room, which may change. OSError."""
    try:
        sock.connect(os.fspath(path))
    except BlockingIOError:
        return False
    return True
