# SPDX-License-Identifier: BSD-3-Clause
"""The switch that a guest's network is moved with: what is on its way comes once, and in order."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from vfio_user.client.switch import Port, Switch, SwitchError, open_switch


class Nic:
    """A server's end of the cable."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.socket.sendall(len(frame).to_bytes(4, "big") + frame)

    async def receive(self) -> bytes:
        length = int.from_bytes(await self._read(4), "big")
        return await self._read(length)

    async def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            with trio.fail_after(20):
                await trio.lowlevel.wait_readable(self.socket)
            piece = self.socket.recv(count - len(data))
            assert piece
            data += piece
        return data

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
async def switch() -> AsyncIterator[Switch]:
    """Answers every frame with its letters turned round; none to those that begin with "!"."""
    async with open_switch(lambda frame: None if frame[:1] == b"!" else frame[::-1]) as opened:
        yield opened


async def plug(switch: Switch, path: Path) -> tuple[Port, Nic]:
    port = await switch.open_port(path)
    return port, Nic(path)


async def test_frames_are_answered_in_order(switch: Switch, tmp_path: Path) -> None:
    port, nic = await plug(switch, tmp_path / "a")
    nic.send(b"abc", b"!", b"xy" * 30_000)
    assert [await nic.receive(), await nic.receive()] == [b"cba", b"yx" * 30_000]
    assert (port.received, port.sent) == (3, 2)
    nic.close()


async def test_what_was_not_taken_goes_to_the_new_place(switch: Switch, tmp_path: Path) -> None:
    old, first = await plug(switch, tmp_path / "a")
    first.send(b"one", b"two", b"three")
    assert await first.receive() == b"eno"
    # The device has taken one frame; one that it has sent last has still to come.
    new, second = await plug(switch, tmp_path / "b")
    first.send(b"four")
    await switch.move(old, new, sent=4, taken=1)
    assert [await second.receive() for _ in range(3)] == [b"owt", b"eerht", b"ruof"]
    second.send(b"five")
    assert await second.receive() == b"evif"
    first.close()
    second.close()


async def test_a_device_cannot_have_taken_more_than_it_was_sent(switch: Switch, tmp_path: Path) -> None:
    old, first = await plug(switch, tmp_path / "a")
    new, second = await plug(switch, tmp_path / "b")
    with pytest.raises(SwitchError, match="taken 1 frames, 0 were sent"):
        await switch.move(old, new, sent=0, taken=1)
    first.close()
    second.close()


async def test_frames_that_never_come_are_waited_for(switch: Switch, tmp_path: Path) -> None:
    old, first = await plug(switch, tmp_path / "a")
    new, second = await plug(switch, tmp_path / "b")
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(0.01):
            await switch.move(old, new, sent=1, taken=0)
    first.close()
    second.close()


async def test_a_move_that_comes_to_nothing(switch: Switch, tmp_path: Path) -> None:
    """The old cable still carries what was sent to it; what came for the new place follows, once."""
    old, first = await plug(switch, tmp_path / "a")
    first.send(b"one", b"two")
    assert await first.receive() == b"eno"
    new, second = await plug(switch, tmp_path / "b")
    await switch.move(old, new, sent=2, taken=1, keep=True)
    switch.send(b"meanwhile")
    assert [await second.receive() for _ in range(2)] == [b"owt", b"meanwhile"]
    switch.move_back(old, new)
    first.send(b"three")
    assert [await first.receive() for _ in range(3)] == [b"owt", b"meanwhile", b"eerht"]
    first.close()
    second.close()


async def test_a_move_that_is_cut_short(switch: Switch, tmp_path: Path) -> None:
    old, first = await plug(switch, tmp_path / "a")
    new, second = await plug(switch, tmp_path / "b")
    with trio.move_on_after(0.01) as scope:
        await switch.move(old, new, sent=1, taken=0, keep=True)
    assert scope.cancelled_caught
    switch.send(b"held")
    switch.move_back(old, new)
    first.send(b"one")
    assert [await first.receive() for _ in range(2)] == [b"held", b"eno"]
    first.close()
    second.close()
