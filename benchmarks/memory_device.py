# SPDX-License-Identifier: BSD-3-Clause
"""A device that is 1 MiB of memory behind BAR1, for reads that are larger than any register file."""

from vfio_user.device_models.device import Host
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import RamRegion

SIZE = 1 << 20


class Memory(PciDevice):
    model = "memory"
    summary = "1 MiB of memory behind BAR1"
    identity = Identity(vendor_id=0x1234, device_id=0x5C7B, class_code=0x058000)

    def __init__(self, host: Host) -> None:
        self.memory = RamRegion(SIZE)
        super().__init__(host, {1: Bar(self.memory)})
