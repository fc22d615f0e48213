# SPDX-License-Identifier: BSD-3-Clause
"""A device's state on its way from one server to the other, while the device runs and after its stop."""

import os

import trio

from vfio_user.client.control import ControlClient
from vfio_user.client.qemu_migration.together import side_by_side


class Carrier:
    """`run` ends when the destination has loaded the state; `done` is set then. Errors are those of `call`.

    The source's part ends with a `stop` of the device. Cancelled, it leaves both devices as they were.
    """

    def __init__(self, source: ControlClient, destination: ControlClient) -> None:
        self._source = source
        self._destination = destination
        self.bytes = 0
        self.done = trio.Event()

    async def run(self) -> None:
        reader, writer = os.pipe()
        async with side_by_side() as nursery:
            nursery.start_soon(self._save, writer)
            nursery.start_soon(self._load, reader)
        self.done.set()

    async def _save(self, fd: int) -> None:
        try:
            result = await self._source.call("save", fd=fd, hold=True)
        finally:
            os.close(fd)
        self.bytes = int(result["bytes"])

    async def _load(self, fd: int) -> None:
        try:
            await self._destination.call("load", fd=fd)
        finally:
            os.close(fd)
