# SPDX-License-Identifier: BSD-3-Clause
"""Device memory that is part of the state but too large for a section, and the log of what was written."""

from collections.abc import Iterable, Iterator
from typing import Protocol

PAGE = 4096
_PIECE = 1 << 20

Ranges = Iterable[tuple[int, int]]
"""Offset and length of each, in bytes."""


class StateMemory(Protocol):
    """Memory too large for a section: streamed while the device runs, and then what has changed since."""

    size: int
    """In bytes."""

    @property
    def view(self) -> memoryview:
        """All of it, for reading. Not to be kept: `adopt` may bring another."""

    def start_log(self) -> None:
        """Note from now on what is written. All that may differ from zero counts as written at first."""

    def stop_log(self) -> None:
        """Note nothing any more; harmless without a log."""

    @property
    def pending(self) -> int:
        """Bytes that `take` would give now, roughly: whole pages."""

    def take(self, limit: int) -> tuple[int, int] | None:
        """The next range that was written: offset and length of at most `limit` bytes, at least a page.

        It counts as sent from now on. The caller copies it before the device goes on. None: there is none.
        """

    def adopt(self, memory: memoryview, used: Ranges | None = None) -> memoryview:
        """Be what `memory` (writable, of the same size) is from now on; gives what it was before.

        `used`: where `memory` may differ from zero, but for what was used here before, which goes on counting
        as used: what has been sent of it is to be sent again. None: everywhere.

        Where nobody else maps the memory, it takes the place of the old one at no cost, and belongs to the
        device from now on.
        """


class WriteLog:
    """Which pages of a memory were written. One byte a page: runs of them are found by `bytearray.find`."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = bytearray(-(-size // PAGE))
        """Pages that may differ from zero."""
        self._written: bytearray | None = None
        self._next = 0

    def mark(self, offset: int, length: int) -> None:
        """`length` bytes at `offset`, in the memory, are written."""
        if length:
            first, end = offset // PAGE, (offset + length - 1) // PAGE + 1
            ones = b"\1" * (end - first)
            self._used[first:end] = ones
            if self._written is not None:
                self._written[first:end] = ones

    def mark_zeroed(self) -> None:
        """All of the memory is zero now."""
        if self._written is None:
            self._used = bytearray(len(self._used))
        else:  # what was sent before is to be sent again, as zeros
            self.mark_used()

    def mark_used(self) -> None:
        """Whatever may differ from zero, or did, has another content now."""
        if self._written is not None:
            self._written[:] = self._used

    def used(self) -> Iterator[tuple[int, int]]:
        """Offset and length of what may differ from zero, in pieces of at most 1 MiB."""
        place = 0
        while (run := self._run(self._used, place, _PIECE // PAGE)) is not None:
            yield self._range(*run)
            place = run[1]

    def start(self) -> None:
        """See `StateMemory.start_log`."""
        self._written = bytearray(self._used)
        self._next = 0

    def stop(self) -> None:
        """See `StateMemory.stop_log`."""
        self._written = None

    @property
    def pending(self) -> int:
        """Bytes in pages that were written."""
        return self._written.count(1) * PAGE if self._written is not None else 0

    def take(self, limit: int) -> tuple[int, int] | None:
        """See `StateMemory.take`. Goes round, so that a place which is written all the time starves none."""
        written = self._written
        if written is None:
            return None
        most = max(limit // PAGE, 1)
        run = self._run(written, self._next, most) or self._run(written, 0, most)
        if run is None:
            return None
        first, self._next = run
        written[first : self._next] = bytes(self._next - first)
        return self._range(*run)

    @staticmethod
    def _run(pages: bytearray, start: int, most: int) -> tuple[int, int] | None:
        """The first run of at most `most` marked pages from `start` on: the first, and the one behind."""
        first = pages.find(1, start)
        if first < 0:
            return None
        limit = min(first + most, len(pages))
        end = pages.find(0, first, limit)
        return first, limit if end < 0 else end

    def _range(self, first: int, end: int) -> tuple[int, int]:
        return first * PAGE, min(end * PAGE, self._size) - first * PAGE
