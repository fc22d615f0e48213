# SPDX-License-Identifier: BSD-3-Clause
"""A client that sends the bytes that a test gives it, whole or in pieces, with any descriptors."""

import array
import contextlib
import errno
import fcntl
import os
import socket
import sys
import termios
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from conformance import wire
from conformance.patience import in_time

bare_errors = True
"""Whether `Answer.errno` minds a body; off for an engine that is known to send one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One message from the server."""

    message_id: int
    command: int
    flags: int
    error: int
    body: bytes
    fds: tuple[int, ...] = ()

    @property
    def ok(self) -> bytes:
        """The body of a reply without an error, as the specification wants it."""
        assert self.flags == wire.REPLY, f"flags {self.flags:#x}, {errno.errorcode.get(self.error)}"
        assert self.error == 0
        return self.body

    @property
    def errno(self) -> int:
        """The errno of an error reply, which "must only include the reply header"."""
        assert self.flags == wire.REPLY | wire.ERROR, f"flags {self.flags:#x}, no error reply"
        assert not self.body or not bare_errors
        assert self.fds == ()
        return self.error


class RawClient:
    """Make it with `connect`. The descriptors that came with answers are closed at the end."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self.next_id = 1
        self._fds: list[int] = []

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of `data`; the descriptors travel with its first byte."""
        with in_time():
            if fds:
                control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                data = data[await self.socket.sendmsg([data], control) :]
            while data:
                data = data[await self.socket.send(data) :]

    async def taken(self) -> None:
        """The server has read what was sent, or does not want it yet."""
        with trio.move_on_after(0.1):
            while self._unread():  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.0005)

    def _unread(self) -> int:
        """Bytes that the server has not read (tcp(7), SIOCOUTQ, which AF_UNIX has too)."""
        answer = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(answer, sys.byteorder)

    async def receive(self) -> Answer:
        """The next message. EOFError at the end of the stream."""
        fds: list[int] = []
        with in_time():
            header = await self._exactly(wire.HEADER.size, fds)
            message_id, command, size, flags, error = wire.HEADER.unpack(header)
            body = await self._exactly(size - wire.HEADER.size, fds)
        return Answer(message_id, command, flags, error, body, tuple(fds))

    async def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            part, control, _, _ = await self.socket.recvmsg(size - len(data), socket.CMSG_SPACE(253 * 4))
            for level, kind, raw in control:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                numbers = array.array("i", raw)
                self._fds += numbers
                fds += numbers
            if not part:
                raise EOFError("the server has closed the connection")
            data += part
        return data

    async def command(
        self, command: int, body: bytes = b"", *, flags: int = 0, fds: Sequence[int] = ()
    ) -> int:
        """Send one command with a new id, which is the result."""
        message_id = self.next_id
        self.next_id += 1
        await self.send(wire.message(command, body, flags=flags, message_id=message_id), fds)
        return message_id

    async def call(self, command: int, body: bytes = b"", *, fds: Sequence[int] = ()) -> Answer:
        """Send a command; the next message has to be its reply."""
        message_id = await self.command(command, body, fds=fds)
        answer = await self.receive()
        assert (answer.message_id, answer.command) == (message_id, command)
        return answer

    async def answer(self, request: Answer, body: bytes = b"", *, error: int = 0) -> None:
        """Reply to a command of the server."""
        header = wire.HEADER.pack(
            request.message_id,
            request.command,
            wire.HEADER.size + len(body),
            wire.REPLY | (wire.ERROR if error else 0),
            error,
        )
        await self.send(header + body)

    async def negotiate(self, capabilities: dict[str, Any] | None = None) -> Answer:
        answer = await self.call(wire.VERSION, wire.version(capabilities or {}))
        assert answer.ok
        return answer

    async def expect_alive(self) -> None:
        """The connection is in step, and there was no other message from the server in between."""
        assert (await self.call(wire.GET_INFO, wire.get_info())).ok

    async def expect_closed(self) -> None:
        """The server ends the connection, without another message."""
        with in_time(), contextlib.suppress(ConnectionResetError):  # it had not read all of what we sent
            assert await self.socket.recv(1) == b""

    def shut(self) -> None:
        """End the connection now."""
        self.socket.close()
        while self._fds:
            os.close(self._fds.pop())


_NOT_YET = (errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT)


async def _open_socket(path: Path) -> trio.socket.SocketType:
    """A connection; waits while so many clients wait that no more can (EAGAIN, which trio does not know), and
    while nobody listens: libvfio-user's next client gets another context."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        with in_time():
            while sock.connect_ex(os.fspath(path)) in _NOT_YET:  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.001)
        sock.getpeername()
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


@contextlib.asynccontextmanager
async def connect(path: Path, *, negotiated: bool = True) -> AsyncIterator[RawClient]:
    client = RawClient(await _open_socket(path))
    try:
        if negotiated:
            await client.negotiate()
        yield client
    finally:
        client.shut()


@contextlib.asynccontextmanager
async def connect_next(path: Path) -> AsyncIterator[RawClient]:
    """`connect` after another client: libvfio-user's next one gets another context, and who has been too fast
    for that is cut off, and has to connect again."""
    client = None
    with in_time():
        while client is None:
            client = RawClient(await _open_socket(path))
            try:
                await client.negotiate()
            except (ConnectionError, EOFError):
                client.shut()
                client = None
    try:
        yield client
    finally:
        client.shut()
