# SPDX-License-Identifier: BSD-3-Clause
"""Device memory mapped into this process: the parts of a region that the server lets a VMM map."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from vfio_user.protocol.constants import RegionInfoFlags
from vfio_user.protocol.messages import DeviceGetRegionInfoReply, SparseMmapArea, SparseMmapCapability
from vfio_user.transport.fds import OwnedFd


@dataclass(frozen=True, slots=True)
class MappedArea:
    """Bytes `offset` to `offset + size` of the region."""

    offset: int
    size: int
    view: memoryview


class MappedRegion:
    """The mapped areas of one region. `with` or `close` unmaps them; no view may be held then."""

    def __init__(self, info: DeviceGetRegionInfoReply, fds: Sequence[OwnedFd]) -> None:
        """ValueError when the region cannot be mapped, OSError when the kernel does not map it."""
        if not info.flags & RegionInfoFlags.MMAP or not fds:
            raise ValueError(f"region {info.index} cannot be mapped")
        self.areas: list[MappedArea] = []
        self._maps: list[mmap.mmap] = []
        try:
            for number, area in enumerate(mappable_areas(info)):
                # The specification has one descriptor; libvfio-user sends one for each area.
                self._map(area, fds[min(number, len(fds) - 1)].fileno(), info)
        except BaseException:
            self.close()
            raise

    def _map(self, area: SparseMmapArea, fd: int, info: DeviceGetRegionInfoReply) -> None:
        protection = mmap.PROT_READ * bool(info.flags & RegionInfoFlags.READ)
        protection |= mmap.PROT_WRITE * bool(info.flags & RegionInfoFlags.WRITE)
        memory = mmap.mmap(fd, area.size, prot=protection, offset=info.offset + area.offset)
        self._maps.append(memory)
        self.areas.append(MappedArea(area.offset, area.size, memoryview(memory)))

    def find(self, offset: int, length: int) -> tuple[memoryview, int] | None:
        """The view that has these bytes of the region, and where they start in it."""
        for area in self.areas:
            if area.offset <= offset and offset + length <= area.offset + area.size:
                return area.view, offset - area.offset
        return None

    def close(self) -> None:
        """Unmap. BufferError when somebody still holds a part of a view."""
        while self.areas:
            self.areas.pop().view.release()
        while self._maps:
            self._maps.pop().close()

    def __enter__(self) -> "MappedRegion":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mappable_areas(info: DeviceGetRegionInfoReply) -> tuple[SparseMmapArea, ...]:
    """What may be mapped: the areas of the sparse capability, else all of the region."""
    for capability in info.capabilities:
        if isinstance(capability, SparseMmapCapability):
            return capability.areas
    return (SparseMmapArea(0, info.size),)
