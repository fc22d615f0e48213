# SPDX-License-Identifier: BSD-3-Clause
"""What a device shows at a region index: the base class, and plain memory."""

from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Area:
    """`size` bytes from `offset` in a region."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A place whose writes an engine may deliver by eventfd (GET_REGION_IO_FDS, ioeventfd).

    A write of `size` bytes at `offset` reaches `Region.write` with `value`, whatever was written; with
    `value` None only the fact of the write counts and zeros are passed.
    """

    offset: int
    size: int
    value: int | None = None


class SharedMemory(Protocol):
    """Device memory that the VMM may map: made by `Host.allocate_memory`, lives as long as the host."""

    @property
    def view(self) -> memoryview:
        """All of the memory, writable."""


class Region:
    """A region of a device. The engine has checked offset and count against `size` before each access."""

    readable: bool = True
    writable: bool = True
    mmap_areas: tuple[Area, ...] = ()
    """Page-aligned parts that the VMM may map; they need `memory`."""
    memory: SharedMemory | None = None
    doorbells: tuple[Doorbell, ...] = ()

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, count: int) -> bytes:
        """Give `count` bytes from `offset`, little-endian where they are registers. Never waits."""
        raise NotImplementedError

    def write(self, offset: int, data: Buffer) -> None:
        """Take `data` at `offset`. Never waits; `data` is not kept after the call."""
        raise NotImplementedError


class RamRegion(Region):
    """Plain memory, that the VMM may map if it is `shared`."""

    def __init__(self, size: int, shared: SharedMemory | None = None) -> None:
        super().__init__(size)
        self._view = memoryview(bytearray(size)) if shared is None else shared.view
        self.memory = shared
        if shared is not None:
            self.mmap_areas = (Area(0, size),)

    def clear(self) -> None:
        """Fill with zeros."""
        self._view[:] = bytes(self.size)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._view[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        self._view[offset : offset + len(data)] = data
