# SPDX-License-Identifier: BSD-3-Clause
"""How long a dirty bitmap is. Bit n, little-endian, is the n-th page from the start of the range.

(The specification's own formula says `addr % 64`, which no implementation follows.)
"""

from __future__ import annotations

from typing import Final

MIN_PAGE_SIZE: Final = 4096
"""No dirty log is finer than this; the kernel refuses a report in smaller pages too."""

ADDRESS_SPACE: Final = 1 << 64
_WORD = 64  # bits: the kernel and libvfio-user count bitmaps in whole u64


def is_page_size(page_size: int) -> bool:
    """Whether it is a power of two from 4 KiB up."""
    return page_size >= MIN_PAGE_SIZE and not page_size & (page_size - 1)


def pages_of(length: int, page_size: int) -> int:
    """Pages of a range of `length` bytes; a part of one at the end counts."""
    return -(-length // page_size)


def bitmap_bytes(pages: int) -> int:
    """Bytes of the bitmap of so many pages, a multiple of 8 (specification: "an array of u64s")."""
    return -(-pages // _WORD) * (_WORD // 8)


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the bitmap of a range of `length` bytes in pages of `page_size`."""
    return bitmap_bytes(pages_of(length, page_size))
