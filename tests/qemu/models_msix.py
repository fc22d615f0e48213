# SPDX-License-Identifier: BSD-3-Clause
"""A model with 16 MSI-X vectors, an I/O BAR and a 64-bit one, for tests with a real QEMU.

A write to FIRE (BAR 0) sends the vector of that number. MARK (BAR 0) and NOTE (BAR 2, I/O ports) are words
that the guest writes and reads again. The MSI-X table is at the start of BAR 3.
"""

import struct

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
    capabilities: tuple[Capability, ...] = (power_management(),)

    def __init__(self, host: Host) -> None:
        rows = (Register("FIRE", FIRE, writable=_WORD), Register("MARK", MARK, writable=_WORD))
        memory = RegisterFile(0x1000, rows, on_write={"FIRE": self._fire})
        ports = RegisterFile(32, (Register("NOTE", NOTE, writable=_WORD),))
        bars = {0: Bar(memory, wide=True, prefetchable=True), 2: Bar(ports, io=True)}
        super().__init__(host, bars, msi_vectors=4, msix_vectors=VECTORS, capabilities=self.capabilities)

    def _fire(self, _index: int, value: int) -> None:
        if value < VECTORS:
            self.interrupts.notify(value)


# PCI Express Base 3.0, 7.8: an endpoint of version 2, its device control writable.
_EXPRESS = Capability(0x10, struct.pack("<HI", 0x0002, 0) + bytes(52), bytes(6) + b"\xff\x7f")
# A vendor's capability in the extended space (7.19): header, length 16, then a word of the guest's.
_EXTENDED = struct.pack("<II", 0x0001_000B, 0x0100_0001)
EXTENDED_WORD = 0x108


class Express(Vectors):
    """The same with an extended configuration space, and a word in it that the guest writes."""

    model = "msix-express"
    config_size = 4096
    capabilities = (power_management(), _EXPRESS)

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        config = self.config
        # ConfigSpace has no builder for the extended part.
        config._bytes[0x100:0x108] = _EXTENDED
        config._writable[EXTENDED_WORD : EXTENDED_WORD + 4] = b"\xff" * 4
        config._initial = bytes(config._bytes)
