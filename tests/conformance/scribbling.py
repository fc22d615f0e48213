# SPDX-License-Identifier: BSD-3-Clause
"""A device that writes numbers all over guest memory, and three whose server loses dirty pages.

For `vfio-user serve conformance.scribbling:CLASS`: the server is a process of its own, so that it writes
while the client copies.
"""

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from vfio_user.device_models.device import DmaError, Host, Option, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Buffer, Region
from vfio_user.server.dirty import Bits, DirtyLog, zeroed

PAGE = 4096
RANGES = 64
"""Offset in BAR0: pairs of address and size (u64) of where to write, up to a size of 0."""
ON, COUNT = 0, 8
"""Offsets: writing a byte that is not 0 starts it, 0 stops it; a u64 that counts the writes."""
_BATCH = 40


class _Panel(Region):
    def __init__(self, device: "Scribbler") -> None:
        super().__init__(PAGE)
        self._device = device
        self._data = bytearray(PAGE)

    def read(self, offset: int, count: int) -> bytes:
        self._data[COUNT : COUNT + 8] = self._device.count.to_bytes(8, "little")
        return bytes(self._data[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        self._data[offset : offset + len(data)] = data
        if offset == ON:
            self._device.switch(bool(data[0]))

    def ranges(self) -> Iterator[tuple[int, int]]:
        for address, size in struct.iter_unpack("<QQ", self._data[RANGES:]):
            if not size:
                return
            yield address, size


class Scribbler(PciDevice):
    """Each write is of the number of the write, once or so often that it covers up to three pages."""

    model = "scribbler"
    summary = "numbers in random pages"
    identity = Identity(vendor_id=0x1234, device_id=0x0009, class_code=0xFF0000)
    options = (Option("seed", int, "0", "of the random numbers"),)

    def __init__(self, host: Host, *, seed: int = 0) -> None:
        self.count = 0
        self._random = random.Random(seed)
        self._on = False
        self._panel = _Panel(self)
        super().__init__(host, {0: Bar(self._panel)})

    def reset_state(self) -> None:
        self._on = False

    def switch(self, on: bool) -> None:
        self._on = on
        if on:
            self.host.start("scribble", self._scribble)

    async def _scribble(self) -> None:
        while self._on:
            for _ in range(_BATCH):
                await self._write_one()
            await pause()

    async def _write_one(self) -> None:
        address, size = self._random.choice(list(self._panel.ranges()))
        words = self._random.choice((1, 1, 1, 1, 1, 1, 40, 1500))
        words = min(words, size // 8)
        place = self._random.randrange(size // 8 - words + 1) * 8
        self.count += 1
        with contextlib.suppress(DmaError):  # the client has taken that region away for a moment
            await self.host.dma.write(address + place, self.count.to_bytes(8, "little") * words)


def _replace(**methods: Callable[..., Any]) -> None:
    for name, method in methods.items():
        setattr(DirtyLog, name, method)


class Unmarked(Scribbler):
    """Its server logs nothing."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, **options)
        _replace(mark=lambda log, offset, length: None)


class Late(Scribbler):
    """Its server clears what it reported only at the 20th write after: those before are lost."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, **options)
        mark = DirtyLog.mark
        waiting: dict[int, int] = {}

        def late_mark(log: DirtyLog, offset: int, length: int) -> None:
            mark(log, offset, length)
            if (left := waiting.pop(id(log), 0)) == 1:
                log.bits = zeroed(len(log.bits))
            elif left:
                waiting[id(log)] = left - 1

        def report(log: DirtyLog, *asked: int) -> Bits:
            waiting[id(log)] = 20
            return log.report(*asked)

        def take(log: DirtyLog) -> Bits:
            waiting[id(log)] = 20
            return bytearray(log.bits)

        _replace(mark=late_mark, report_and_clear=report, take=take)


class Greedy(Scribbler):
    """Its server clears the log of a region when a part of it is reported."""

    def __init__(self, host: Host, **options: Any) -> None:
        super().__init__(host, **options)

        def clear(log: DirtyLog, offset: int, length: int) -> None:
            log.bits = zeroed(len(log.bits))

        _replace(clear=clear)
