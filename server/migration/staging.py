# SPDX-License-Identifier: BSD-3-Clause
"""Memory of a device on its way in: it takes room and work only where something was written."""

import mmap

from vfio_user.device_models.state_memory import PAGE


class StagedMemory:
    """Zero at first. What is zero stays so at no cost: a few bytes of a stream can speak of a megabyte of
    zeros, so each page that is cleared must have been paid for by bytes that were written into it before."""

    def __init__(self, size: int) -> None:
        # Anonymous memory is zero, and costs nothing where nothing is written.
        self.view = memoryview(mmap.mmap(-1, size))
        self._written = bytearray(-(-size // PAGE))
        """One byte for each page that may differ from zero."""

    def __len__(self) -> int:
        return len(self.view)

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
