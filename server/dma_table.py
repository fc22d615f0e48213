# SPDX-License-Identifier: BSD-3-Clause
"""The DMA regions of one client: DMA_MAP, DMA_UNMAP and the search by address.

The start addresses are one sorted list. Insertion and removal move at most 8 bytes a region, which at
10,000 regions is about a microsecond; a balanced tree would cost more at every size that exists.
"""

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Protocol

from vfio_user.protocol.bitmaps import ADDRESS_SPACE
from vfio_user.protocol.constants import DEFAULT_MAX_DMA_MAPS
from vfio_user.protocol.errors import DeviceError, RemoteProtocolError
from vfio_user.server.dma_region import DmaRegion, MappedRegion, RegionSpec, open_region
from vfio_user.transport.fds import OwnedFd

MAX_MAPPED = 32 << 40
"""Bytes of a client's memory that are mapped at a time. A sealed memfd costs its owner nothing, however long,
and a process has addresses for 128 TiB (x86-64 with four levels of page tables): a client that took them all
would leave none for allocations. The largest machines that one can rent have less memory than this."""


class RegionWatcher(Protocol):
    """Is told of the regions that come and go."""

    def mapped(self, region: DmaRegion) -> None:
        """A VfioUserError undoes the mapping."""

    def unmapped(self, region: DmaRegion) -> None:
        """Its memory is released already."""


class DmaTable:
    """Regions that do not overlap. All errors are `VfioUserError`s with the errno of the reply."""

    def __init__(
        self,
        *,
        max_regions: int = DEFAULT_MAX_DMA_MAPS,
        page_size: int = 4096,
        trust_client_memory: bool = False,
    ) -> None:
        self.max_regions = max_regions
        self.page_size = page_size
        self.trust_client_memory = trust_client_memory
        self.watcher: RegionWatcher | None = None
        """The dirty log, while pages are logged."""
        self._starts: list[int] = []
        self._regions: dict[int, DmaRegion] = {}
        self._mapped = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[DmaRegion]:
        """In the order of their addresses."""
        return (self._regions[start] for start in self._starts)

    def map(
        self,
        address: int,
        size: int,
        fd: OwnedFd | None = None,
        offset: int = 0,
        *,
        readable: bool = True,
        writable: bool = True,
    ) -> DmaRegion:
        """Add a region (specification: "VFIO_USER_DMA_MAP"). Takes ownership of `fd` in any case.

        `offset` is that in the file, and counts with a descriptor only.

        EINVAL: size 0, not page aligned, past the end of the address space, neither readable nor
        writable, a descriptor that is too short or no file. EEXIST: overlaps a region. ENOSPC: too many
        regions. ENOMEM: more than MAX_MAPPED bytes to map. EACCES: the descriptor does not allow writing,
        and `writable` (as mmap says it; the kernel's VFIO refuses it too, because a DMA that fails later
        would be worse).
        """
        spec = RegionSpec(address, size, offset if fd is not None else 0, readable, writable)
        try:
            self._check(spec)
        except BaseException:
            if fd is not None:
                fd.close()
            raise
        room = MAX_MAPPED - self._mapped
        region = open_region(spec, fd, trusted=self.trust_client_memory, room=room)
        if self.watcher is not None:
            try:
                self.watcher.mapped(region)
            except BaseException:
                region.close()
                raise
        insort(self._starts, address)
        self._regions[address] = region
        self._mapped += _mapped_size(region)
        return region

    def _check(self, spec: RegionSpec) -> None:
        if spec.size == 0 or (spec.address | spec.size | spec.offset) & (self.page_size - 1):
            raise RemoteProtocolError(
                f"DMA region at {spec.address:#x}, size {spec.size:#x}, offset {spec.offset:#x}: "
                f"not whole pages of {self.page_size} bytes"
            )
        if spec.address + spec.size > ADDRESS_SPACE:
            raise RemoteProtocolError(f"DMA region at {spec.address:#x} wraps around the address space")
        if not (spec.readable or spec.writable):
            raise RemoteProtocolError(f"DMA region at {spec.address:#x} is neither readable nor writable")
        if (other := self._first_from(spec.address, spec.size)) is not None:
            raise RemoteProtocolError(
                f"DMA region at {spec.address:#x} overlaps the one at {other.address:#x}", errno.EEXIST
            )
        if len(self._starts) >= self.max_regions:
            raise DeviceError(f"there are {self.max_regions} DMA regions already", errno.ENOSPC)

    def unmap(self, address: int, size: int) -> list[DmaRegion]:
        """Remove every region in the range; their memory is released. Raises as `whole_regions`."""
        regions = self.whole_regions(address, size)
        first = bisect_left(self._starts, address)
        self._remove(first, first + len(regions))
        return regions

    def whole_regions(self, address: int, size: int) -> list[DmaRegion]:
        """The regions in a range that is to be unmapped.

        The specification asks for exactly one region; like the kernel's VFIO we also take a range that
        holds several whole ones. ENOENT: there is none. EINVAL: size 0, wrap-around, or the range cuts a
        region.
        """
        if size <= 0 or address + size > ADDRESS_SPACE:
            raise RemoteProtocolError(f"cannot unmap {size:#x} bytes at {address:#x}: no such range")
        regions = self.overlapping(address, size)
        if not regions:
            raise RemoteProtocolError(f"no DMA region at {address:#x}, size {size:#x}", errno.ENOENT)
        if regions[0].address < address or regions[-1].end > address + size:
            raise RemoteProtocolError(f"unmapping {size:#x} bytes at {address:#x} would cut a DMA region")
        return regions

    def unmap_all(self) -> list[DmaRegion]:
        """Remove every region: DMA_UNMAP with FLAG_ALL, and a client that has gone."""
        regions = list(self)
        self._remove(0, len(regions))
        return regions

    def _remove(self, first: int, last: int) -> None:
        for start in self._starts[first:last]:
            region = self._regions.pop(start)
            self._mapped -= _mapped_size(region)
            region.close()
            if self.watcher is not None:
                self.watcher.unmapped(region)
        del self._starts[first:last]

    def find(self, address: int) -> DmaRegion | None:
        """The region that holds `address`."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        region = self._regions[self._starts[index]]
        return region if address < region.end else None

    def overlapping(self, address: int, size: int) -> list[DmaRegion]:
        """The regions that have at least a byte in the range, by address."""
        first = bisect_right(self._starts, address)
        if first and self._regions[self._starts[first - 1]].end > address:
            first -= 1
        last = bisect_left(self._starts, address + size)
        return [self._regions[start] for start in self._starts[first:last]]

    def _first_from(self, address: int, size: int) -> DmaRegion | None:
        found = self.overlapping(address, size)
        return found[0] if found else None


def _mapped_size(region: DmaRegion) -> int:
    return region.size if isinstance(region, MappedRegion) else 0
