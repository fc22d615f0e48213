# SPDX-License-Identifier: BSD-3-Clause
"""A device's state over connections to control sockets, for where no descriptor can be passed.

A save is read and a load is fed piece by piece; nobody holds the whole. Each takes a connection of its own:

    async with open_inline_save(here, hold=True) as chunks:
        await inline_load(there, chunks)

A stream that is not whole is refused by whoever loads it. What has become of a save is `last_transfer` in the
answer to `state`: `InlineSave.check` asks for it.
"""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import trio

from vfio_user.client.background import background
from vfio_user.client.control import CONNECT, ControlLost, connect_control, open_control
from vfio_user.protocol.json_rpc import FAILED, MAX_LINE, RpcError, build_call, parse_answer

PIECE = 256 << 10
"""Most bytes of one read."""


class InlineSave:
    """A save under way: iterate over its bytes. They end where the server ends the connection."""

    def __init__(self, path: Path, stream: trio.SocketStream, first: bytes) -> None:
        self._path = path
        self._stream = stream
        self._first = first
        self.bytes = 0
        """How many have come."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next bytes. ControlLost: the connection broke."""
        data, self._first = self._first, b""
        if not data:
            data = await _receive(self._stream)
        if not data:
            raise StopAsyncIteration
        self.bytes += len(data)
        return data

    async def check(self) -> dict[str, Any]:
        """After the end: RpcError unless the server says that just these bytes were a whole save."""
        async with open_control(self._path) as control:
            state = await control.call("state")
        last = state["last_transfer"] or {}
        if last.get("error") is not None:
            raise RpcError(FAILED, str(last["error"]))
        if (last.get("method"), last.get("bytes")) != ("save", self.bytes):
            raise RpcError(FAILED, f"the stream has ended after {self.bytes} bytes")
        return {"bytes": self.bytes, "running": state["running"]}


@contextlib.asynccontextmanager
async def open_inline_save(
    path: Path, *, hold: bool = False, timeout: float = CONNECT
) -> AsyncIterator[InlineSave]:
    """A save by the server whose control socket is at `path`; leaving early cancels it.

    RpcError: the server refuses. ControlLost: it cannot be reached, or has gone.
    """
    async with await _connect(path, timeout) as stream:
        await _send(stream, build_call("save", {"inline": True, "hold": hold}, 1))
        line, first = await _receive_line(stream)
        _result(line)
        yield InlineSave(path, stream, first)


async def inline_load(path: Path, chunks: AsyncIterable[bytes], *, timeout: float = CONNECT) -> Any:
    """Load the bytes of `chunks` into the device of the server at `path`: the result of `load`.

    RpcError: refused, or failed, and the device is as it was. ControlLost. What `chunks` raises ends the
    load, as does a cancellation.
    """
    async with await _connect(path, timeout) as stream:
        await _send(stream, build_call("load", {"inline": True}, 1))
        answer = _Answer()
        async with background() as nursery:
            nursery.start_soon(answer.receive, stream)
            with answer.early:  # before the end of the stream it is a refusal: the rest is not wanted
                await _feed(stream, chunks)
            return await answer.result()


class _Answer:
    """The answer to a load, which may come at any time. `early` is cancelled when it is there."""

    def __init__(self) -> None:
        self.early = trio.CancelScope()
        self._there = trio.Event()
        self._line: bytes | None = None

    async def receive(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(ControlLost):
            self._line, _ = await _receive_line(stream)
        self.early.cancel()
        self._there.set()

    async def result(self) -> Any:
        await self._there.wait()
        if self._line is None:
            raise ControlLost("the server has ended the connection without an answer")
        return _result(self._line)


async def _feed(stream: trio.SocketStream, chunks: AsyncIterable[bytes]) -> None:
    async for chunk in chunks:
        try:
            await stream.send_all(chunk)
        except trio.BrokenResourceError:
            return  # the answer says why
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_eof()


async def _connect(path: Path, timeout: float) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(await connect_control(path, timeout)))


async def _send(stream: trio.SocketStream, line: bytes) -> None:
    try:
        await stream.send_all(line)
    except trio.BrokenResourceError as error:
        raise ControlLost("the server has ended the connection") from error


async def _receive(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some(PIECE))
    except trio.BrokenResourceError as error:
        raise ControlLost("the server has ended the connection") from error


async def _receive_line(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    """The first line, and what came behind it."""
    data = b""
    while b"\n" not in data:
        part = await _receive(stream)
        if not part or len(data) > MAX_LINE:
            raise ControlLost("the server has ended the connection without an answer")
        data += part
    line, _, rest = data.partition(b"\n")
    return line, rest


def _result(line: bytes) -> Any:
    answer = parse_answer(line)
    if answer.error is not None:
        raise answer.error
    return answer.result
