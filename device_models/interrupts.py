# SPDX-License-Identifier: BSD-3-Clause
"""One way to interrupt, whichever of INTx, MSI and MSI-X the guest uses (PCI Local Bus 3.0, 6.8)."""

from vfio_user.device_models import pci
from vfio_user.device_models.device import Host, IrqIndex
from vfio_user.device_models.regions import Buffer, Region
from vfio_user.device_models.state import LONGEST, Apply, Fields, Reader, Section

TABLE_ENTRY = 16  # bytes: address, upper address, data, vector control (6.8.2)


class MsixRegion(Region):
    """The BAR that holds the MSI-X table at 0 and the pending bits (PBA) at `pba_offset`.

    The client delivers the messages and honours the table's masks (it learns of them through its own
    traps, and masks by SET_IRQS), so the table is plain memory here. The PBA is read-only.
    """

    def __init__(self, vectors: int) -> None:
        self.pba_offset = max(2048, 1 << (vectors * TABLE_ENTRY - 1).bit_length())
        super().__init__(2 * self.pba_offset)
        self._vectors = vectors
        self._table = bytearray(self.pba_offset)
        self.pending = 0
        """A bit for each vector that could not be delivered."""
        self.reset()

    def reset(self) -> None:
        self._table[:] = bytes(self.pba_offset)
        for vector in range(self._vectors):
            self._table[vector * TABLE_ENTRY + 12] = 1  # masked after reset
        self.pending = 0

    def read(self, offset: int, count: int) -> bytes:
        everything = self._table + self.pending.to_bytes(self.pba_offset, "little")
        return bytes(everything[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        end = min(offset + len(data), self._vectors * TABLE_ENTRY)
        if offset < end:
            self._table[offset:end] = data[: end - offset]

    def save(self) -> Fields:
        """The table and the pending bits."""
        table = self._table[: self._vectors * TABLE_ENTRY]
        return {"table": table.hex(), "pending": _encode_bits(self.pending, self._vectors)}

    def load(self, reader: Reader) -> Apply:
        """See `state.Section.load`."""
        table = reader.data("table", self._vectors * TABLE_ENTRY)
        pending = _read_bits(reader, "pending", self._vectors)

        def apply() -> None:
            self._table[: len(table)] = table
            self.pending = pending

        return apply


class Interrupts:
    """The interrupt side of a PCI function.

    `set_level` is for a device with a cause register: it follows the level with INTx, and with MSI or
    MSI-X sends vector 0 when the level rises. `notify` sends a message and has no effect with INTx.
    """

    def __init__(
        self,
        host: Host,
        config: pci.ConfigSpace,
        msix_region: MsixRegion | None = None,
        msi_vectors: int = 0,
    ) -> None:
        self._host = host
        self._config = config
        self._msix = msix_region
        self._msi_vectors = msi_vectors
        self._msi_pending = 0
        self.level = False

    @property
    def mode(self) -> IrqIndex:
        """What the guest has enabled, by its configuration space or (a client without one) by SET_IRQS."""
        if self._uses(IrqIndex.MSIX, pci.CAP_MSIX, 0x8000):
            return IrqIndex.MSIX
        if self._uses(IrqIndex.MSI, pci.CAP_MSI, 0x0001):
            return IrqIndex.MSI
        return IrqIndex.INTX

    def _uses(self, index: IrqIndex, capability: int, enable: int) -> bool:
        place = self._config.capabilities.get(capability)
        if place is None:
            return False
        return self._host.irq_enabled(index) or bool(self._config.read_word(place + 2) & enable)

    def set_level(self, level: bool) -> None:
        rises = level and not self.level
        if level != self.level:
            self.level = level
            self._config.set_interrupt_status(level)
            self.update()
        if rises and self.mode is not IrqIndex.INTX:
            self.notify(0)

    def notify(self, vector: int) -> None:
        """Send an MSI or MSI-X message; one that cannot be delivered stays pending."""
        mode = self.mode
        if mode is not IrqIndex.INTX and not self._host.trigger_irq(mode, vector):
            self.pend(mode, vector)

    def pend(self, index: IrqIndex, vector: int) -> None:
        """Keep a message for when it can be delivered: also for `Device.pend_irq`."""
        self._set_pending(index, self._pending(index) | 1 << vector)

    def unmasked(self, index: IrqIndex, vector: int) -> None:
        """Deliver what was pending: for `Device.irq_unmasked`."""
        if self._pending(index) >> vector & 1 and self._host.trigger_irq(index, vector):
            self._set_pending(index, self._pending(index) & ~(1 << vector))

    def _pending(self, index: IrqIndex) -> int:
        return self._msix.pending if index is IrqIndex.MSIX and self._msix is not None else self._msi_pending

    def _set_pending(self, index: IrqIndex, pending: int) -> None:
        if index is IrqIndex.MSIX and self._msix is not None:
            self._msix.pending = pending
        else:
            self._msi_pending = pending

    def update(self) -> None:
        """Drive the pin by the level, the INTx disable bit and the mode; after configuration writes."""
        disabled = self._config.command & pci.COMMAND_INTX_DISABLE or self.mode is not IrqIndex.INTX
        self._host.set_irq_level(self.level and not disabled)

    def reset(self) -> None:
        self.level = False
        self._msi_pending = 0
        if self._msix is not None:
            self._msix.reset()
        self._config.set_interrupt_status(False)
        self.update()

    # State

    def section(self) -> Section:
        """Level, pending messages and the MSI-X table as a section of the state."""
        table = 0 if self._msix is None else self._msix.size
        return Section("interrupts", 1, self._save, self._load, longest=LONGEST + 2 * table)

    def _save(self) -> Fields:
        return {
            "level": self.level,
            "msi_pending": _encode_bits(self._msi_pending, self._msi_vectors),
            "msix": None if self._msix is None else self._msix.save(),
        }

    def _load(self, reader: Reader) -> Apply:
        level = reader.flag("level")
        msi_pending = _read_bits(reader, "msi_pending", self._msi_vectors)
        if self._msix is None:
            reader.null("msix")
        apply_msix = None if self._msix is None else self._msix.load(reader.record("msix"))

        def apply() -> None:
            self.level, self._msi_pending = level, msi_pending
            if apply_msix is not None:
                apply_msix()

        return apply

    def restored(self) -> None:
        """Show and drive the level. The host tells of each vector that can be delivered when it resumes."""
        self._config.set_interrupt_status(self.level)
        self.update()


def _encode_bits(bits: int, count: int) -> str:
    return (bits & (1 << count) - 1).to_bytes((count + 7) // 8, "little").hex()


def _read_bits(reader: Reader, name: str, count: int) -> int:
    bits = int.from_bytes(reader.data(name, (count + 7) // 8), "little")
    if bits >> count:
        reader.refuse(name, f"there are {count} vectors")
    return bits
