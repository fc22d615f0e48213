# SPDX-License-Identifier: BSD-3-Clause
"""Migration of the v2 protocol: DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE and DMA_LOGGING.

The text is QEMU's specification ("VFIO_USER_DEVICE_FEATURE" and what follows) and linux/vfio.h.
"""

import errno

from vfio_user.client.client import Client
from vfio_user.client.errors import RemoteError
from vfio_user.client.memory import RamRange
from vfio_user.client.migration.driver import Driver, pieces
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import MigrationError
from vfio_user.protocol import layouts
from vfio_user.protocol.constants import DeviceFeature, MigrationFlags, MigrationState
from vfio_user.protocol.values import (
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
    FeatureMigState,
    Payload,
)

_ABSENT = (errno.ENOTTY, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_REPORT_HEAD = 24


class V2Driver(Driver):
    """`flags` is what the device says that it can."""

    protocol = "v2"

    def __init__(self, client: Client, flags: MigrationFlags, page_size: int = 4096) -> None:
        super().__init__(client, page_size)
        self.flags = flags
        self.p2p = bool(flags & MigrationFlags.P2P)
        self.pre_copy = bool(flags & MigrationFlags.PRE_COPY)
        self._drained = False

    @classmethod
    async def open(cls, client: Client, page_size: int = 4096) -> "V2Driver | None":
        try:
            flags = MigrationFlags(await client.get_migration_flags())
        except RemoteError as error:
            if error.errno in _ABSENT:
                return None
            raise
        if not flags & MigrationFlags.STOP_COPY:
            return None
        return cls(client, flags, page_size)

    # States

    async def state(self) -> MigrationState:
        data = await self.client.get_feature(DeviceFeature.MIG_DEVICE_STATE, room=8)
        number = layouts.parse(FeatureMigState, data).device_state
        try:
            return MigrationState(number)
        except ValueError:
            raise MigrationError(f"the device is in state {number}, which is none") from None

    async def enter(self, state: MigrationState) -> None:
        self._drained = False
        await self.client.set_feature(
            DeviceFeature.MIG_DEVICE_STATE, layouts.build(FeatureMigState(int(state)))
        )

    # The dirty log

    async def start_log(self, ranges: tuple[RamRange, ...]) -> None:
        self._logged(ranges)
        if not self.ranges:
            return
        wanted = tuple(DmaLoggingRange(part.address, part.size) for part in self.ranges)
        control = DmaLoggingControl(self.page_size, wanted)
        await self.client.set_feature(DeviceFeature.DMA_LOGGING_START, layouts.build(control))

    async def stop_log(self) -> None:
        if self.ranges:
            await self.client.set_feature(DeviceFeature.DMA_LOGGING_STOP)

    async def read_log(self, pages: PageSet) -> None:
        longest = self.transfer * 8 * self.page_size
        for part in self.ranges:
            for begin, size in pieces(part.size, longest):
                await self._read_range(pages, part.address + begin, size)

    async def _read_range(self, pages: PageSet, address: int, size: int) -> None:
        request = DmaLoggingReport(address, size, self.page_size)
        room = _REPORT_HEAD + -(-size // (self.page_size * 64)) * 8
        data = await self.client.get_feature(
            DeviceFeature.DMA_LOGGING_REPORT, layouts.build(request), room=room
        )
        report = layouts.parse(DmaLoggingReport, data)
        if (report.iova, report.length, report.page_size) != (address, size, self.page_size):
            raise MigrationError(f"a dirty report of other pages than those asked for: {report}")
        pages.add_bitmap(address, size, self.page_size, report.bitmap)

    # State

    async def read_state(self) -> Payload | None:
        """A read that comes back short is the last one (in PRE_COPY: for now)."""
        if self._drained:
            self._drained = False
            return None
        data = await self.client.mig_data_read(self.transfer)
        self._drained = len(data) < self.transfer
        if not len(data):
            self._drained = False
            return None
        return data

    async def write_state(self, data: Payload) -> None:
        view = memoryview(data)
        for begin, size in pieces(len(data), self.transfer):
            await self.client.mig_data_write(view[begin : begin + size])

    async def load(self) -> None:
        await self.enter(MigrationState.STOP)
