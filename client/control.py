# SPDX-License-Identifier: BSD-3-Clause
"""A client of the control socket of `vfio-user serve`, on trio: JSON-RPC 2.0, several requests at once.

async with open_control(path) as control:
    await control.call("stop")
    with open("state", "wb") as file:
        await control.call("save", fd=file.fileno())
"""

import contextlib
import socket
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import trio

from vfio_user.client.background import background
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.json_rpc import Answer, BadLine, LineSplitter, RpcError, build_call, parse_answer
from vfio_user.transport.channel import Channel
from vfio_user.transport.connector import connect_unix
from vfio_user.transport.fds import close_all

MAX_ANSWER = 16 << 20
CONNECT = 5.0
"""Seconds for a server to take a connection."""


class ControlLost(Exception):
    """The server cannot be reached, or has ended the connection; the text says which."""


class _Waiting:
    """A request under way."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Answer | None = None


class ControlClient:
    """One connection; `call` may be used by several tasks at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._lines = LineSplitter(MAX_ANSWER)
        self._waiting: dict[int, _Waiting] = {}
        self._ids = count(1)
        self._lost: str | None = None

    @property
    def lost(self) -> bool:
        """Whether the connection has ended, as far as anybody has noticed."""
        return self._lost is not None

    async def call(self, method: str, *, fd: int | None = None, **params: Any) -> Any:
        """The result of a method. `fd` goes along and stays the caller's, who may close it at once.

        RpcError: what the server answered. ControlLost. A caller that is cancelled does not end what it has
        asked for; `close`, or the method `cancel`, does.
        """
        if self._lost is not None:
            raise ControlLost(self._lost)
        id, waiting = next(self._ids), _Waiting()
        self._waiting[id] = waiting
        try:
            await self._send(build_call(method, params, id), () if fd is None else (fd,))
            await waiting.answered.wait()
        finally:
            del self._waiting[id]
        if waiting.answer is None:
            raise ControlLost(self._lost or "the connection has ended")
        if waiting.answer.error is not None:
            raise waiting.answer.error
        return waiting.answer.result

    async def _send(self, line: bytes, fds: tuple[int, ...]) -> None:
        try:
            self._channel.send((line,), fds)
            while not self._channel.flush():
                await self._channel.wait_writable()
        except VfioUserError as error:
            raise ControlLost(f"the server has ended the connection: {error.reason}") from error

    async def read_answers(self) -> None:
        """The background task."""
        view = memoryview(bytearray(65536))
        try:
            while True:
                await self._channel.wait_readable()
                received = self._channel.receive_into(view)
                if received is None:
                    continue
                close_all(received[1])
                if not received[0]:
                    raise ControlLost("the server has ended the connection")
                for line in self._lines.feed(bytes(view[: received[0]])):
                    self._take(parse_answer(line))
        except (ControlLost, RpcError, VfioUserError) as error:
            self._lose(str(error))

    def _take(self, answer: Answer) -> None:
        waiting = self._waiting.get(answer.id) if isinstance(answer.id, int) else None
        if waiting is not None:
            waiting.answer = answer
            waiting.answered.set()
        elif answer.id is None and answer.error is not None:
            raise BadLine(answer.error.code, answer.error.message)

    def _lose(self, reason: str) -> None:
        self._lost = reason
        for waiting in self._waiting.values():
            waiting.answered.set()

    def close(self) -> None:
        """Let go of the connection: the server undoes what is half done."""
        self._channel.close()


async def connect_control(path: Path, timeout: float = CONNECT) -> socket.socket:
    """A connection to the control socket at `path`. ControlLost when there is none to be had in time."""
    with trio.move_on_after(timeout):
        try:
            return await connect_unix(path)
        except OSError as error:
            raise ControlLost(f"{path} cannot be connected to: {error.strerror or error}") from error
    raise ControlLost(f"{path} takes no connection within {timeout:g} s: does its server hang?")


@contextlib.asynccontextmanager
async def open_control(path: Path, timeout: float = CONNECT) -> AsyncIterator[ControlClient]:
    """A connection to the control socket at `path`. ControlLost when there is none to be had."""
    client = ControlClient(await connect_control(path, timeout))
    try:
        async with background() as nursery:
            nursery.start_soon(client.read_answers)
            yield client
    finally:
        client.close()
