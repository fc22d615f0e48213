# SPDX-License-Identifier: BSD-3-Clause
"""The smallest useful device: memory, and a doorbell that copies guest memory. The one to copy."""

from vfio_user.device_models.device import DmaError, Host, Option, pause
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice, memory_bar
from vfio_user.device_models.regions import RamRegion, parse_size
from vfio_user.device_models.registers import Register, RegisterFile

BUSY, DONE, FAILED = 1, 2, 4
REGISTERS = (
    Register("ADDRESS", 0xFE0, width=8, count=2, stride=8, writable=2**64 - 1, text="to copy from, and to"),
    Register("LENGTH", 0xFF0, writable=2**32 - 1, text="bytes to copy"),
    Register("COPIED", 0xFF4, text="bytes copied so far"),
    Register("DOORBELL", 0xFF8, text="any write starts the copy, unless one is under way"),
    Register("STATUS", 0xFFC, write_1_to_clear=DONE | FAILED, text="busy 1, done 2, failed 4"),
)


class Scratch(PciDevice):
    model = "scratch"
    summary = "4 KiB of words, more memory on demand, and a doorbell that copies guest memory by DMA"
    options = (Option("memory", parse_size, "0", "size of BAR 2: 0 (none), or 4K to 1G, a power of two"),)
    identity = Identity(vendor_id=0x1234, device_id=0x5C7A, class_code=0xFF0000)
    state_version = 1  # the base class resets, saves and restores what the BARs hold

    def __init__(self, host: Host, *, memory: int = 0) -> None:
        hooks = {"DOORBELL": self._ring, "STATUS": self._acknowledge}
        self.registers = RegisterFile(0x1000, REGISTERS, on_write=hooks, background=RamRegion(0x1000))
        self.source, self.target, self.length, self.copied, _, self.status = self.registers.cells
        bars = {0: Bar(self.registers)} | memory_bar(host, 2, memory)
        super().__init__(host, bars, msi_vectors=1, msix_vectors=1)

    def _ring(self, _index: int, _value: int) -> None:
        if not self.status.value & BUSY:
            self.copied.value, self.status.value = 0, self.status.value | BUSY
            self.host.start("copy", self._copy)

    def _acknowledge(self, _index: int, value: int) -> None:
        self.status.store(value)
        self.interrupts.set_level(bool(self.status.value & (DONE | FAILED)))

    async def _copy(self) -> None:
        dma, outcome = self.host.dma, DONE
        try:
            while (place := self.copied.value) < self.length.value:
                data = bytes(await dma.read(self.source.value + place, min(65536, self.length.value - place)))
                await dma.write(self.target.value + place, data)  # a view must not live over an await
                self.copied.value = place + len(data)  # in one step with the write: nothing is done twice
                await pause()  # others get their turn
        except DmaError:
            outcome = FAILED
        self.status.value = self.status.value & ~BUSY | outcome
        self.interrupts.set_level(True)

    def restored(self) -> None:
        super().restored()
        if self.status.value & BUSY:
            self.host.start("copy", self._copy)
