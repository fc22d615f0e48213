# SPDX-License-Identifier: BSD-3-Clause
"""Memory of a device on its way in: it takes room and work only where something was written."""

import mmap
from collections.abc import Callable, Iterator, Mapping

from vfio_user.device_models.state_memory import PAGE
from vfio_user.server.migration.stream import BLOCK, MEMORY, ZERO, Kind


class StagedMemory:
    """Zero at first. What is zero stays so at no cost: a few bytes of a stream can speak of a megabyte of
    zeros, so each page that is cleared must have been paid for by bytes that were written into it before."""

    def __init__(self, size: int) -> None:
        # Zero, and costs nothing where nothing is written; private, or reading a page would allocate it.
        self.view = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._written = bytearray(-(-size // PAGE))
        """One byte for each page that may differ from zero."""

    def __len__(self) -> int:
        return len(self.view)

    def has_block(self, offset: int, length: int) -> bool:
        """Whether a record may speak of this part."""
        return 1 <= length <= BLOCK and offset + length <= len(self)

    def take(self, offset: int, length: int) -> memoryview:
        """The place, in the memory and not empty, for bytes that come."""
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        self._written[first:end] = b"\1" * (end - first)
        return self.view[offset : offset + length]

    def clear(self, offset: int, length: int) -> None:
        """Zeros. A page that is cleared in parts still counts as written."""
        end = offset + length
        place = offset // PAGE
        while (place := self._written.find(1, place, -(-end // PAGE))) >= 0:
            begin, stop = max(place * PAGE, offset), min((place + 1) * PAGE, end)
            self.view[begin:stop] = bytes(stop - begin)
            if stop - begin == PAGE:
                self._written[place] = 0
            place += 1

    def used(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each run of pages that may differ from zero."""
        written, end = self._written, 0
        while (first := written.find(1, end)) >= 0:
            behind = written.find(0, first)
            end = len(written) if behind < 0 else behind
            yield first * PAGE, min(end * PAGE, len(self)) - first * PAGE


def _put_zeros(memory: StagedMemory, payload: memoryview) -> bool:
    if len(payload) != ZERO.size:
        return False
    offset, length = ZERO.unpack(payload)
    good = memory.has_block(offset, length)
    if good:
        memory.clear(offset, length)
    return good


def _put_bytes(memory: StagedMemory, payload: memoryview) -> bool:
    (offset,) = MEMORY.unpack_from(payload)
    data = payload[MEMORY.size :]
    good = memory.has_block(offset, len(data))
    if good:
        memory.take(offset, len(data))[:] = data
    return good


OF_MEMORY: Mapping[int, Callable[[StagedMemory, memoryview], bool]] = {
    int(Kind.ZERO): _put_zeros,
    int(Kind.MEMORY): _put_bytes,
}
"""By the kind of a record: do what its payload, of 8 bytes at least, says. False: it is not as it should
be."""
