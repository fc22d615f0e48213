# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory as the VMM has it: ranges at guest addresses, on memfds that a server may map, or private.

Private memory (`shared=False`) has no file descriptor, so that the server must ask for every byte with
DMA_READ and DMA_WRITE. `GuestRam.dma_read` and `dma_write` answer these, and count them.
"""

import bisect
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from errno import EFAULT
from typing import Protocol

from vfio_user.protocol.constants import DmaMapFlags
from vfio_user.protocol.errors import VfioUserError
from vfio_user.protocol.values import Payload

PAGE = 4096
FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""The seals that QEMU's memfd backend sets: a server may map the memory without fear of SIGBUS."""


class RamError(VfioUserError):
    """There is no guest memory at an address, or it must not be accessed so. Default errno: EFAULT."""

    default_errno = EFAULT


@dataclass(frozen=True, slots=True)
class RamRange:
    """`size` bytes of guest memory from `address`; what one DMA_MAP tells the server of.

    `fd` is None for private memory, else the range starts at `offset` of that file. The memory belongs
    to the `GuestRam` that made the range.
    """

    address: int
    size: int
    view: memoryview
    fd: int | None = None
    offset: int = 0
    flags: int = DmaMapFlags.READ | DmaMapFlags.WRITE

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(slots=True)
class DmaCounters:
    """What the server has asked for by message; bytes count only what was granted."""

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    refused: int = 0


class WriteLog(Protocol):
    """Is told of every write that does not go past the VMM: by the guest, and by DMA_WRITE."""

    def mark(self, address: int, length: int) -> None:
        """`length` bytes at guest `address` have been written."""


