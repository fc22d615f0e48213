# SPDX-License-Identifier: BSD-3-Clause
"""Migration of the v1 protocol: a region with `vfio_device_migration_info`, and DIRTY_PAGES.

The text is the v1 specification's "VFIO Device Migration Info" and the kernel's comment of 5.8 to 5.17.
"""

import struct
from collections.abc import Mapping

from vfio_user.client.client import Client
from vfio_user.client.errors import RemoteError
from vfio_user.client.mapping import MappedRegion
from vfio_user.client.memory import RamRange
from vfio_user.client.migration.driver import Driver, pieces
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import MigrationError
from vfio_user.protocol import messages as m
from vfio_user.protocol.bitmaps import bitmap_size
from vfio_user.protocol.constants import (
    PCI_NUM_REGIONS,
    REGION_SUBTYPE_MIGRATION,
    REGION_TYPE_MIGRATION,
    MigrationState,
    MigrationV1State,
)
from vfio_user.protocol.values import Bitmap, BitmapRange, Payload, TypeCapability

_DEVICE_STATE, _PENDING_BYTES, _DATA_OFFSET, _DATA_SIZE = 0, 8, 16, 24
_REGISTERS_END = 32
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_BITS: Mapping[MigrationState, MigrationV1State] = {
    MigrationState.STOP: MigrationV1State.STOP,
    MigrationState.RUNNING: MigrationV1State.RUNNING,
    MigrationState.STOP_COPY: MigrationV1State.SAVING,
    MigrationState.PRE_COPY: MigrationV1State.SAVING | MigrationV1State.RUNNING,
    MigrationState.RESUMING: MigrationV1State.RESUMING,
    MigrationState.ERROR: MigrationV1State.ERROR,
}
_STATES: Mapping[int, MigrationState] = {int(bits): state for state, bits in _BITS.items()}


class V1Driver(Driver):
    """`mapped`: reach the data area through a mapping where the server allows one. Some allow it and do
    not put the data there (libvfio-user's sample), so the default are messages, which all servers take."""

    protocol = "v1"
    pre_copy = True

    def __init__(self, client: Client, region: m.DeviceGetRegionInfoReply, page_size: int = 4096) -> None:
        super().__init__(client, page_size)
        self.region = region
        self._mapping: MappedRegion | None = None

    @classmethod
    async def open(cls, client: Client, page_size: int = 4096, *, mapped: bool = False) -> "V1Driver | None":
        region = await find_region(client)
        if region is None:
            return None
        driver = cls(client, region, page_size)
        if mapped:
            driver._mapping = await client.map_region(region.index)
        return driver

    def close(self) -> None:
        """Unmap the data area."""
        super().close()
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    # States

    async def state(self) -> MigrationState:
        bits = await self._read(_DEVICE_STATE, _U32)
        if bits not in _STATES:
            raise MigrationError(f"device_state is {bits:#05b}, which is no state")
        return _STATES[bits]

    async def enter(self, state: MigrationState) -> None:
        await self._write(_DEVICE_STATE, _U32, _BITS[state])

    async def resume(self) -> None:
        """The specification's table has no way from pre-copy to running but through stop-and-copy; the
        kernel's has. What refuses the short way is led the long one."""
        try:
            await super().resume()
        except RemoteError:
            await self.enter(MigrationState.STOP_COPY)
            await self.enter(MigrationState.RUNNING)

    # The dirty log

    async def start_log(self, ranges: tuple[RamRange, ...]) -> None:
        session = self.client.session
        if session is None or session.migration is None:
            raise MigrationError("the server has not negotiated the capability migration: no dirty log")
        self._logged(ranges)
        await self.client.dirty_pages_start()

    async def stop_log(self) -> None:
        await self.client.dirty_pages_stop()

    async def read_log(self, pages: PageSet) -> None:
        for part in self.ranges:
            for begin, size in pieces(part.size, self._longest_report()):
                await self._read_range(pages, part.address + begin, size)

    async def _read_range(self, pages: PageSet, address: int, size: int) -> None:
        # Whole 64-bit words, as the kernel wants them: libvfio-user takes no other size.
        length = bitmap_size(size, self.page_size)
        wanted = BitmapRange(address, size, Bitmap(self.page_size, length))
        bitmap = await self.client.dirty_pages_bitmap(wanted)
        if len(bitmap) < length:
            raise MigrationError(f"a dirty bitmap of {len(bitmap)} bytes, {length} were asked for")
        pages.add_bitmap(address, size, self.page_size, bitmap)

    def _longest_report(self) -> int:
        """Bytes of memory whose bitmap the server gives at once."""
        session = self.client.session
        assert session is not None
        assert session.migration is not None
        bitmap = min(session.migration.max_bitmap_size, self.transfer)
        return bitmap * 8 * self.page_size

    # Saving ("Saving" in the kernel's comment: pending_bytes begins an iteration and ends the one before)

    async def read_state(self) -> Payload | None:
        pending = await self._read(_PENDING_BYTES, _U64)
        if not pending:
            return None
        offset = await self._read(_DATA_OFFSET, _U64)
        size = await self._read(_DATA_SIZE, _U64)
        self._check_place(offset, size)
        if not size:
            raise MigrationError(f"{pending} bytes are pending, and data_size is 0")
        return await self._read_data(offset, size)

    async def _read_data(self, offset: int, size: int) -> Payload:
        found = self._mapping.find(offset, size) if self._mapping else None
        if found is not None:
            view, start = found
            return bytes(view[start : start + size])
        parts = [
            await self.client.region_read(self.region.index, offset + begin, length)
            for begin, length in pieces(size, self.transfer)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # Resuming

    async def write_state(self, data: Payload) -> None:
        """One iteration; several when the piece is longer than the area has room."""
        done = 0
        while done < len(data):
            offset = await self._read(_DATA_OFFSET, _U64)
            self._check_place(offset, 0)
            size = min(len(data) - done, self.region.size - offset)
            await self._write_data(offset, memoryview(data)[done : done + size])
            await self._write(_DATA_SIZE, _U64, size)
            done += size

    async def _write_data(self, offset: int, data: memoryview) -> None:
        found = self._mapping.find(offset, len(data)) if self._mapping else None
        if found is not None:
            view, start = found
            view[start : start + len(data)] = data
            return
        for begin, length in pieces(len(data), self.transfer):
            await self.client.region_write(self.region.index, offset + begin, data[begin : begin + length])

    async def load(self) -> None:
        """Nothing: v1 has no way from RESUMING but to RUNNING, and finds out there what is wrong."""

    def _check_place(self, offset: int, size: int) -> None:
        if offset < _REGISTERS_END or offset >= self.region.size or size > self.region.size - offset:
            whole = self.region.size
            raise MigrationError(f"{size} bytes at data_offset {offset:#x} leave the region of {whole:#x}")

    async def _read(self, offset: int, layout: struct.Struct) -> int:
        data = await self.client.region_read(self.region.index, offset, layout.size)
        return int(layout.unpack(data)[0])

    async def _write(self, offset: int, layout: struct.Struct, value: int) -> None:
        await self.client.region_write(self.region.index, offset, layout.pack(value))


async def find_region(client: Client) -> m.DeviceGetRegionInfoReply | None:
    """The migration region: the one whose type capability says so."""
    count = (await client.get_info()).num_regions
    wanted = TypeCapability(REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION)
    for index in range(PCI_NUM_REGIONS, min(count, PCI_NUM_REGIONS + 64)):
        region = await client.get_region_info(index)
        if wanted in region.capabilities and region.size > _REGISTERS_END:
            return region
    return None
