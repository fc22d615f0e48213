# SPDX-License-Identifier: BSD-3-Clause
"""A device that writes all over a range of guest memory at a set rate, for benchmarks of moves."""

from vfio_user.device_models.device import DmaError, Host, Option, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import Register, RegisterFile

RATE = 0
"""Offset in BAR 0: MB/s; 0 stops it."""
PIECE = 65536
_TICK = 2_000_000  # ns
_MOST = 400
"""Pieces that it makes up for after a pause."""


class Writer(PciDevice):
    model = "writer"
    summary = "writes all over a range of guest memory"
    identity = Identity(vendor_id=0x1234, device_id=0x5C82, class_code=0xFF0000)
    options = (
        Option("base", int, "0", "guest address of the range"),
        Option("size", int, "0", "bytes, a multiple of 64 KiB"),
    )
    state_version = 1

    def __init__(self, host: Host, *, base: int, size: int) -> None:
        rows = (Register("RATE", RATE, writable=0xFFFF), Register("WRITTEN", 8, width=8))
        self._file = RegisterFile(0x1000, rows, on_write={"RATE": self._set_rate})
        self._rate, self._written = self._file.cells
        self._base, self._pieces = base, max(1, size // PIECE)
        self._since = self._allowed = 0
        super().__init__(host, {0: Bar(self._file)})

    def _set_rate(self, _index: int, value: int) -> None:
        self._rate.value = value & 0xFFFF
        self._begin()

    def restored(self) -> None:
        super().restored()
        self._begin()

    def _begin(self) -> None:
        self._since, self._allowed = self.host.clock(), self._written.value
        self._tick()

    def _tick(self) -> None:
        if not self._rate.value:
            return
        now = self.host.clock()
        due = (now - self._since) * self._rate.value // (1000 * PIECE)
        if due:
            self._since += due * 1000 * PIECE // self._rate.value  # what is due of a piece stays so
            self._allowed = min(self._allowed + due, self._written.value + _MOST)
            self.host.start("write", self._write)
        self.host.call_at(now + _TICK, self._tick)

    async def _write(self) -> None:
        while self._rate.value and self._written.value < self._allowed:
            number = self._written.value
            place = self._base + number * 40503 % self._pieces * PIECE
            try:
                await self.host.dma.write(place, number.to_bytes(8, "little") * (PIECE // 8))
            except DmaError:
                self._rate.value = 0
            self._written.value = number + 1
            await pause()
