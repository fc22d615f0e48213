# SPDX-License-Identifier: BSD-3-Clause
"""The smallest useful device: memory words, and a doorbell that copies guest memory. The one to copy."""

from vfio_user.device_models.device import DmaError, Host, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import RamRegion
from vfio_user.device_models.registers import Register, RegisterFile

BUSY, DONE, FAILED = 1, 2, 4
CHUNK = 64 * 1024  # bytes copied before others get their turn

REGISTERS = (
    Register("SOURCE", 0xFE0, width=8, writable=2**64 - 1, text="guest address to copy from"),
    Register("DESTINATION", 0xFE8, width=8, writable=2**64 - 1, text="guest address to copy to"),
    Register("LENGTH", 0xFF0, writable=2**32 - 1, text="bytes to copy"),
    Register("DOORBELL", 0xFF8, text="any write starts the copy"),
    Register("STATUS", 0xFFC, write_1_to_clear=DONE | FAILED, text="busy 1, done 2, failed 4"),
)


class Scratch(PciDevice):
    model = "scratch"
    summary = "4 KiB of words and a doorbell that copies guest memory by DMA"
    identity = Identity(vendor_id=0x1234, device_id=0x5C7A, class_code=0xFF0000)

    def __init__(self, host: Host) -> None:
        hooks = {"DOORBELL": self._ring, "STATUS": self._acknowledge}
        self.words = RamRegion(0x1000)
        self.registers = RegisterFile(0x1000, REGISTERS, on_write=hooks, background=self.words)
        super().__init__(host, {0: Bar(self.registers)}, msi_vectors=1, msix_vectors=1)

    def _ring(self, _index: int, _value: int) -> None:
        self.registers.cell("STATUS").value |= BUSY
        self.host.start("copy", self._copy)

    def _acknowledge(self, _index: int, value: int) -> None:
        self.registers.cell("STATUS").store(value)
        self._set_status(self.registers.cell("STATUS").value)

    def _set_status(self, status: int) -> None:
        self.registers.cell("STATUS").value = status
        self.interrupts.set_level(bool(status & (DONE | FAILED)))

    async def _copy(self) -> None:
        source, destination, length = (self.registers.cell(row.name).value for row in REGISTERS[:3])
        outcome = DONE
        try:
            for place in range(0, length, CHUNK):
                data = bytes(await self.host.dma.read(source + place, min(CHUNK, length - place)))
                await self.host.dma.write(destination + place, data)  # a view must not live over an await
                await pause()
        except DmaError:
            outcome = FAILED
        self._set_status(self.registers.cell("STATUS").value & ~BUSY | outcome)

    def reset_state(self) -> None:
        self.registers.reset()
        self.words.clear()
