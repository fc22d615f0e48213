# SPDX-License-Identifier: BSD-3-Clause
"""Connecting to sockets at which nobody takes connections, or where there is no room for one more."""

import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio

from vfio_user.client.control import ControlLost, open_control
from vfio_user.client.control_streams import inline_load, open_inline_save
from vfio_user.client.qemu_migration.qmp import QmpLost, open_qmp
from vfio_user.transport.connector import connect_unix


class Crowded:
    """Listens, and takes nobody in; the backlog is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(os.fspath(path))
        self.sock.listen(0)
        self.first = socket.socket(socket.AF_UNIX)
        self.first.connect(os.fspath(path))

    def make_room(self) -> None:
        self.sock.accept()[0].close()

    def close(self) -> None:
        self.first.close()
        self.sock.close()


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Crowded]:
    one = Crowded(tmp_path / "s")
    yield one
    one.close()


async def test_room_is_waited_for(crowded: Crowded) -> None:
    with trio.fail_after(5):
        with trio.move_on_after(0.05):
            (await connect_unix(crowded.path)).close()
            pytest.fail("it is not connected")
        crowded.make_room()
        sock = await connect_unix(crowded.path)
        with sock:
            assert sock.getpeername() == os.fspath(crowded.path)
            assert not sock.getblocking()


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await connect_unix(tmp_path / "nobody")


async def no_chunks() -> AsyncIterator[bytes]:
    if False:
        yield b""


OPENERS: list[Callable[[Path], AbstractAsyncContextManager[Any]]] = [
    lambda path: open_control(path, timeout=0.1),
    lambda path: open_inline_save(path, timeout=0.1),
]


@pytest.mark.parametrize("opener", OPENERS)
async def test_a_server_without_room_is_given_up(
    crowded: Crowded, opener: Callable[[Path], AbstractAsyncContextManager[Any]]
) -> None:
    with trio.fail_after(5), pytest.raises(ControlLost, match=r"takes no connection within 0\.1 s"):
        async with opener(crowded.path):
            pytest.fail("it is not connected")


async def test_a_load_is_given_up_too(crowded: Crowded) -> None:
    with trio.fail_after(5), pytest.raises(ControlLost, match=r"takes no connection within 0\.1 s"):
        await inline_load(crowded.path, no_chunks(), timeout=0.1)


async def test_a_monitor_without_room_serves_another_client(crowded: Crowded) -> None:
    with trio.fail_after(5), pytest.raises(QmpLost, match=r"no greeting within 0\.1 s; does it serve"):
        async with open_qmp(str(crowded.path), timeout=0.1):
            pytest.fail("it is not connected")
