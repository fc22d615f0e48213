# SPDX-License-Identifier: BSD-3-Clause
"""The commands that move a device: 14 (v1) and 16 to 18 (v2). What to do with them is for a driver."""

from collections.abc import Sequence
from typing import TypeVar

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.bitmaps import MIN_PAGE_SIZE, bitmap_size
from vfio_user.protocol.constants import (
    DEVICE_FEATURE_SIZE,
    DeviceFeature,
    DeviceFeatureFlags,
    DirtyPagesFlags,
)
from vfio_user.protocol.errors import RemoteProtocolError

ReplyT = TypeVar("ReplyT", bound=m.Message)


class MigrationCommands:
    """A part of `Client`."""

    async def ask(self, body: m.Message, kind: type[ReplyT], fds: Sequence[int] = ()) -> ReplyT:
        raise NotImplementedError

    # 14 DIRTY_PAGES

    async def dirty_pages_start(self) -> None:
        await self.ask(m.DirtyPagesRequest(DirtyPagesFlags.START), m.DirtyPagesReply)

    async def dirty_pages_stop(self) -> None:
        await self.ask(m.DirtyPagesRequest(DirtyPagesFlags.STOP), m.DirtyPagesReply)

    async def dirty_pages_bitmap(self, wanted: m.BitmapRange) -> m.Payload:
        """The bitmap of a range; bit n, little-endian, is page n of it. The pages are clean then.

        RemoteProtocolError when the server finds that the reply needs more room than the range says.
        """
        request = m.DirtyPagesRequest(DirtyPagesFlags.GET_BITMAP, wanted)
        self.expect(request.argsz)
        reply = await self.ask(request, m.DirtyPagesReply)
        if reply.range is None:
            raise RemoteProtocolError(f"DIRTY_PAGES: no bitmap, {reply.argsz} bytes would be needed")
        return reply.data

    def expect(self, argsz: int) -> None:
        """Let a reply body of so many bytes in: one that is asked for may be above max_data_xfer_size."""
        raise NotImplementedError

    # 16 DEVICE_FEATURE

    async def get_feature(self, feature: DeviceFeature, data: m.Payload = b"", room: int = 4096) -> m.Payload:
        """GET: the feature's data, at most `room` bytes of it."""
        return await self._feature(feature | DeviceFeatureFlags.GET, data, room)

    async def set_feature(self, feature: DeviceFeature, data: m.Payload = b"") -> m.Payload:
        return await self._feature(feature | DeviceFeatureFlags.SET, data, len(data))

    async def probe_feature(self, feature: DeviceFeature, flags: int = 0) -> None:
        """PROBE, together with the GET and SET in `flags`. RemoteError (ENOTTY) when it is not there."""
        await self._feature(feature | flags | DeviceFeatureFlags.PROBE, b"", 0)

    async def _feature(self, flags: int, data: m.Payload, room: int) -> m.Payload:
        request = m.DeviceFeatureRequest(flags, data, DEVICE_FEATURE_SIZE + max(room, len(data)))
        self.expect(request.argsz)
        return (await self.ask(request, m.DeviceFeatureReply)).data

    async def get_migration_flags(self) -> int:
        """MigrationFlags: what the device can do."""
        data = await self.get_feature(DeviceFeature.MIGRATION, room=8)
        return layouts.parse(m.FeatureMigration, data).flags

    # The features of DMA logging

    async def dma_logging_start(
        self, page_size: int = MIN_PAGE_SIZE, ranges: Sequence[m.DmaLoggingRange] = ()
    ) -> int:
        """Log the device's writes to the ranges, or all of them; the page size that the server has chosen."""
        control = layouts.build(m.DmaLoggingControl(page_size, tuple(ranges)))
        data = await self.set_feature(DeviceFeature.DMA_LOGGING_START, control)
        return layouts.parse(m.DmaLoggingControl, data).page_size

    async def dma_logging_stop(self) -> None:
        await self.set_feature(DeviceFeature.DMA_LOGGING_STOP)

    async def dma_logging_report(self, iova: int, length: int, page_size: int = MIN_PAGE_SIZE) -> m.Payload:
        """The bitmap of a range; bit n, little-endian, is page n of it. The pages are clean then.

        RemoteProtocolError when the server answers with another range, or another length of bitmap.
        """
        asked = m.DmaLoggingReport(iova, length, page_size)
        head = layouts.build(asked)
        room = len(head) + bitmap_size(length, page_size) if page_size else len(head)
        data = await self.get_feature(DeviceFeature.DMA_LOGGING_REPORT, head, room)
        if len(data) != room or data[: len(head)] != head:
            raise RemoteProtocolError(f"DMA_LOGGING_REPORT: {len(data)} bytes, not the {room} asked for")
        return data[len(head) :]

    # 17 MIG_DATA_READ, 18 MIG_DATA_WRITE

    async def mig_data_read(self, size: int) -> m.Payload:
        """At most `size` bytes of state; fewer: the end, or in PRE_COPY nothing more now."""
        return (await self.ask(m.MigDataReadRequest(size), m.MigDataReadReply)).data

    async def mig_data_write(self, data: m.Payload) -> None:
        await self.ask(m.MigDataWriteRequest(data), m.MigDataWriteReply)
