# SPDX-License-Identifier: BSD-3-Clause
"""A device's configuration space from the VMM's side (PCI Local Bus 3.0, chapter 6)."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from vfio_user.client.client import Client
from vfio_user.protocol.constants import PciRegion
from vfio_user.protocol.errors import RemoteProtocolError

VENDOR_ID, COMMAND, STATUS, REVISION, HEADER_TYPE = 0x00, 0x04, 0x06, 0x08, 0x0E
BAR0, ROM, CAPABILITIES, INTERRUPT_PIN = 0x10, 0x30, 0x34, 0x3D
STATUS_CAPABILITIES = 1 << 4
NUM_BARS = 6
_FIRST_CAPABILITY = 0x40
_LAYOUTS = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


class CommandBits(IntFlag):
    """The command register (6.2.2)."""

    IO = 1 << 0
    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    INTX_DISABLE = 1 << 10


class Capability(IntEnum):
    """Capability ids (appendix H)."""

    POWER_MANAGEMENT = 0x01
    MSI = 0x05
    VENDOR = 0x09
    EXPRESS = 0x10
    MSIX = 0x11


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register: `size` in bytes; `address` 0 while nothing is assigned."""

    index: int
    size: int
    io: bool = False
    wide: bool = False
    """64-bit: takes the next index as well."""
    address: int = 0


class ConfigSpace:
    """Reads and writes by width (1, 2, 4 bytes); remembers the command register as it was last written."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.command = CommandBits(0)

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA: a VMM refuses it otherwise."""
        return bool(self.command & CommandBits.BUS_MASTER)

    async def read(self, offset: int, width: int) -> int:
        data = await self._client.region_read(PciRegion.CONFIG, offset, width)
        return int(_LAYOUTS[width].unpack(data)[0])

    async def write(self, offset: int, value: int, width: int) -> None:
        data = _LAYOUTS[width].pack(value)
        if offset == COMMAND:
            self.command = CommandBits(value & 0xFFFF)
        await self._client.region_write(PciRegion.CONFIG, offset, data)

    async def set_command(self, bits: CommandBits) -> None:
        """Switch on `bits` beside those that are on."""
        await self.write(COMMAND, await self.read(COMMAND, 2) | bits, 2)

    async def clear_command(self, bits: CommandBits) -> None:
        await self.write(COMMAND, await self.read(COMMAND, 2) & ~bits & 0xFFFF, 2)

    async def capabilities(self) -> dict[int, int]:
        """Offset by capability id, of the first of each id. RemoteProtocolError when the list is broken."""
        found: dict[int, int] = {}
        if not await self.read(STATUS, 2) & STATUS_CAPABILITIES:
            return found
        seen: set[int] = set()
        place = await self.read(CAPABILITIES, 1) & ~3
        while place:
            if place in seen or place < _FIRST_CAPABILITY:
                raise RemoteProtocolError(f"the capability list is broken at {place:#x}")
            seen.add(place)
            header = await self.read(place, 2)
            found.setdefault(header & 0xFF, place)
            place = header >> 8 & ~3
        return found

    async def find_capability(self, capability: int) -> int:
        """Its offset. RemoteProtocolError when the device does not have it."""
        place = (await self.capabilities()).get(capability)
        if place is None:
            raise RemoteProtocolError(f"the device has no capability {capability:#x}")
        return place

    async def size_bars(self) -> list[Bar]:
        """Find the BARs as firmware does (6.2.5.1): write all ones, read the size mask, write back."""
        bars: list[Bar] = []
        index = 0
        while index < NUM_BARS:
            bar = await self._size_bar(index)
            if bar is not None:
                bars.append(bar)
            index += 2 if bar is not None and bar.wide else 1
        return bars

    async def _size_bar(self, index: int) -> Bar | None:
        mask = await self._probe(BAR0 + 4 * index)
        if mask & 1:
            # libvfio-user shows a BAR that is not there as one for I/O, without address bits.
            size = -(mask & 0xFFFC) & 0xFFFF
            return Bar(index, size, io=True) if size else None
        wide = mask >> 1 & 3 == 2
        bits = 0xFFFF_FFFF
        if wide:
            mask |= await self._probe(BAR0 + 4 * index + 4) << 32
            bits = 0xFFFF_FFFF_FFFF_FFFF
        size = -(mask & ~0xF) & bits
        return Bar(index, size, wide=wide) if size else None

    async def _probe(self, offset: int, ones: int = 0xFFFF_FFFF) -> int:
        before = await self.read(offset, 4)
        await self.write(offset, ones, 4)
        mask = await self.read(offset, 4)
        await self.write(offset, before, 4)
        return mask

    async def size_rom(self) -> int:
        """Bytes of the expansion ROM (6.2.5.2); 0: none."""
        return -(await self._probe(ROM, 0xFFFF_F800) & 0xFFFF_F800) & 0xFFFF_FFFF

    async def assign(self, bar: Bar) -> None:
        """Write `bar.address` into the register."""
        await self.write(BAR0 + 4 * bar.index, bar.address & 0xFFFF_FFFF, 4)
        if bar.wide:
            await self.write(BAR0 + 4 * bar.index + 4, bar.address >> 32, 4)
