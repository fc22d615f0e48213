# SPDX-License-Identifier: BSD-3-Clause
"""Migration of the v2 protocol: DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE and DMA_LOGGING.

The text is QEMU's specification ("VFIO_USER_DEVICE_FEATURE" and what follows) and linux/vfio.h.
"""

import errno
from collections.abc import Sequence

from vfio_user.client.client import Client
from vfio_user.client.errors import RemoteError
from vfio_user.client.memory import RamRange
from vfio_user.client.migration.driver import Driver, pieces
from vfio_user.client.migration.pages import PageSet
from vfio_user.client.migration.report import MigrationError
from vfio_user.protocol import layouts
from vfio_user.protocol.constants import DeviceFeature, MigrationFlags, MigrationState
from vfio_user.protocol.values import DmaLoggingRange, FeatureMigState, Payload

MOST_RANGES = 256
"""Of one DMA_LOGGING_START, in the kernel; with none at all every write is logged."""

_ABSENT = (errno.ENOTTY, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


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
        if self.ranges:
            wanted = whole_pages(self.ranges, self.page_size)
            await self.client.dma_logging_start(self.page_size, wanted if len(wanted) <= MOST_RANGES else ())

    async def stop_log(self) -> None:
        if self.ranges:
            await self.client.dma_logging_stop()

    async def read_log(self, pages: PageSet) -> None:
        for part in self.ranges:
            for begin, size in pieces(part.size, self.transfer * 8 * self.page_size):
                address = part.address + begin
                bitmap = await self.client.dma_logging_report(address, size, self.page_size)
                pages.add_bitmap(address, size, self.page_size, bitmap)

    # State

    async def read_state(self) -> Payload | None:
        """A read that comes back short is the last one (in PRE_COPY: for now)."""
        if self._drained:
            self._drained = False
            return None
        data = await self.client.mig_data_read(self.transfer)
        if len(data) > self.transfer:
            raise MigrationError(f"MIG_DATA_READ: {len(data)} bytes in answer to {self.transfer}")
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


def whole_pages(ranges: Sequence[RamRange], page_size: int) -> list[DmaLoggingRange]:
    """The ranges, made larger to whole pages of `page_size` bytes, and joined where they touch then."""
    joined: list[tuple[int, int]] = []
    for part in sorted(ranges, key=lambda part: part.address):
        begin = part.address // page_size * page_size
        end = -(-part.end // page_size) * page_size
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return [DmaLoggingRange(begin, end - begin) for begin, end in joined]
