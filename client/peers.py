# SPDX-License-Identifier: BSD-3-Clause
"""The bus between the devices of one VM: what a device writes by DMA to another's BAR becomes a REGION_WRITE.

    bus = await join_peers([first, second])

Each server is told of the others' memory BARs as of DMA regions without a descriptor, as QEMU does; so it
sends DMA_WRITE, and the VMM hands the data on. (A read from a BAR cannot be answered at once: EFAULT.)
"""

from collections.abc import Iterator, Sequence

from vfio_user.client.fake_vmm import FakeVmm
from vfio_user.client.memory import PAGE, RamRange
from vfio_user.protocol import messages as m


class PeerBus:
    """The memory BARs of all devices. Make it with `join_peers`; `writes` counts what went over it."""

    def __init__(self, vmms: Sequence[FakeVmm]) -> None:
        self.vmms = tuple(vmms)
        self.writes = 0

    def windows(self, vmm: FakeVmm) -> Iterator[tuple[int, int]]:
        """Address and size of the memory BARs of a device, as far as pages can reach them."""
        for bar in vmm.bars.values():
            if not bar.io and bar.size >= PAGE:
                yield bar.address, bar.size

    def write(self, address: int, data: m.Payload) -> bool:
        for vmm in self.vmms:
            for bar in vmm.bars.values():
                if not bar.io and bar.address <= address and address + len(data) <= bar.address + bar.size:
                    vmm.client.link.post(m.RegionWriteRequest(address - bar.address, bar.index, data))
                    self.writes += 1
                    return True
        return False


async def join_peers(vmms: Sequence[FakeVmm]) -> PeerBus:
    """Let each device reach the others; their BARs have addresses."""
    bus = PeerBus(vmms)
    for vmm in vmms:
        vmm.peers = bus
        for other in vmms:
            if other is not vmm:
                for address, size in bus.windows(other):
                    await vmm.client.dma_map(RamRange(address, size, memoryview(b"")))
    return bus
