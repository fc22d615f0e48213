# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log against a set of pages."""

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.protocol.bitmaps import bitmap_bytes, bitmap_size
from vfio_user.server import dirty
from vfio_user.server.dirty import (
    Bits,
    DirtyLog,
    coarsen,
    extract,
    fill,
    is_clean,
    merge,
    page_shift,
    refine,
    shift_up,
    zeroed,
)

PAGE = 4096
MAX_PAGES = 80

SIZES = st.integers(1, MAX_PAGES).map(lambda pages: pages * PAGE)
PAGE_SIZES = st.integers(12, 20).map(lambda shift: 1 << shift)


def bits_of(bitmap: bytes | Bits) -> set[int]:
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


def bitmap_of(pages: set[int], count: int) -> bytearray:
    return bytearray(sum(1 << n for n in pages).to_bytes((count + 7) // 8, "little"))


@pytest.fixture(params=[False, True], ids=["small", "lazy"])
def any_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with bitmaps of both kinds: those that are large are mapped."""
    if request.param:
        monkeypatch.setattr(dirty, "LAZY_FROM", 1)


@st.composite
def logs(draw: st.DrawFn) -> tuple[DirtyLog, set[int]]:
    """A log with some writes in it, and the tracked pages that they touched."""
    log = DirtyLog(draw(SIZES), draw(PAGE_SIZES))
    if draw(st.booleans()):
        mapped = mmap.mmap(-1, len(log.bits))
        log.bits = mapped
    dirty: set[int] = set()
    for _ in range(draw(st.integers(0, 8))):
        offset = draw(st.integers(0, log.size - 1))
        length = draw(st.integers(0, log.size - offset) | st.integers(0, min(64, log.size - offset)))
        log.mark(offset, length)
        dirty |= {
            byte // log.page_size
            for byte in {*range(offset, offset + length, PAGE), offset + length - 1}
            if length
        }
    return log, dirty


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    first = draw(st.integers(0, size // PAGE - 1))
    last = draw(st.integers(first, size // PAGE - 1))
    return first * PAGE, (last - first + 1) * PAGE


def expected_report(
    tracked: int, dirty: set[int], offset: int, length: int, page_size: int, lead: int = 0
) -> set[int]:
    """4 KiB by 4 KiB: the page of the report in which each dirty one lies."""
    return {
        (small * PAGE - offset + lead) // page_size
        for small in range(offset // PAGE, (offset + length) // PAGE)
        if small * PAGE // tracked in dirty
    }


def still_dirty(log: DirtyLog, dirty: set[int], offset: int, length: int) -> set[int]:
    """Without the pages that a report has covered wholly; the last one may be short."""
    return {
        page
        for page in dirty
        if page * log.page_size < offset or min((page + 1) * log.page_size, log.size) > offset + length
    }


@pytest.mark.usefixtures("any_bits")
class TestBitmaps:
    """What holds for bitmaps of both kinds."""

    def test_one_write_marks_the_pages_it_touches(self) -> None:
        log = DirtyLog(16 * PAGE)
        log.mark(PAGE - 1, 2)
        log.mark(9 * PAGE, 1)
        assert bytes(log.bits) == bytes([0b11, 0b10, 0, 0, 0, 0, 0, 0])

    def test_nothing_written_marks_nothing(self) -> None:
        log = DirtyLog(4 * PAGE)
        log.mark(PAGE, 0)
        log.mark(0, 0)
        assert log.clean

    def test_all_of_it_swaps_the_bitmap(self) -> None:
        log = DirtyLog(16 * PAGE)
        log.mark(0, PAGE)
        before = log.bits
        assert not log.clean
        assert log.report_and_clear() is before
        assert bytes(log.bits) == bytes(8)
        assert log.clean

    def test_mark_all_has_no_surplus_bits(self) -> None:
        log = DirtyLog(11 * PAGE)
        log.mark_all()
        assert bits_of(log.bits) == set(range(11))

    def test_a_bitmap_is_clean_until_a_bit_is_set(self) -> None:
        for size in (0, 8, 1 << 18, (1 << 18) + 8):
            bits = zeroed(size)
            assert is_clean(bits)
            for place in {0, size // 2, size - 1} if size else set():
                bits[place] = 0x80
                assert not is_clean(bits)
                bits[place] = 0

    def test_ranges_that_are_none(self) -> None:
        log = DirtyLog(16 * PAGE)
        log.mark_all()
        for offset, length in (
            (-PAGE, PAGE),
            (0, 0),
            (0, 17 * PAGE),
            (16 * PAGE, PAGE),
            (8 * PAGE, -PAGE),
            (100, PAGE),
            (0, 100),
        ):
            with pytest.raises(ValueError, match="bytes at"):
                log.report_and_clear(offset, length)
        assert bits_of(log.bits) == set(range(16))


def test_a_large_bitmap_takes_memory_only_where_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    log = DirtyLog(8 << 40)  # a bitmap of 256 MiB
    log.mark(5 << 40, 1)
    assert resident() - before < 32 << 20
    taken = log.take()
    assert taken[(5 << 40) >> 15] == 1
    assert resident() - before < 32 << 20


def test_a_bitmap_that_no_memory_holds() -> None:
    with pytest.raises(MemoryError):
        DirtyLog(1 << 63)


@given(logs())
def test_mark(case: tuple[DirtyLog, set[int]]) -> None:
    log, dirty = case
    assert bits_of(log.bits) == dirty
    assert log.clean == (not dirty)


@given(st.data())
def test_report_of_any_range_in_any_page_size(data: st.DataObject) -> None:
    log, dirty = data.draw(logs())
    offset, length = data.draw(ranges(log.size))
    page_size = data.draw(PAGE_SIZES)
    lead = PAGE * data.draw(st.integers(0, page_size // PAGE - 1))
    report = log.report(offset, length, page_size, lead)
    assert len(report) == (-(-(lead + length) // page_size) + 7) // 8
    assert bits_of(report) == expected_report(log.page_size, dirty, offset, length, page_size, lead)
    assert bits_of(log.bits) == dirty


@given(st.data())
def test_report_and_clear_forgets_what_it_reported_and_nothing_else(data: st.DataObject) -> None:
    log, dirty = data.draw(logs())
    whole = data.draw(st.booleans())
    offset, length = (0, log.size) if whole else data.draw(ranges(log.size))
    page_size = data.draw(PAGE_SIZES)
    report = log.report_and_clear(offset, length, page_size)
    assert bits_of(report) == expected_report(log.page_size, dirty, offset, length, page_size)
    assert bits_of(log.bits) == still_dirty(log, dirty, offset, length)


def test_the_last_page_of_a_region_may_be_short() -> None:
    log = DirtyLog(7 * PAGE, 4 * PAGE)
    log.mark_all()
    assert bits_of(log.report_and_clear(4 * PAGE, 2 * PAGE)) == {0}
    assert bits_of(log.bits) == {0, 1}, "a part of it"
    assert bits_of(log.report_and_clear(4 * PAGE, 3 * PAGE)) == {0}
    assert bits_of(log.bits) == {0}, "all of it"


@given(st.sets(st.integers(0, 199)), st.integers(0, 199), st.integers(0, 200))
def test_extract(pages: set[int], start: int, count: int) -> None:
    count = min(count, 200 - start)
    piece = extract(bitmap_of(pages, 200), start, count)
    assert len(piece) == (count + 7) // 8
    assert bits_of(piece) == {page - start for page in pages if start <= page < start + count}


@given(st.sets(st.integers(0, 99)), st.integers(0, 40))
def test_shift_up(pages: set[int], count: int) -> None:
    assert bits_of(shift_up(bitmap_of(pages, 100), count)) == {page + count for page in pages}


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 99)), st.integers(0, 199), st.booleans())
def test_merge(pages: set[int], piece: set[int], start: int, mapped: bool) -> None:
    """A piece that fits; clear bytes behind it may reach beyond the end."""
    piece = {page for page in piece if page + start < 200}
    bits: Bits = bitmap_of(pages, 200)
    if mapped:
        bits = mmap.mmap(-1, 25)
        bits[:] = bytes(bitmap_of(pages, 200))
    merge(bits, start, bitmap_of(piece, 100) + bytes(8))
    assert len(bits) == 25
    assert bits_of(bits) == pages | {page + start for page in piece}


@given(st.sets(st.integers(0, 199)), st.integers(0, 6))
def test_coarsen(pages: set[int], steps: int) -> None:
    assert bits_of(coarsen(bitmap_of(pages, 200), steps)) == {page >> steps for page in pages}


@given(st.sets(st.integers(0, 99)), st.integers(0, 6))
def test_refine(pages: set[int], steps: int) -> None:
    finer = {(page << steps) + part for page in pages for part in range(1 << steps)}
    assert bits_of(refine(bitmap_of(pages, 100), steps)) == finer


@given(st.sets(st.integers(0, 99)), st.integers(0, 99), st.integers(0, 99), st.booleans())
def test_fill(pages: set[int], first: int, last: int, value: bool) -> None:
    first, last = min(first, last), max(first, last)
    bits = bitmap_of(pages, 100)
    fill(bits, first, last, value)
    changed = set(range(first, last + 1))
    assert bits_of(bits) == (pages | changed if value else pages - changed)


@pytest.mark.parametrize("page_size", [0, -4096, 1, 2048, 4097, 6144, 12288])
def test_page_sizes_that_are_none(page_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        page_shift(page_size)
    with pytest.raises(ValueError, match="power of two"):
        DirtyLog(16 * PAGE).report(page_size=page_size)


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [
        (PAGE, PAGE, 8),
        (64 * PAGE, PAGE, 8),
        (65 * PAGE, PAGE, 16),
        (PAGE, 1 << 21, 8),
        (1 << 40, PAGE, 32 << 20),
    ],
)
def test_the_length_of_a_bitmap_is_whole_u64(length: int, page_size: int, size: int) -> None:
    assert bitmap_size(length, page_size) == size
    assert bitmap_bytes(-(-length // page_size)) == size
