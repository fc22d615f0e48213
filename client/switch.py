# SPDX-License-Identifier: BSD-3-Clause
"""The network of a guest that is moved: a far end for the backend `stream:PATH` of each server in turn.

    async with open_switch(Responder().answer) as switch:
        here = await switch.open_port(path)          # then the server that connects to it
        ...
        await switch.move(here, there, sent=..., taken=...)

A frame counts as accepted when the device has taken it. What was on its way to a device that has been
stopped is sent again, in order, to where the device is now; so nothing may be missing, and nothing twice.
"""

import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable

import trio

from vfio_user.client.background import background

_LENGTH = 4
_LONGEST = 69_632
_REMEMBERED = 1 << 14
"""Frames that may be on their way."""


class SwitchError(Exception):
    """Frames are missing, or a device has taken more than it was sent."""


class Port:
    """One end of a cable; a device's server is at the other. `received` counts frames from it."""

    def __init__(self, switch: "Switch", listener: socket.socket) -> None:
        self.received = 0
        self.sent = 0
        self._switch = switch
        self._listener = listener
        self._recent: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._queue: deque[bytes] = deque()
        self._work = trio.Event()
        self._progress = trio.Event()
        self._connected = trio.Event()
        self._scope = trio.CancelScope()

    def send(self, frame: bytes) -> None:
        """Put a frame on the wire; never waits."""
        self.sent += 1
        self._recent.append(frame)
        self._queue.append(frame)
        self._work.set()

    def on_the_way(self, taken: int) -> list[bytes]:
        """The frames that a device has not taken, if it has taken so many."""
        left = self.sent - taken
        if not 0 <= left <= len(self._recent):
            raise SwitchError(f"the device has taken {taken} frames, {self.sent} were sent to it")
        return list(self._recent)[len(self._recent) - left :]

    async def wait_connected(self) -> None:
        """Wait until a server has connected; one that had another port here has done with that one then."""
        await self._connected.wait()

    async def wait_received(self, count: int) -> None:
        """Wait until so many frames have come from the device."""
        while self.received < count:
            await self._progress.wait()

    def close(self) -> None:
        """Pull the cable."""
        self._scope.cancel()

    async def serve(self) -> None:
        with contextlib.closing(self._listener), self._scope:
            try:
                stream = trio.SocketStream(await self._accept())
                self._connected.set()
                async with stream, trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, stream)
                    await self._read(stream)
                    nursery.cancel_scope.cancel()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # its server has gone

    async def _accept(self) -> trio.socket.SocketType:
        listener = trio.socket.from_stdlib_socket(self._listener)
        return (await listener.accept())[0]

    async def _read(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        while data := await stream.receive_some(1 << 16):
            buffer += data
            while (frame := _cut(buffer)) is not None:
                self.received += 1
                self._switch.take(frame)
            self._progress.set()
            self._progress = trio.Event()

    async def _write(self, stream: trio.SocketStream) -> None:
        while True:
            if not self._queue:
                self._work = trio.Event()
                await self._work.wait()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), 64))]
            await stream.send_all(b"".join(len(one).to_bytes(_LENGTH, "big") + one for one in batch))


def _cut(buffer: bytearray) -> bytes | None:
    """The first frame, if it is whole; taken out."""
    if len(buffer) < _LENGTH:
        return None
    length = int.from_bytes(buffer[:_LENGTH], "big")
    if length > _LONGEST:
        raise SwitchError(f"a frame of {length} bytes is announced")
    if len(buffer) < _LENGTH + length:
        return None
    frame = bytes(buffer[_LENGTH : _LENGTH + length])
    del buffer[: _LENGTH + length]
    return frame


class Switch:
    """`answer` is the rest of the network: what comes back for a frame, or None."""

    def __init__(self, answer: Callable[[bytes], bytes | None], nursery: trio.Nursery) -> None:
        self._answer = answer
        self._nursery = nursery
        self._active: Port | None = None
        self._held: list[bytes] = []
        self._repeated = 0
        """Of the frames to the newest port, those that were sent to the one before too."""

    async def open_port(self, path: str | os.PathLike[str]) -> Port:
        """Listen at `path`. The first port is where the device is."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(os.fspath(path))
            listener.listen(1)
        except OSError:
            listener.close()
            raise
        port = Port(self, listener)
        self._active = self._active or port
        self._nursery.start_soon(port.serve)
        return port

    def take(self, frame: bytes) -> None:
        """A frame from a device: the network's answer goes where the device is."""
        reply = self._answer(frame)
        if reply is not None:
            self.send(reply)

    def send(self, frame: bytes) -> None:
        """Send a frame of the network's own to where the device is."""
        if self._active is None:
            self._held.append(frame)
        else:
            self._active.send(frame)

    async def move(self, old: Port, new: Port, *, sent: int, taken: int, keep: bool = False) -> None:
        """The device is stopped at `old`, where its server has sent and the device taken so many frames.

        Returns when all that it had sent has come; then the network knows it at `new`. `keep`: the old cable
        stays plugged in, so that `move_back` is possible; the caller closes the port.
        """
        self._active = None
        await old.wait_received(sent)
        again = old.on_the_way(taken)
        for frame in (*again, *self._held):
            new.send(frame)
        self._held.clear()
        self._repeated = len(again)
        self._active = new
        if not keep:
            old.close()

    def move_back(self, old: Port, new: Port) -> None:
        """A move that kept `old`, done or cut short, has come to nothing: the device goes on there, and has
        never run at `new`. What is still on its way to it there comes; what was meant for it since, too."""
        if self._active is new:
            late = new.on_the_way(self._repeated)
        else:
            late, self._held = self._held, []
        self._active = old
        for frame in late:
            old.send(frame)
        new.close()


@contextlib.asynccontextmanager
async def open_switch(answer: Callable[[bytes], bytes | None]) -> AsyncIterator[Switch]:
    """A switch; its ports are closed at the end."""
    async with background() as nursery:
        yield Switch(answer, nursery)
