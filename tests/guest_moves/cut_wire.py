# SPDX-License-Identifier: BSD-3-Clause
"""A wire to a UNIX socket that can be cut."""

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from vfio_user.client.background import background


class Wire:
    """Whoever connects to `path` talks to `target`, until `cut`; then nobody can connect any more."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self._target = path, target
        self._scope = trio.CancelScope()
        self._connections: list[trio.CancelScope] = []

    def cut(self) -> None:
        self._scope.cancel()

    def drop(self) -> None:
        """Ends the connections; new ones are possible."""
        for scope in self._connections:
            scope.cancel()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(os.fspath(self.path))
        listener.listen(4)
        with self._scope, listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    connection, _ = await listener.accept()
                    nursery.start_soon(self._connect, trio.SocketStream(connection))
        self.path.unlink()

    async def _connect(self, near: trio.SocketStream) -> None:
        scope = trio.CancelScope()
        self._connections.append(scope)
        # Where nobody is there any more, the near end is closed too.
        with scope, contextlib.suppress(OSError):
            await self._join(near)

    async def _join(self, near: trio.SocketStream) -> None:
        async with (
            near,
            await trio.open_unix_socket(self._target) as far,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_copy, near, far)
            nursery.start_soon(_copy, far, near)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


@contextlib.asynccontextmanager
async def open_wire(path: Path, target: Path) -> AsyncIterator[Wire]:
    wire = Wire(path, target)
    async with background() as nursery:
        await nursery.start(wire.serve)
        yield wire
        wire.cut()
