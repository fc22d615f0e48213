# SPDX-License-Identifier: BSD-3-Clause
"""A device's state on its way from one server to the other, while the device runs and after its stop.

It goes through this process, over connections of its own: descriptors pass through no SSH forwarding.
"""

import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import trio

from vfio_user.client.control import ControlLost
from vfio_user.client.control_streams import InlineSave, inline_load, open_inline_save
from vfio_user.protocol.json_rpc import RpcError


class Carrier:
    """`run` ends when the destination has loaded the state; `done` is set then. RpcError, ControlLost.

    The source's part ends with a `stop` of the device. Cancelled, it leaves both devices as they were.
    """

    def __init__(self, source: Path, destination: Path) -> None:
        self._source = source
        self._destination = destination
        self.bytes = 0
        self.done = trio.Event()
        self.ended = 0.0
        """When, by `time.perf_counter`."""
        self._all_read = False

    async def run(self) -> None:
        async with open_inline_save(self._source, hold=True) as save:
            try:
                async with contextlib.aclosing(self._counted(save)) as chunks:
                    await inline_load(self._destination, chunks)
            except (RpcError, ControlLost):
                if self._all_read:
                    await save.check()  # if it was the source's fault, this says so
                raise
        self.ended = time.perf_counter()
        self.done.set()

    async def _counted(self, save: InlineSave) -> AsyncGenerator[bytes, None]:
        async for data in save:
            self.bytes = save.bytes
            yield data
        self._all_read = True
