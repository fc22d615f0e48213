# SPDX-License-Identifier: BSD-3-Clause
"""What a device shows at a region index: the base class, and plain memory."""

import re
from dataclasses import dataclass
from typing import Protocol

from vfio_user.device_models.state import Apply, Fields, Reader, Section
from vfio_user.device_models.state_memory import Ranges, WriteLog

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

    def reset(self) -> None:
        """Bring what the region holds to its value after power-on."""

    def section(self, name: str) -> Section | None:
        """What the region holds as a section of the device's state, if it holds anything."""
        return None


class RamRegion(Region):
    """Plain memory, that the VMM may map if it is `shared`."""

    def __init__(self, size: int, shared: SharedMemory | None = None) -> None:
        super().__init__(size)
        self._view = memoryview(bytearray(size)) if shared is None else shared.view
        self.memory = shared
        if shared is not None:
            self.mmap_areas = (Area(0, size),)

    def reset(self) -> None:
        """Fill with zeros."""
        self._view[:] = bytes(self.size)

    def section(self, name: str) -> Section:
        """The bytes; for memory of a few KiB. See `StreamedMemory` for more."""
        return Section(name, 1, self.save, self.load, longest=self.longest)

    @property
    def longest(self) -> int:
        """Bytes of `save` as JSON."""
        return 2 * self.size + 64

    def save(self) -> Fields:
        """See `state.Section`."""
        return {"bytes": self._view.hex()}

    def load(self, reader: Reader) -> Apply:
        """See `state.Section`."""
        data = reader.data("bytes", self.size)

        def apply() -> None:
            self._view[:] = data

        return apply

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._view[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        self._view[offset : offset + len(data)] = data


class StreamedMemory(Region):
    """Plain memory that is a `StateMemory` too. The VMM cannot map it, so that every write is known."""

    def __init__(self, memory: SharedMemory) -> None:
        """`memory` is not shown to the VMM; made by the host, it costs nothing where nothing is written."""
        super().__init__(len(memory.view))
        self._view = memory.view
        self._log = WriteLog(self.size)

    @property
    def view(self) -> memoryview:
        """See `StateMemory.view`."""
        return self._view

    @property
    def pending(self) -> int:
        """See `StateMemory.pending`."""
        return self._log.pending

    def start_log(self) -> None:
        """See `StateMemory.start_log`."""
        self._log.start()

    def stop_log(self) -> None:
        """See `StateMemory.stop_log`."""
        self._log.stop()

    def take(self, limit: int) -> tuple[int, int] | None:
        """See `StateMemory.take`."""
        return self._log.take(limit)

    def reset(self) -> None:
        """Fill with zeros."""
        for offset, length in self._log.used():
            self._view[offset : offset + length] = bytes(length)
        self._log.mark_zeroed()

    def adopt(self, memory: memoryview, used: Ranges | None = None) -> memoryview:
        """See `StateMemory.adopt`. ValueError if it does not fit."""
        if len(memory) != self.size or memory.readonly:
            raise ValueError(f"{len(memory)} bytes cannot take the place of {self.size} writable ones")
        before, self._view = self._view, memory
        self._log.mark_used()
        for offset, length in ((0, self.size),) if used is None else used:
            self._log.mark(offset, length)
        return before

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._view[offset : offset + count])

    def write(self, offset: int, data: Buffer) -> None:
        self._log.mark(offset, len(data))
        self._view[offset : offset + len(data)] = data


def parse_size(text: str) -> int:
    """For options, the size of a memory BAR: 0, or a power of two from 4K to 1G (bytes, or with K, M, G)."""
    match = re.fullmatch(r"([0-9]{1,10})([KMG]?)", text)
    size = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else -1
    if size and not (4096 <= size <= 1 << 30 and size & (size - 1) == 0):
        raise ValueError(f"it is 0, or a power of two from 4K to 1G, not {text!r}")
    return size
