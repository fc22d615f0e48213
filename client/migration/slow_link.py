# SPDX-License-Identifier: BSD-3-Clause
"""What lies between two hosts is not endlessly fast: a link of so many bytes a second."""

from collections.abc import Callable, Sequence

import trio

from vfio_user.client.migration.sink import Sink
from vfio_user.client.vmm_state import VmmState
from vfio_user.protocol.values import Payload


class SlowLink:
    """A `Sink` before another one. `rate` is in bytes a second, of memory and state."""

    def __init__(self, sink: Sink, rate: float) -> None:
        self._sink = sink
        self._rate = rate
        self._free = 0.0  # when all that was sent will have gone over

    async def open(self, ranges: Sequence[tuple[int, int]], devices: int) -> None:
        await self._sink.open(ranges, devices)

    async def memory(self, address: int, data: memoryview) -> None:
        await self._sink.memory(address, data)
        await self._carry(len(data))

    async def state(self, device: int, data: Payload) -> None:
        await self._sink.state(device, data)
        await self._carry(len(data))

    async def setup(self, states: Sequence[VmmState]) -> None:
        await self._sink.setup(states)

    async def complete(self) -> None:
        await self._sink.complete()

    async def abandon(self) -> None:
        await self._sink.abandon()

    async def _carry(self, count: int) -> None:
        self._free = max(self._free, trio.current_time()) + count / self._rate
        await trio.sleep_until(self._free)


def slow_link(rate: float) -> Callable[[Sink], Sink]:
    """For `Options.link`."""
    return lambda sink: SlowLink(sink, rate)
