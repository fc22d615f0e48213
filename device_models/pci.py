# SPDX-License-Identifier: BSD-3-Clause
"""PCI configuration space: header, BARs, capabilities, built from values (PCI Local Bus 3.0, chapter 6)."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vfio_user.device_models.regions import Buffer, Region
from vfio_user.device_models.state import U64, Apply, Fields, Reader, Section, Value

COMMAND, STATUS, BAR0, SUBSYSTEM = 0x04, 0x06, 0x10, 0x2C
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
COMMAND_IO, COMMAND_MEMORY, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE = 1 << 0, 1 << 1, 1 << 2, 1 << 10
STATUS_INTERRUPT, STATUS_CAPABILITIES = 1 << 3, 1 << 4
# I/O, memory, bus master, parity response, SERR enable, INTx disable (6.2.2)
COMMAND_WRITABLE = 0x0547
# master data parity, signalled and received aborts, system error, parity error (6.2.3)
STATUS_WRITE_1_TO_CLEAR = 0xF900

CAP_POWER_MANAGEMENT, CAP_MSI, CAP_MSIX = 0x01, 0x05, 0x11


@dataclass(frozen=True, slots=True)
class Identity:
    """What the function is; `class_code` holds class, subclass and programming interface in 24 bits."""

    vendor_id: int
    device_id: int
    class_code: int
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register over `region`, whose size is a power of two: >= 16 (memory) or 4 (I/O)."""

    region: Region
    io: bool = False
    wide: bool = False
    """A 64-bit memory BAR; it takes the next index as well."""
    prefetchable: bool = False

    def __post_init__(self) -> None:
        size = self.region.size
        if size & (size - 1) or size < (4 if self.io else 16):
            raise ValueError(f"a BAR's size must be a power of two of at least 16 (I/O: 4), not {size}")
        if self.io and (self.wide or self.prefetchable or size > 256):
            raise ValueError("an I/O BAR is neither 64-bit nor prefetchable and has at most 256 bytes")

    @property
    def flags(self) -> int:
        """The read-only low bits."""
        return 1 if self.io else self.wide << 2 | self.prefetchable << 3


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability: the `body` after its two first bytes, and the bits of it that a write replaces."""

    id: int
    body: bytes
    writable: bytes = b""
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.writable) > len(self.body):
            raise ValueError(f"capability {self.id:#x}: the mask is longer than the body")


def power_management() -> Capability:
    """D0 and D3hot, no PME (PCI Power Management 1.2, 3.2)."""
    return Capability(CAP_POWER_MANAGEMENT, struct.pack("<HHBB", 0x0003, 0, 0, 0), struct.pack("<HH", 0, 3))


def msi(vectors: int) -> Capability:
    """Up to 32 messages with 64-bit addresses, without masking (PCI 3.0, 6.8.1)."""
    if vectors not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {vectors}")
    control = 1 << 7 | (vectors.bit_length() - 1) << 1
    return Capability(
        CAP_MSI,
        struct.pack("<HIIHH", control, 0, 0, 0, 0),
        struct.pack("<HIIH", 0x0071, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF),
    )


def msix(vectors: int, table: tuple[int, int], pba: tuple[int, int]) -> Capability:
    """`vectors` of MSI-X; `table` and `pba` are (BAR index, offset) (PCI 3.0, 6.8.2)."""
    if not 1 <= vectors <= 2048:
        raise ValueError(f"MSI-X has 1 to 2048 vectors, not {vectors}")
    body = struct.pack("<HII", vectors - 1, table[1] | table[0], pba[1] | pba[0])
    return Capability(CAP_MSIX, body, struct.pack("<H", 0xC000))


class ConfigSpace(Region):
    """The configuration space as a region: 256 bytes, or 4096 with an (empty) extended part.

    `on_change` is called after every write with no argument; the device looks at what it cares for.
    """

    def __init__(
        self, identity: Identity, bars: Mapping[int, Bar], *, interrupt_pin: int = 0, size: int = 256
    ) -> None:
        """`interrupt_pin` is 1 to 4 for INTA to INTD, 0 for none."""
        super().__init__(size)
        self.bars = dict(bars)
        self.on_change: Callable[[], None] = lambda: None
        self.capabilities: dict[int, int] = {}
        """Offsets by capability id."""
        self._bytes = bytearray(size)
        self._writable = bytearray(size)
        self._write_1_to_clear = bytearray(size)
        self._end, self._last_link = 0x40, CAPABILITIES
        self._build_header(identity, interrupt_pin)
        for index, bar in self.bars.items():
            self._build_bar(index, bar)
        self._initial = bytes(self._bytes)

    def _build_header(self, identity: Identity, interrupt_pin: int) -> None:
        struct.pack_into("<HH", self._bytes, 0, identity.vendor_id, identity.device_id)
        struct.pack_into("<I", self._bytes, 8, identity.class_code << 8 | identity.revision)
        struct.pack_into("<HH", self._bytes, SUBSYSTEM, identity.subsystem_vendor_id, identity.subsystem_id)
        self._bytes[INTERRUPT_PIN] = interrupt_pin
        struct.pack_into("<HH", self._writable, COMMAND, COMMAND_WRITABLE, 0)
        struct.pack_into("<H", self._write_1_to_clear, STATUS, STATUS_WRITE_1_TO_CLEAR)
        self._writable[0x0C] = self._writable[INTERRUPT_LINE] = 0xFF  # cache line size, interrupt line

    def _build_bar(self, index: int, bar: Bar) -> None:
        if not 0 <= index <= (4 if bar.wide else 5) or (bar.wide and index + 1 in self.bars):
            raise ValueError(f"BAR {index} does not exist or is taken by a 64-bit BAR")
        offset = BAR0 + 4 * index
        struct.pack_into("<I", self._bytes, offset, bar.flags)
        mask = -bar.region.size & (0xFFFF_FFFF_FFFF_FFFF if bar.wide else 0xFFFF_FFFF)
        struct.pack_into("<Q" if bar.wide else "<I", self._writable, offset, mask)

    def add_capability(self, capability: Capability, offset: int | None = None) -> int:
        """Link a capability at `offset`, or at the next free place, and give the offset (in bytes)."""
        place = self._end if offset is None else offset
        end = place + 2 + len(capability.body)
        if place & 3 or place < self._end or end > 256:
            raise ValueError(
                f"no room for capability {capability.id:#x} at {place:#x}: free from {self._end:#x}"
            )
        self._bytes[self._last_link] = place
        self._bytes[place:end] = bytes([capability.id, 0]) + capability.body
        self._writable[place + 2 : place + 2 + len(capability.writable)] = capability.writable
        self._last_link, self._end = place + 1, (end + 3) & ~3
        self._bytes[STATUS] |= STATUS_CAPABILITIES
        self.capabilities[capability.id] = place
        self._initial = bytes(self._bytes)
        return place

    def reset(self) -> None:
        """Power-on values: BARs and command register 0 too, as a function-level reset leaves them."""
        self._bytes[:] = self._initial
        self.on_change()

    def read_word(self, offset: int) -> int:
        """16 bits for the device's own use."""
        return self._bytes[offset] | self._bytes[offset + 1] << 8

    @property
    def command(self) -> int:
        return self.read_word(COMMAND)

    @property
    def bus_master(self) -> bool:
        return bool(self.command & COMMAND_BUS_MASTER)

    @property
    def power_on(self) -> bytes:
        """What a reset leaves."""
        return self._initial

    @property
    def writable_bits(self) -> bytes:
        """A mask of the bits that a write replaces."""
        return bytes(self._writable)

    @property
    def write_1_to_clear_bits(self) -> bytes:
        """A mask of the bits that a write of ones clears."""
        return bytes(self._write_1_to_clear)

    def set_interrupt_status(self, level: bool) -> None:
        """The status register's interrupt bit, which shows the level whatever the INTx disable bit says."""
        self._bytes[STATUS] = self._bytes[STATUS] & ~STATUS_INTERRUPT | (STATUS_INTERRUPT if level else 0)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._bytes[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        for place, value in enumerate(bytes(data), offset):
            mask, clear = self._writable[place], self._write_1_to_clear[place]
            self._bytes[place] = (self._bytes[place] & ~mask & ~(value & clear)) | (value & mask)
        self.on_change()

    # State

    def section(self, name: str) -> Section:
        """The configuration space as a section of the state; `on_change` is not called."""
        return Section(name, 1, self._save, self._load)

    def _save(self) -> Fields:
        bars: list[Value] = [
            {"index": index, "size": bar.region.size, "flags": bar.flags} for index, bar in self.bars.items()
        ]
        return {"bars": bars, "bytes": self._bytes.hex()}

    def _load(self, reader: Reader) -> Apply:
        self._check_bars(reader, reader.records("bars", 6))
        data = reader.data("bytes", self.size)
        for offset, value in enumerate(data):
            changeable = self._writable[offset] | self._write_1_to_clear[offset]
            if offset == STATUS:
                changeable |= STATUS_INTERRUPT  # shows the level
            if (value ^ self._initial[offset]) & ~changeable:
                reader.refuse("bytes", f"at {offset:#x}, {self._describe(offset, data)}")

        def apply() -> None:
            self._bytes[:] = data

        return apply

    def _check_bars(self, reader: Reader, bars: Sequence[Reader]) -> None:
        """The addresses in the stream belong to BARs of just these sizes and kinds."""
        found = {
            bar.integer("index", 5): (bar.integer("size", U64), bar.integer("flags", 15)) for bar in bars
        }
        for index, own in self.bars.items():
            if found.get(index) != (own.region.size, own.flags):
                size, flags = found.get(index, (0, 0))
                reader.refuse(
                    "bars",
                    f"BAR {index} has {size} bytes and flags {flags:#x} there, "
                    f"{own.region.size} and {own.flags:#x} here",
                )
        if len(bars) != len(self.bars):
            reader.refuse("bars", f"there are {len(bars)} BARs, {len(self.bars)} here")

    def _describe(self, offset: int, data: bytes) -> str:
        """What is wrong about a byte of `data` that has read-only bits of another device."""
        for index, bar in self.bars.items():
            start, width = BAR0 + 4 * index, 8 if bar.wide else 4
            if start <= offset < start + width:
                address = int.from_bytes(data[start : start + width], "little")
                return f"BAR {index}: {address:#x} is no address for {bar.region.size} bytes of its kind"
        name = next((name for name, place in _READ_ONLY if offset in place), "a read-only bit")
        return f"{name} is not that of this device"


_READ_ONLY = (
    ("the vendor or device id", range(0, 4)),
    ("the revision or class code", range(8, 12)),
    ("the subsystem", range(SUBSYSTEM, SUBSYSTEM + 4)),
    ("a capability", range(0x40, 0x100)),
)
