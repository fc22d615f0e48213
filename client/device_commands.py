# SPDX-License-Identifier: BSD-3-Clause
"""The commands that ask what the device is: 4 to 7, with the descriptors that their replies bring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vfio_user.client.call import owned_fds
from vfio_user.client.mapping import MappedRegion
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import DEVICE_INFO_SIZE, REGION_INFO_SIZE, REGION_IO_FDS_SIZE
from vfio_user.protocol.errors import RemoteProtocolError
from vfio_user.protocol.events import Reply
from vfio_user.transport.fds import OwnedFd, close_all

ReplyT = TypeVar("ReplyT", bound=m.Message)

_MAX_ARGSZ = 1 << 20  # a server that says it needs more than this for an info reply is wrong


@dataclass(frozen=True, slots=True)
class RegionIoFds:
    """The answer to GET_REGION_IO_FDS; `fds` are the receiver's to close."""

    sub_regions: tuple[m.SubRegion, ...]
    fds: tuple[OwnedFd, ...]

    def close(self) -> None:
        close_all(self.fds)


class DeviceCommands:
    """A part of `Client`."""

    def __init__(self) -> None:
        self._region_fds: dict[int, list[OwnedFd]] = {}

    async def request(self, body: m.Message, fds: Sequence[int] = ()) -> Reply:
        raise NotImplementedError

    async def ask(self, body: m.Message, kind: type[ReplyT], fds: Sequence[int] = ()) -> ReplyT:
        raise NotImplementedError

    def close_region_fds(self) -> None:
        """Close the descriptors of regions that are kept."""
        for fds in self._region_fds.values():
            close_all(fds)
        self._region_fds.clear()

    async def get_info(self) -> m.DeviceGetInfoReply:
        return await self.ask(m.DeviceGetInfoRequest(DEVICE_INFO_SIZE), m.DeviceGetInfoReply)

    async def get_region_info(self, index: int) -> m.DeviceGetRegionInfoReply:
        """Size, flags and capabilities. The region's descriptors are kept for `map_region`."""
        reply = await self._get_region_info(index, REGION_INFO_SIZE)
        if reply.argsz > REGION_INFO_SIZE:
            reply = await self._get_region_info(index, _checked(reply.argsz))
        return reply

    async def _get_region_info(self, index: int, argsz: int) -> m.DeviceGetRegionInfoReply:
        reply = await self.request(m.DeviceGetRegionInfoRequest(index, argsz))
        close_all(self._region_fds.pop(index, ()))
        self._region_fds[index] = owned_fds(reply)
        assert isinstance(reply.body, m.DeviceGetRegionInfoReply)
        return reply.body

    async def map_region(self, index: int) -> MappedRegion:
        """Map what the region lets us map. ValueError when that is nothing."""
        info = await self.get_region_info(index)
        return MappedRegion(info, self._region_fds[index])

    async def get_region_io_fds(self, index: int) -> RegionIoFds:
        """The places of the region whose writes may go by an eventfd."""
        found = await self._get_region_io_fds(index, REGION_IO_FDS_SIZE)
        if found[0].argsz > REGION_IO_FDS_SIZE and not found[0].sub_regions:
            found[1].close()
            found = await self._get_region_io_fds(index, _checked(found[0].argsz))
        return found[1]

    async def _get_region_io_fds(
        self, index: int, argsz: int
    ) -> tuple[m.DeviceGetRegionIoFdsReply, RegionIoFds]:
        reply = await self.request(m.DeviceGetRegionIoFdsRequest(index, argsz))
        assert isinstance(reply.body, m.DeviceGetRegionIoFdsReply)
        return reply.body, RegionIoFds(reply.body.sub_regions, tuple(owned_fds(reply)))

    async def get_irq_info(self, index: int) -> m.DeviceGetIrqInfoReply:
        return await self.ask(m.DeviceGetIrqInfoRequest(index), m.DeviceGetIrqInfoReply)


def _checked(argsz: int) -> int:
    if argsz > _MAX_ARGSZ:
        raise RemoteProtocolError(f"the server says that its reply needs {argsz} bytes")
    return argsz
