# SPDX-License-Identifier: BSD-3-Clause
"""A device that rings the next one's doorbell by DMA: each passes a number on, one higher, without an end.

A doorbell with a number that has been passed on already says nothing new, as with the tail of a ring; so a
doorbell that is rung once more after a cut does no harm, and one that is lost stops everything.
"""

import struct

from vfio_user.device_models.device import DmaError, Host
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import Register, RegisterFile

NUMBER, NEXT, LOG, INDEX, DOORBELL, ASKED, PASSED, ERRORS = 0, 8, 16, 24, 28, 32, 36, 40
ENTRY = struct.Struct("<II")  # the number, and who passed it on
ENTRIES = 1 << 16  # in the log, which goes round

_WORD, _ADDRESS = 2**32 - 1, 2**64 - 1
REGISTERS = (
    Register("NEXT", NEXT, width=8, writable=_ADDRESS, text="guest address of the next one's doorbell"),
    Register("LOG", LOG, width=8, writable=_ADDRESS, text="where each number is logged: 8 bytes a number"),
    Register("INDEX", INDEX, writable=_WORD, text="what the log says of who it was"),
    Register("DOORBELL", DOORBELL, text="the number to pass on"),
    Register("ASKED", ASKED, text="the highest number that came by the doorbell"),
    Register("PASSED", PASSED, text="the last number that was passed on"),
    Register("ERRORS", ERRORS, text="DMAs that failed"),
)


class Relay(PciDevice):
    model = "relay"
    summary = "passes numbers on by DMA to the next one's doorbell"
    state_version = 1
    identity = Identity(vendor_id=0x1234, device_id=0x4E1A, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        self.registers = RegisterFile(0x1000, REGISTERS, on_write={"DOORBELL": self._ring})
        super().__init__(host, {0: Bar(self.registers)})

    def _value(self, name: str) -> int:
        return self.registers.cell(name).value

    def _ring(self, _index: int, value: int) -> None:
        if value > self._value("ASKED"):
            self.registers.cell("ASKED").value = value
            self.host.start("pass", self._pass)

    async def _pass(self) -> None:
        while (number := self._value("ASKED")) > self._value("PASSED"):
            place = self._value("LOG") + number % ENTRIES * ENTRY.size
            try:
                await self.host.dma.write(place, ENTRY.pack(number, self._value("INDEX")))
                await self.host.dma.write(self._value("NEXT"), struct.pack("<I", number + 1))
            except DmaError:
                self.registers.cell("ERRORS").value += 1
            self.registers.cell("PASSED").value = number

    def restored(self) -> None:
        super().restored()
        if self._value("ASKED") > self._value("PASSED"):
            self.host.start("pass", self._pass)
