# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log of one DMA region: which of its pages the device has written. Pure, no I/O.

The bitmap is packed little-endian: page n of the region is bit `n % 8` of byte `n // 8`. (The
specification's own formula says `addr % 64`, which no implementation follows.)
"""

MIN_PAGE_SIZE = 4096

# Byte tables for a change of the page size by a factor of two: `bytes.translate` does a whole bitmap at
# about a nanosecond a byte, without numpy.
_HALVE_LOW = bytes(sum((b >> 2 * i & 3 != 0) << i for i in range(4)) for b in range(256))
_HALVE_HIGH = bytes(b << 4 for b in _HALVE_LOW)
_DOUBLE_LOW = bytes(sum((b >> i & 1) * (3 << 2 * i) for i in range(4)) for b in range(256))
_DOUBLE_HIGH = bytes(_DOUBLE_LOW[b >> 4] for b in range(256))


def page_shift(page_size: int) -> int:
    """The binary logarithm of a page size. ValueError unless it is a power of two from 4 KiB up."""
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size} is not a power of two of at least {MIN_PAGE_SIZE}")
    return page_size.bit_length() - 1


def bitmap_size(pages: int) -> int:
    """Bytes that hold a bit for each page."""
    return (pages + 7) // 8


def extract(bits: bytes | bytearray, start: int, count: int) -> bytearray:
    """The `count` bits from bit `start` as a bitmap of their own; surplus bits of the last byte are 0."""
    end = start + count
    piece = bytearray(bits[start >> 3 : (end + 7) >> 3])
    if start & 7:
        shifted = int.from_bytes(piece, "little") >> (start & 7)
        piece = bytearray(shifted.to_bytes(len(piece), "little"))[: bitmap_size(count)]
    if count & 7 and piece:
        piece[-1] &= (1 << (count & 7)) - 1
    return piece


def coarsen(bits: bytes | bytearray, steps: int) -> bytearray:
    """The bitmap for pages `2 ** steps` times as large: a bit is set when any of its parts is."""
    piece = bytearray(bits)
    for _ in range(steps):
        piece += bytes(len(piece) & 1)
        low = int.from_bytes(piece[0::2].translate(_HALVE_LOW), "little")
        high = int.from_bytes(piece[1::2].translate(_HALVE_HIGH), "little")
        piece = bytearray((low | high).to_bytes(len(piece) // 2, "little"))
    return piece


def refine(bits: bytes | bytearray, steps: int) -> bytearray:
    """The bitmap for pages `2 ** steps` times as small: every part of a dirty page is dirty."""
    piece = bytearray(bits)
    for _ in range(steps):
        finer = bytearray(2 * len(piece))
        finer[0::2] = piece.translate(_DOUBLE_LOW)
        finer[1::2] = piece.translate(_DOUBLE_HIGH)
        piece = finer
    return piece


def fill(bits: bytearray, first: int, last: int, value: bool) -> None:
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
        self.size = size
        self.shift = page_shift(page_size)
        self.pages = (size + page_size - 1) >> self.shift
        self.bits = bytearray(bitmap_size(self.pages))

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

    def report(self, offset: int = 0, length: int | None = None, page_size: int | None = None) -> bytearray:
        """The bitmap of a range, whose bit n is the n-th page of `page_size` from `offset`.

        `offset` and `length` are multiples of 4 KiB; a part of a page at the end counts as a page.
        ValueError for a page size that is none, and for a range that is empty or not in the region.
        """
        length = self.size - offset if length is None else length
        wanted = self.shift if page_size is None else page_shift(page_size)
        self._check(offset, length)
        first = offset >> self.shift
        pages = ((offset + length - 1) >> self.shift) - first + 1
        bits = extract(self.bits, first, pages)
        # The finest pages in which both ends of the range, and both page sizes, can be told.
        marks = offset | length | 1 << self.shift | 1 << wanted
        fine = (marks & -marks).bit_length() - 1
        if fine < self.shift:
            bits = refine(bits, self.shift - fine)
            bits = extract(bits, (offset >> fine) - (first << self.shift - fine), length >> fine)
        return coarsen(bits, wanted - fine)[: bitmap_size(-(-length >> wanted))]

    def report_and_clear(
        self, offset: int = 0, length: int | None = None, page_size: int | None = None
    ) -> bytearray:
        """`report`, and forget what was reported.

        A tracked page that the range covers in part stays dirty: its other part has not been reported.
        The whole region in the tracked page size costs one allocation, whatever its size.
        """
        length = self.size - offset if length is None else length
        if (offset, length) == (0, self.size):
            bits, self.bits = self.bits, bytearray(len(self.bits))
            if page_size is None or page_size == self.page_size:
                return bits
            taken = DirtyLog(self.size, self.page_size)
            taken.bits = bits
            return taken.report(0, length, page_size)
        bits = self.report(offset, length, page_size)
        end = offset + length
        first = -(-offset >> self.shift)
        last = self.pages if end == self.size else end >> self.shift
        if first < last:
            fill(self.bits, first, last - 1, False)
        return bits

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(
                f"{length} bytes at {offset:#x} are not a range of a region of {self.size} bytes"
            )
        if (offset | length) & (MIN_PAGE_SIZE - 1):
            raise ValueError(f"{length} bytes at {offset:#x} are not whole pages of {MIN_PAGE_SIZE} bytes")
