# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log of one DMA region: which of its pages the device has written. Pure, no I/O.

The bitmap is packed little-endian: page n of the region is bit `n % 8` of byte `n // 8`, in whole u64
(protocol/bitmaps.py). A large one is anonymous memory, which costs nothing where it is not written.
"""

import contextlib
import mmap
from typing import Final, TypeAlias

from vfio_user.protocol.bitmaps import MIN_PAGE_SIZE, bitmap_bytes, is_page_size, pages_of

Bits: TypeAlias = bytearray | mmap.mmap
"""Both are indexed by byte, and sliced, at the same speed."""

LAZY_FROM: Final = 4 << 20
"""Bytes of a bitmap (of 128 GiB in pages of 4 KiB) from which on zeroing it costs more than page faults."""

_CHUNK: Final = 1 << 18
_CLEAN: Final = bytes(_CHUNK)

# Byte tables for a change of the page size by a factor of two: `bytes.translate` does a whole bitmap at
# about a nanosecond a byte, without numpy.
_HALVE_LOW = bytes(sum((b >> 2 * i & 3 != 0) << i for i in range(4)) for b in range(256))
_HALVE_HIGH = bytes(b << 4 for b in _HALVE_LOW)
_DOUBLE_LOW = bytes(sum((b >> i & 1) * (3 << 2 * i) for i in range(4)) for b in range(256))
_DOUBLE_HIGH = bytes(_DOUBLE_LOW[b >> 4] for b in range(256))


def page_shift(page_size: int) -> int:
    """The binary logarithm of a page size. ValueError unless it is a power of two from 4 KiB up."""
    if not is_page_size(page_size):
        raise ValueError(f"page size {page_size} is not a power of two of at least {MIN_PAGE_SIZE}")
    return page_size.bit_length() - 1


def zeroed(size: int) -> Bits:
    """A bitmap of `size` bytes without a bit set. MemoryError."""
    if size < LAZY_FROM:
        return bytearray(size)
    try:
        bits = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"a bitmap of {size} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        bits.madvise(mmap.MADV_HUGEPAGE)  # 16 faults instead of 8,192 when 32 MiB are sent: 1.6 ms, not 14
    return bits


def is_clean(bits: bytes | Bits) -> bool:
    """Whether no bit is set."""
    for start in range(0, len(bits), _CHUNK):
        piece = bits[start : start + _CHUNK]
        if piece != _CLEAN[: len(piece)]:
            return False
    return True


def extract(bits: bytes | Bits, start: int, count: int) -> bytearray:
    """The `count` bits from bit `start` as a bitmap of their own; surplus bits of the last byte are 0."""
    end = start + count
    piece = bytearray(bits[start >> 3 : (end + 7) >> 3])
    if start & 7:
        shifted = int.from_bytes(piece, "little") >> (start & 7)
        piece = bytearray(shifted.to_bytes(len(piece), "little"))[: (count + 7) // 8]
    if count & 7 and piece:
        piece[-1] &= (1 << (count & 7)) - 1
    return piece


def shift_up(bits: bytes | Bits, count: int) -> bytearray:
    """The bitmap with `count` clear bits before it."""
    piece = bytearray(count >> 3) + bits
    if count & 7:
        shifted = int.from_bytes(bits, "little") << (count & 7)
        piece[count >> 3 :] = shifted.to_bytes(len(bits) + 1, "little")
    return piece


def merge(bits: Bits, start: int, piece: bytes | Bits) -> None:
    """Set the bits of `piece` in `bits`, from bit `start` on; clear bytes may reach beyond the end."""
    if is_clean(piece):
        return
    if start & 7:
        piece = shift_up(piece, start & 7)
    low = start >> 3
    high = min(low + len(piece), len(bits))
    if high - low != len(piece):
        piece = piece[: high - low]
    there = bits[low:high]
    if there != bytes(high - low):  # another region, or log, has its pages in the same bytes
        both = int.from_bytes(there, "little") | int.from_bytes(piece, "little")
        piece = both.to_bytes(high - low, "little")
    bits[low:high] = piece


def coarsen(bits: bytes | Bits, steps: int) -> bytearray:
    """The bitmap for pages `2 ** steps` times as large: a bit is set when any of its parts is."""
    piece = bytearray(bits)
    for _ in range(steps):
        piece += bytes(len(piece) & 1)
        low = int.from_bytes(piece[0::2].translate(_HALVE_LOW), "little")
        high = int.from_bytes(piece[1::2].translate(_HALVE_HIGH), "little")
        piece = bytearray((low | high).to_bytes(len(piece) // 2, "little"))
    return piece


def refine(bits: bytes | Bits, steps: int) -> bytearray:
    """The bitmap for pages `2 ** steps` times as small: every part of a dirty page is dirty."""
    piece = bytearray(bits)
    for _ in range(steps):
        finer = bytearray(2 * len(piece))
        finer[0::2] = piece.translate(_DOUBLE_LOW)
        finer[1::2] = piece.translate(_DOUBLE_HIGH)
        piece = finer
    return piece


def fill(bits: Bits, first: int, last: int, value: bool) -> None:
    """Set or clear the bits from `first` to `last`, both included."""
    low, high = first >> 3, last >> 3
    head = 0xFF << (first & 7) & 0xFF
    tail = 0xFF >> (7 - (last & 7))
    if low == high:
        head = tail = head & tail
    for place, mask in ((low, head), (high, tail)):
        bits[place] = bits[place] | mask if value else bits[place] & ~mask
    if high - low > 1:
        bits[low + 1 : high] = (b"\xff" if value else b"\0") * (high - low - 1)


class DirtyLog:
    """The pages written since the last report. Offsets and lengths are bytes from the region's start."""

    __slots__ = ("bits", "pages", "shift", "size")

    def __init__(self, size: int, page_size: int = MIN_PAGE_SIZE) -> None:
        """MemoryError when there is no room for the bitmap."""
        self.size = size
        self.shift = page_shift(page_size)
        self.pages = pages_of(size, page_size)
        self.bits = zeroed(bitmap_bytes(self.pages))

    @property
    def page_size(self) -> int:
        return 1 << self.shift

    def mark(self, offset: int, length: int) -> None:
        """Note that the device has written `length` bytes at `offset`; the caller has checked the range."""
        first = offset >> self.shift
        last = (offset + length - 1) >> self.shift
        if first == last:
            if length:
                self.bits[first >> 3] |= 1 << (first & 7)
        elif length:
            fill(self.bits, first, last, True)

    def mark_all(self) -> None:
        """Note that every page may have been written."""
        fill(self.bits, 0, self.pages - 1, True)

    @property
    def clean(self) -> bool:
        """Nothing has been written since the last report."""
        return is_clean(self.bits)

    def take(self) -> Bits:
        """The bitmap of the whole region in the tracked page size; the log is clean then.

        It costs one allocation, whatever has been written.
        """
        bits, self.bits = self.bits, zeroed(len(self.bits))
        return bits

    def report(
        self, offset: int = 0, length: int | None = None, page_size: int | None = None, lead: int = 0
    ) -> bytearray:
        """The bitmap of a range in pages of `page_size`, the first of which begins `lead` bytes before it.

        All are multiples of 4 KiB; a part of a page at the end counts as a page. ValueError for a page size
        that is none, and for a range that is empty or not in the region.
        """
        length = self.size - offset if length is None else length
        wanted = self.shift if page_size is None else page_shift(page_size)
        self._check(offset, length)
        first = offset >> self.shift
        pages = ((offset + length - 1) >> self.shift) - first + 1
        bits = extract(self.bits, first, pages)
        count = pages_of(lead + length, 1 << wanted)
        if is_clean(bits):
            return bytearray((count + 7) // 8)
        # Up to the region's end, nothing can be told of a part of its last page.
        reach = (first + pages << self.shift) - offset if offset + length == self.size else length
        # The finest pages in which both ends of the range, and both page sizes, can be told.
        marks = offset | reach | lead | 1 << self.shift | 1 << wanted
        fine = (marks & -marks).bit_length() - 1
        if fine < self.shift:
            bits = refine(bits, self.shift - fine)
            bits = extract(bits, (offset >> fine) - (first << self.shift - fine), reach >> fine)
        if lead:
            bits = shift_up(bits, lead >> fine)
        return extract(coarsen(bits, wanted - fine), 0, count)

    def clear(self, offset: int, length: int) -> None:
        """Forget the pages of a range.

        A tracked page that the range covers in part stays dirty: its other part has not been reported.
        """
        end = offset + length
        first = -(-offset >> self.shift)
        last = self.pages if end == self.size else end >> self.shift
        if first < last:
            fill(self.bits, first, last - 1, False)

    def report_and_clear(
        self, offset: int = 0, length: int | None = None, page_size: int | None = None, lead: int = 0
    ) -> Bits:
        """`report`, and `clear` what was reported. There may be clear bytes behind the report."""
        length = self.size - offset if length is None else length
        if (offset, length, lead) != (0, self.size, 0):
            bits = self.report(offset, length, page_size, lead)
            if not is_clean(bits):  # memory that nobody has touched stays so
                self.clear(offset, length)
            return bits
        if page_size is None or page_size == self.page_size:
            return self.take()
        bits = self.report(0, length, page_size)
        self.bits = zeroed(len(self.bits))
        return bits

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(
                f"{length} bytes at {offset:#x} are not a range of a region of {self.size} bytes"
            )
        if (offset | length) & (MIN_PAGE_SIZE - 1):
            raise ValueError(f"{length} bytes at {offset:#x} are not whole pages of {MIN_PAGE_SIZE} bytes")
