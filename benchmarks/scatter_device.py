# SPDX-License-Identifier: BSD-3-Clause
"""A device that writes a few bytes into pages far apart, so that a dirty log has something all over."""

from vfio_user.device_models.device import DmaError, Host, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import Register, RegisterFile

ADDRESS, STRIDE, COUNT, LEFT = 0, 8, 16, 24
"""Offsets in BAR 0, of 8 bytes each. A write to COUNT begins; LEFT is 0 when all are done."""
_BATCH = 64


class Scatterer(PciDevice):
    model = "scatterer"
    summary = "writes into pages of guest memory that are far apart"
    identity = Identity(vendor_id=0x1234, device_id=0x5C83, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        rows = (
            Register("ADDRESS", ADDRESS, width=8, writable=2**64 - 1),
            Register("STRIDE", STRIDE, width=8, writable=2**64 - 1),
            Register("COUNT", COUNT, width=8, writable=2**64 - 1),
            Register("LEFT", LEFT, width=8),
        )
        file = RegisterFile(0x1000, rows, on_write={"COUNT": self._begin})
        self._address, self._stride, self._count, self._left = file.cells
        super().__init__(host, {0: Bar(file)})

    def _begin(self, _index: int, value: int) -> None:
        self._left.value = self._count.value = value
        self.host.start("scatter", self._write)

    async def _write(self) -> None:
        while left := self._left.value:
            first, batch = self._count.value - left, min(left, _BATCH)
            place, stride = self._address.value + first * self._stride.value, self._stride.value
            try:
                await self.host.dma.write_many([(place + n * stride, b"written!") for n in range(batch)])
            except DmaError:
                return  # LEFT stays: the benchmark notices
            self._left.value = left - batch
            await pause()
