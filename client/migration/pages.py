# SPDX-License-Identifier: BSD-3-Clause
"""Which pages of guest memory have still to be sent.

A `PageSet` is a bitmap for each range of guest memory, of pages of 4 KiB: page n of the range is bit
`n % 8` of byte `n // 8`. It takes what servers report (pages of any size from 4 KiB up) and what the VMM
itself has seen written, and gives runs of pages to copy.
"""

import re
from collections.abc import Iterator, Sequence

from vfio_user.client.memory import PAGE, RamRange
from vfio_user.protocol.values import Payload

_SHIFT = 12
_STRETCH = re.compile(rb"\xff+|[^\0\xff]", re.DOTALL)


class PageSet:
    """Pages of the given ranges; empty at first."""

    def __init__(self, ranges: Sequence[RamRange]) -> None:
        self.ranges = tuple(ranges)
        self._bits = [bytearray(-(-part.size >> _SHIFT) + 7 >> 3) for part in self.ranges]

    def mark(self, address: int, length: int) -> None:
        """Add the pages of `length` bytes at guest `address`, as far as they are memory."""
        end = address + length
        for part, bits in zip(self.ranges, self._bits, strict=True):
            low, high = max(address, part.address), min(end, part.end)
            if low < high:
                _set(bits, low - part.address >> _SHIFT, (high - 1 - part.address) >> _SHIFT)

    def mark_all(self) -> None:
        for part in self.ranges:
            self.mark(part.address, part.size)

    def add_bitmap(self, address: int, length: int, page_size: int, bitmap: Payload) -> None:
        """Add what a server reports of `length` bytes from `address`: bit n is the n-th page of `page_size`
        (bytes) from there, little-endian. The bytes are within one range."""
        index = next(i for i, part in enumerate(self.ranges) if part.address <= address < part.end)
        first = address - self.ranges[index].address >> _SHIFT
        if page_size == PAGE and not first & 7:
            self._merge(index, first >> 3, bitmap, length)
            return
        for begin, end in _runs(bitmap):
            low = address + begin * page_size
            self.mark(low, min((end - begin) * page_size, address + length - low))

    def _merge(self, index: int, start: int, bitmap: Payload, length: int) -> None:
        """Bits of pages past `length` are no pages of the range, and are dropped."""
        pages = -(-length // PAGE)
        bits = self._bits[index]
        fresh = int.from_bytes(bitmap, "little") & (1 << pages) - 1
        stop = start + (pages + 7 >> 3)
        both = fresh | int.from_bytes(bits[start:stop], "little")
        bits[start:stop] = both.to_bytes(stop - start, "little")

    def update(self, other: "PageSet") -> None:
        """Add the pages of a set of the same ranges."""
        for index, part in enumerate(self.ranges):
            self._merge(index, 0, other._bits[index], part.size)

    def take(self) -> "PageSet":
        """All pages as a set of their own; this one is empty then."""
        taken = PageSet(self.ranges)
        taken._bits, self._bits = self._bits, taken._bits
        return taken

    def __len__(self) -> int:
        return sum(int.from_bytes(bits, "little").bit_count() for bits in self._bits)

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self) * PAGE

    def runs(self, longest: int = 1 << 20) -> Iterator[tuple[RamRange, int, int]]:
        """Adjoining pages, at most `longest` bytes at once: range, offset in it and length in bytes."""
        for part, bits in zip(self.ranges, self._bits, strict=True):
            for first, stop in _runs(bits):
                for begin in range(first * PAGE, min(stop * PAGE, part.size), longest):
                    yield part, begin, min(longest, stop * PAGE - begin)


def _set(bits: bytearray, first: int, last: int) -> None:
    """Set the bits from `first` to `last`, both included."""
    low, high = first >> 3, last >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
    if low == high:
        bits[low] |= head & tail
        return
    bits[low] |= head
    bits[high] |= tail
    bits[low + 1 : high] = b"\xff" * (high - low - 1)


def _runs(bits: Payload) -> Iterator[tuple[int, int]]:
    """First bit and the one after the last of each run of set bits."""
    begin = end = 0
    for low, high in _stretches(bits):
        if low != end:
            if begin != end:
                yield begin, end
            begin = low
        end = high
    if begin != end:
        yield begin, end


def _stretches(bits: Payload) -> Iterator[tuple[int, int]]:
    """Runs as they are found, perhaps cut where a byte ends."""
    for found in _STRETCH.finditer(bits):
        place, value = found.start() * 8, bits[found.start()]
        if value == 0xFF:
            yield place, found.end() * 8
            continue
        for bit in range(8):
            if value >> bit & 1:
                yield place + bit, place + bit + 1
