# SPDX-License-Identifier: BSD-3-Clause
"""The hosts that the engines give to a device: guest memory, interrupts, tasks and time."""

import time
from collections.abc import Mapping
from typing import Protocol

from vfio_user.device_models.device import Device, IrqIndex, RegionIndex
from vfio_user.device_models.host import HostBase, log_timer_error
from vfio_user.device_models.regions import Region, SharedMemory
from vfio_user.protocol.constants import PCI_NUM_REGIONS
from vfio_user.server.dirty_tracking import DirtyTracking
from vfio_user.server.dma_table import DmaTable
from vfio_user.server.guest_memory import GuestMemory
from vfio_user.server.ioeventfds import Ioeventfds
from vfio_user.server.irqs import Irqs
from vfio_user.server.message_dma import DmaSender, MessageDma
from vfio_user.server.migration.engine import MigrationEngine
from vfio_user.server.migration.region import MigrationRegion
from vfio_user.server.shared_memory import MemfdMemory
from vfio_user.transport.poller import Poller

_BLANKED = frozenset(RegionIndex) - {RegionIndex.CONFIG}


class IrqLines(Protocol):
    """What a host needs of an engine's interrupts."""

    @property
    def fired(self) -> Mapping[IrqIndex, int]:
        """How often an interrupt went out, by index."""

    @property
    def level(self) -> bool:
        """Of the INTx pin."""

    @property
    def unanswered(self) -> bool | None:
        """Whether INTx has been fired and the client has not unmasked it since; None: nobody knows."""

    def fired_vectors(self, index: IrqIndex) -> int:
        """A mask of the vectors that have gone out since the client came."""

    def set_level(self, level: bool) -> None:
        """See `Host.set_irq_level`."""

    def trigger(self, index: IrqIndex, vector: int) -> bool:
        """See `Host.trigger_irq`."""

    def enabled(self, index: IrqIndex) -> bool:
        """See `Host.irq_enabled`."""

    def stop(self) -> None:
        """Fire nothing until `resume`."""

    def resume(self) -> None:
        """Fire INTx if its level is high, and tell the device of every deliverable vector."""

    def release(self) -> None:
        """The client has gone, and its eventfds and masks with it. The level of INTx stays."""


class EngineHost(HostBase):
    """A `device.Host`. What belongs to a client goes with `detach`; the device and its state stay.

    A subclass sets `irqs` in `install`: they follow from the device.
    """

    irqs: IrqLines

    def __init__(self, table: DmaTable) -> None:
        super().__init__(time.monotonic_ns, log_timer_error)
        self._blank = False
        self._memories: list[MemfdMemory] = []
        self.table = table
        self.dma = GuestMemory(table, gate=self.gate)

    def install(self, device: Device) -> None:
        """Know the device, which has been made with this host; it is stopped until a client uses it."""
        self.stop()

    def detach(self) -> None:
        """The client has gone: stop the device, release the client's memory and descriptors."""
        self.stop()
        self._blank = False
        self.tasks.cut()  # nobody answers what they wait for
        self.dma.messages = None
        self.dma.set_write_through(False)
        self.table.unmap_all()
        self.irqs.release()

    def close(self) -> None:
        """The end: release everything. The device must not be used afterwards."""
        self.reset()
        for memory in self._memories:
            memory.close()
        self._memories.clear()

    def stop(self) -> None:
        super().stop()
        self.dma.take_no_short_way()
        self.irqs.stop()

    def resume(self) -> None:
        self._blank = False
        super().resume()
        self.irqs.resume()

    def set_blank(self, on: bool) -> None:
        """Keep the client's accesses to BARs, ROM and VGA from a stopped model: zeros are read, and what is
        written is dropped. Ends when the device goes on, and with the client."""
        self._blank = on

    def is_blank(self, index: int) -> bool:
        """Whether a client's access to the region does not reach the model now; only while it is stopped."""
        return self._blank and index in _BLANKED

    @property
    def blank(self) -> bool:
        """Whether `set_blank` is in force."""
        return self._blank

    def set_irq_level(self, level: bool) -> None:
        self.irqs.set_level(level)

    def trigger_irq(self, index: IrqIndex, vector: int) -> bool:
        return self.irqs.trigger(index, vector)

    def irq_enabled(self, index: IrqIndex) -> bool:
        return self.irqs.enabled(index)

    def allocate_memory(self, size: int) -> MemfdMemory:
        memory = MemfdMemory(size)
        self._memories.append(memory)
        return memory

    def memory_fd(self, memory: SharedMemory) -> int:
        """The descriptor of memory that `allocate_memory` made."""
        assert isinstance(memory, MemfdMemory)
        return memory.fd

    def counters(self) -> Mapping[str, int]:
        """DMA by way, and interrupts by index."""
        fired = {f"irqs_{index.name.lower()}": count for index, count in self.irqs.fired.items()}
        return {f"dma_{name}": value for name, value in self.dma.counters.as_dict().items()} | fired


class ServerHost(EngineHost):
    """The native engine's. What has no value here follows from the device and is there once `install` was
    called. `regions` are the device's and, if it can be migrated, the migration region after them."""

    irqs: Irqs
    ioeventfds: Ioeventfds
    migration: MigrationEngine
    migration_region: MigrationRegion
    migration_index: int
    regions: Mapping[int, Region]

    def __init__(
        self, poller: Poller, *, trust_client_memory: bool = False, max_dma_maps: int = 65535
    ) -> None:
        super().__init__(DmaTable(max_regions=max_dma_maps, trust_client_memory=trust_client_memory))
        self._poller = poller
        self.dirty = DirtyTracking(self.table)

    def install(self, device: Device) -> None:
        self.dirty.precise = device.precise_dirty
        self.irqs = Irqs(self._poller, device.irqs, device.irq_unmasked)
        self.migration = MigrationEngine(device, self)
        self.migration_region = MigrationRegion(self.migration)
        self.migration_index = max(PCI_NUM_REGIONS, max(device.regions) + 1)
        own = {self.migration_index: self.migration_region} if self.migration.available else {}
        self.regions = {**device.regions, **own}
        self.ioeventfds = Ioeventfds(self._poller, self.regions)
        super().install(device)

    def stop(self) -> None:
        self.ioeventfds.ring_all()
        super().stop()

    def attach(self, sender: DmaSender, *, max_dma_maps: int, max_transfer: int) -> None:
        """A client has negotiated: DMA without shared memory goes to it by message."""
        self.table.max_regions = max_dma_maps
        self.dma.messages = MessageDma(sender, max_transfer, self.gate)

    def detach(self) -> None:
        self.dirty.stop()
        super().detach()
        self.ioeventfds.release()
        self.migration.client_left()
        self.migration_region.release()
