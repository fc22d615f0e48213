# SPDX-License-Identifier: BSD-3-Clause
"""A model with 16 MSI-X vectors, an I/O BAR and a 64-bit one, for tests with a real QEMU.

A write to FIRE (BAR 0) sends the vector of that number. MARK (BAR 0) and NOTE (BAR 2, I/O ports) are words
that the guest writes and reads again. The MSI-X table is at the start of BAR 3.
"""

from vfio_user.device_models.device import Host
from vfio_user.device_models.pci import Bar, Capability, Identity, power_management
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.registers import Register, RegisterFile

VECTORS = 16
FIRE, MARK, NOTE = 0x0, 0x8, 0x4
_WORD = 2**32 - 1


class Vectors(PciDevice):
    model = "msix"
    summary = "16 vectors of MSI-X that the guest fires itself"
    identity = Identity(vendor_id=0x1234, device_id=0x5C7B, class_code=0xFF0000)
    state_version = 1
    extra: tuple[Capability, ...] = (power_management(),)

    def __init__(self, host: Host) -> None:
        rows = (Register("FIRE", FIRE, writable=_WORD), Register("MARK", MARK, writable=_WORD))
        memory = RegisterFile(0x1000, rows, on_write={"FIRE": self._fire})
        ports = RegisterFile(32, (Register("NOTE", NOTE, writable=_WORD),))
        bars = {0: Bar(memory, wide=True, prefetchable=True), 2: Bar(ports, io=True)}
        super().__init__(host, bars, msi_vectors=4, msix_vectors=VECTORS, capabilities=self.extra)

    def _fire(self, _index: int, value: int) -> None:
        if value < VECTORS:
            self.interrupts.notify(value)
