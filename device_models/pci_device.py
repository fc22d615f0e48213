# SPDX-License-Identifier: BSD-3-Clause
"""The base of a PCI device model: configuration space, BARs and interrupts put together."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vfio_user.device_models import pci
from vfio_user.device_models.device import Device, Host, IrqIndex, RegionIndex
from vfio_user.device_models.interrupts import Interrupts, MsixRegion
from vfio_user.device_models.regions import StreamedMemory
from vfio_user.device_models.state import Section
from vfio_user.device_models.state_memory import StateMemory


def memory_bar(host: Host, index: int, size: int) -> dict[int, pci.Bar]:
    """A 64-bit prefetchable BAR of `size` bytes of streamed memory, by its index; none if `size` is 0."""
    if not size:
        return {}
    return {index: pci.Bar(StreamedMemory(host.allocate_memory(size)), wide=True, prefetchable=True)}


class PciDevice(Device):
    """A device that is built from an identity, its BARs and the interrupts that it can use.

    A subclass sets `identity`, gives its BARs to this constructor and overrides `reset_state`. One that
    can be migrated sets `state_version`. What its BARs hold (register tables, memory) is saved and restored
    here; of what it keeps elsewhere it makes sections of its own (`state_sections`), and what follows from
    the rest (tasks, timers, an interrupt's level) it derives in `restored`.
    """

    identity: ClassVar[pci.Identity]
    config_size: ClassVar[int] = 256
    """Bytes of configuration space: 4096 for a device with an extended part (PCI Express)."""

    def __init__(
        self,
        host: Host,
        bars: Mapping[int, pci.Bar],
        *,
        intx: bool = True,
        msi_vectors: int = 0,
        msix_vectors: int = 0,
        capabilities: tuple[pci.Capability, ...] = (),
    ) -> None:
        """With `msix_vectors` the table takes the first free BAR above those of `bars`."""
        super().__init__(host)
        table = MsixRegion(msix_vectors) if msix_vectors else None
        all_bars, table_bar = dict(bars), self._free_bar(bars)
        if table is not None:
            all_bars[table_bar] = pci.Bar(table)
        self.config = pci.ConfigSpace(self.identity, all_bars, interrupt_pin=int(intx), size=self.config_size)
        for capability in capabilities:
            self.config.add_capability(capability)
        if msi_vectors:
            self.config.add_capability(pci.msi(msi_vectors))
        if table is not None:
            self.config.add_capability(pci.msix(msix_vectors, (table_bar, 0), (table_bar, table.pba_offset)))
        self.interrupts = Interrupts(host, self.config, table, msi_vectors)
        self.regions = {index: bar.region for index, bar in all_bars.items()} | {
            RegionIndex.CONFIG: self.config
        }
        counts = {IrqIndex.INTX: int(intx), IrqIndex.MSI: msi_vectors, IrqIndex.MSIX: msix_vectors}
        self.irqs = {index: count for index, count in counts.items() if count}
        self.config.on_change = self._config_changed

    @staticmethod
    def _free_bar(bars: Mapping[int, pci.Bar]) -> int:
        return max((index + 1 + bar.wide for index, bar in bars.items()), default=0)

    def _config_changed(self) -> None:
        self.host.dma.enabled = self.config.bus_master
        self.interrupts.update()

    def reset(self) -> None:
        """DEVICE_RESET: configuration space and interrupts, then the device's own state."""
        self.config.reset()
        self.interrupts.reset()
        self.reset_state()

    def reset_state(self) -> None:
        """Bring the device's own state to what it is after power-on: by default, what its BARs hold."""
        for bar in self.config.bars.values():
            bar.region.reset()

    def irq_unmasked(self, index: IrqIndex, vector: int) -> None:
        self.interrupts.unmasked(index, vector)

    def pend_irq(self, index: IrqIndex, vector: int) -> bool:
        self.interrupts.pend(index, vector)
        return True

    def sections(self) -> Sequence[Section]:
        return (self.config.section("config"), self.interrupts.section(), *self.state_sections())

    def state_sections(self) -> Sequence[Section]:
        """The state beside configuration space and interrupts: by default, what the BARs hold."""
        found = (bar.region.section(f"bar{index}") for index, bar in self.config.bars.items())
        return [section for section in found if section is not None]

    def memories(self) -> Mapping[str, StateMemory]:
        regions = {f"bar{index}": bar.region for index, bar in self.config.bars.items()}
        return {name: region for name, region in regions.items() if isinstance(region, StreamedMemory)}

    def restored(self) -> None:
        """Derive what hangs on configuration space and interrupts; called first by a subclass's own."""
        self.interrupts.restored()
        self._config_changed()