class GuestRam:
    """All of a guest's memory. Close it (or use `with`) after the last view of it is gone.

    Who writes through a range's `view` writes past `log`.
    """

    def __init__(self, *, shared: bool = True, seals: int = FIXED_SIZE) -> None:
        """`shared`: on memfds, which get `seals` (0: none, as a VMM that does not seal its memory)."""
        self.shared = shared
        self.counters = DmaCounters()
        self.on_dma_write: Callable[[int, int], None] | None = None
        """Called with address and length (bytes) after every DMA_WRITE."""
        self.log: WriteLog | None = None
        """The VMM's own part of the dirty log."""
        self._seals = seals
        self._ranges: list[RamRange] = []
        self._starts: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._fds: list[int] = []
        self._free: dict[int, int] = {}

    def __enter__(self) -> "GuestRam":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ranges(self) -> tuple[RamRange, ...]:
        """By rising address."""
        return tuple(self._ranges)

    def add(self, address: int, size: int, *, writable: bool = True) -> RamRange:
        """Zeroed memory of `size` bytes at guest `address`, both multiples of 4096.

        `writable` is about the device. ValueError when the range is not aligned or overlaps another one.
        """
        return self.add_file([(address, size)], writable=writable)[0]

    def add_file(self, places: Sequence[tuple[int, int]], *, writable: bool = True) -> list[RamRange]:
        """Ranges of (address, size) that lie one after another in one file, as `add` otherwise.

        So a VMM splits its memory around holes; the offset in the file is then not the address.
        """
        for address, size in places:
            self._check_free(address, size)
        flags = DmaMapFlags.READ | (DmaMapFlags.WRITE if writable else 0)
        fd, whole = self._allocate(sum(size for _, size in places))
        ranges, offset = [], 0
        for address, size in places:
            ranges.append(RamRange(address, size, whole[offset : offset + size], fd, offset, flags))
            offset += size
        whole.release()
        for added in ranges:
            self._insert(added)
        return ranges

    def _check_free(self, address: int, size: int) -> None:
        if address % PAGE or size % PAGE or size <= 0:
            raise ValueError(f"{size:#x} bytes at {address:#x}: must be multiples of {PAGE}")
        if any(owned.address < address + size and address < owned.end for owned in self._ranges):
            raise ValueError(f"{size:#x} bytes at {address:#x} overlap other memory")

    def _insert(self, added: RamRange) -> None:
        place = bisect.bisect(self._starts, added.address)
        self._ranges.insert(place, added)
        self._starts.insert(place, added.address)
        self._free[added.address] = added.address

    def _allocate(self, size: int) -> tuple[int | None, memoryview]:
        if not self.shared:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._maps.append(memory)
            return None, memoryview(memory)
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(fd)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, self._seals)
        memory = mmap.mmap(fd, size)
        self._maps.append(memory)
        return fd, memoryview(memory)

    def close(self) -> None:
        """Give the memory back. BufferError when somebody still holds a view of it."""
        for owned in self._ranges:
            owned.view.release()
        self._ranges.clear()
        self._starts.clear()
        while self._maps:
            self._maps.pop().close()
        while self._fds:
            os.close(self._fds.pop())

    # Access by the guest (a driver, a test)

    def read(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes. RamError when a part is no memory."""
        view, start = self._find(address, length)
        if view is not None:
            return bytes(view[start : start + length])
        return b"".join(bytes(v[s : s + n]) for v, s, n in self._pieces(address, length))

    def write(self, address: int, data: Payload) -> None:
        """Store `data`. RamError when a part is no memory; nothing is written then."""
        length, done = len(data), 0
        view, start = self._find(address, length)
        if self.log is not None:
            self.log.mark(address, length)
        if view is not None:
            view[start : start + length] = data
            return
        for view, start, size in list(self._pieces(address, length)):
            view[start : start + size] = data[done : done + size]
            done += size

    def unpack(self, layout: struct.Struct, address: int) -> tuple[int, ...]:
        """Read one structure, which must lie in one range."""
        view, start = self._find(address, layout.size)
        if view is None:
            raise RamError(f"{layout.size} bytes at {address:#x} are not in one range of guest memory")
        return layout.unpack_from(view, start)

    def pack(self, layout: struct.Struct, address: int, *values: int) -> None:
        """Write one structure, which must lie in one range."""
        view, start = self._find(address, layout.size)
        if view is None:
            raise RamError(f"{layout.size} bytes at {address:#x} are not in one range of guest memory")
        if self.log is not None:
            self.log.mark(address, layout.size)
        layout.pack_into(view, start, *values)

    def allocate(self, size: int, align: int = PAGE) -> int:
        """The address of `size` bytes that nobody else was given, zeroed, in the first range with room."""
        for owned in self._ranges:
            address = -(-self._free[owned.address] // align) * align
            if address + size <= owned.end:
                self._free[owned.address] = address + size
                return address
        raise RamError(f"no range of guest memory has {size:#x} bytes left")

    def release_all(self) -> None:
        """Forget every `allocate`; the contents are zeroed again."""
        for owned in self._ranges:
            used = self._free[owned.address] - owned.address
            owned.view[:used] = bytes(used)
            if self.log is not None:
                self.log.mark(owned.address, used)
            self._free[owned.address] = owned.address

    def adopt_allocations(self, other: "GuestRam") -> None:
        """Take over what the guest has allocated in `other`, which it has been moved from."""
        self._free = dict(other._free)

    def _find(self, address: int, length: int) -> tuple[memoryview | None, int]:
        """The view that holds all of it and the place in it; None when it is not within one range."""
        index = bisect.bisect(self._starts, address) - 1
        if index >= 0:
            owned = self._ranges[index]
            if address + length <= owned.address + owned.size:
                return owned.view, address - owned.address
        return None, 0

    def _pieces(self, address: int, length: int, need: int = 0) -> Iterator[tuple[memoryview, int, int]]:
        """View, start and length of each part of a stretch that crosses adjoining ranges."""
        position, end = address, address + length
        while position < end:
            index = bisect.bisect(self._starts, position) - 1
            if index < 0 or position >= self._ranges[index].end:
                raise RamError(f"no guest memory at {position:#x}")
            owned = self._ranges[index]
            if need & ~owned.flags:
                raise RamError(f"the guest memory at {position:#x} is read-only to the device")
            size = min(end, owned.end) - position
            yield owned.view, position - owned.address, size
            position += size

    # Access by the server, as messages

    def dma_read(self, address: int, count: int) -> Payload:
        """Answer DMA_READ. RamError when the device may not read there."""
        try:
            pieces = list(self._pieces(address, count, DmaMapFlags.READ))
        except RamError:
            self.counters.refused += 1
            raise
        self.counters.reads += 1
        self.counters.bytes_read += count
        return b"".join(bytes(view[start : start + size]) for view, start, size in pieces)

    def dma_write(self, address: int, data: Payload) -> None:
        """Do what DMA_WRITE asks. RamError when the device may not write there; nothing is written then."""
        try:
            pieces = list(self._pieces(address, len(data), DmaMapFlags.WRITE))
        except RamError:
            self.counters.refused += 1
            raise
        done = 0
        for view, start, size in pieces:
            view[start : start + size] = data[done : done + size]
            done += size
        self.counters.writes += 1
        self.counters.bytes_written += done
        if self.log is not None:
            self.log.mark(address, done)
        if self.on_dma_write is not None:
            self.on_dma_write(address, done)
