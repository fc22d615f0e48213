# SPDX-License-Identifier: BSD-3-Clause
"""The commands that move a device: 14 (v1) and 16 to 18 (v2). What to do with them is for a driver."""

from collections.abc import Sequence
from typing import TypeVar

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    DEVICE_FEATURE_SIZE,
    DeviceFeature,
    DeviceFeatureFlags,
    DirtyPagesFlags,
)

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
        """The bitmap of a range; bit n, little-endian, is page n of it."""
        request = m.DirtyPagesRequest(DirtyPagesFlags.GET_BITMAP, wanted)
        return (await self.ask(request, m.DirtyPagesReply)).data

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
        return (await self.ask(request, m.DeviceFeatureReply)).data

    async def get_migration_flags(self) -> int:
        """MigrationFlags: what the device can do."""
        data = await self.get_feature(DeviceFeature.MIGRATION, room=8)
        return layouts.parse(m.FeatureMigration, data).flags

    # 17 MIG_DATA_READ, 18 MIG_DATA_WRITE

    async def mig_data_read(self, size: int) -> m.Payload:
        """At most `size` bytes of state; fewer: the end, or in PRE_COPY nothing more now."""
        return (await self.ask(m.MigDataReadRequest(size), m.MigDataReadReply)).data

    async def mig_data_write(self, data: m.Payload) -> None:
        await self.ask(m.MigDataWriteRequest(data), m.MigDataWriteReply)
