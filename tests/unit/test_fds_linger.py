# SPDX-License-Identifier: BSD-3-Clause
"""A peer may send a socket whose close waits for somebody else (SO_LINGER): nobody here waits with it."""

import array
import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from vfio_user.transport.channel import Channel
from vfio_user.transport.fds import OwnedFd, close_all

LINGER = 3  # seconds; what a hostile peer would make hours
AT_ONCE = 1.0


@pytest.fixture
def lingering() -> Iterator[int]:
    """A TCP socket with more unsent data than its other end takes, which is never read."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.connect(listener.getsockname())
        with listener.accept()[0]:
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.send(bytes(1 << 16))
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
            yield sender.detach()


def send_away(sock: socket.socket, fd: int) -> None:
    """Send `fd`, and keep none: whoever closes what arrives closes the last."""
    sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os.close(fd)


def test_the_trap_is_one(lingering: int) -> None:
    thread = threading.Thread(target=os.close, args=(lingering,))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "this kernel does not linger: the other tests show nothing"
    thread.join()


def test_closing_does_not_linger(lingering: int) -> None:
    start = time.monotonic()
    OwnedFd(lingering).close()
    assert time.monotonic() - start < AT_ONCE


@pytest.mark.parametrize("read", [True, False])
def test_a_channel_that_was_sent_one_does_not_linger(lingering: int, read: bool) -> None:
    left, right = socket.socketpair()
    channel = Channel(left)
    before = len(os.listdir("/proc/self/fd"))
    with right:
        send_away(right, lingering)
        start = time.monotonic()
        if read:
            received = channel.receive_into(memoryview(bytearray(16)))
            assert received is not None
            assert len(received[1]) == 1
            close_all(received[1])
        channel.close()
        assert time.monotonic() - start < AT_ONCE
        assert len(os.listdir("/proc/self/fd")) == before - 2  # the channel's own and the one sent away
