# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log against a set of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.server.dirty import DirtyLog, coarsen, extract, fill, page_shift, refine

PAGE = 4096
MAX_PAGES = 80

SIZES = st.integers(1, MAX_PAGES).map(lambda pages: pages * PAGE)
PAGE_SIZES = st.integers(12, 20).map(lambda shift: 1 << shift)


def bits_of(bitmap: bytes | bytearray) -> set[int]:
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


def bitmap_of(pages: set[int], count: int) -> bytearray:
    return bytearray(sum(1 << n for n in pages).to_bytes((count + 7) // 8, "little"))


@st.composite
def logs(draw: st.DrawFn) -> tuple[DirtyLog, set[int]]:
    """A log with some writes in it, and the tracked pages that they touched."""
    log = DirtyLog(draw(SIZES), draw(PAGE_SIZES))
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


def expected_report(tracked: int, dirty: set[int], offset: int, length: int, page_size: int) -> set[int]:
    """4 KiB by 4 KiB: the page of the report in which each dirty one lies."""
    return {
        (small * PAGE - offset) // page_size
        for small in range(offset // PAGE, (offset + length) // PAGE)
        if small * PAGE // tracked in dirty
    }


def test_one_write_marks_the_pages_it_touches() -> None:
    log = DirtyLog(16 * PAGE)
    log.mark(PAGE - 1, 2)
    log.mark(9 * PAGE, 1)
    assert log.bits == bytearray([0b11, 0b10])


def test_nothing_written_marks_nothing() -> None:
    log = DirtyLog(4 * PAGE)
    log.mark(PAGE, 0)
    log.mark(0, 0)
    assert log.bits == bytearray(1)


def test_a_report_of_everything_swaps_the_bitmap() -> None:
    log = DirtyLog(16 * PAGE)
    log.mark(0, PAGE)
    before = log.bits
    assert log.report_and_clear() is before
    assert log.bits == bytearray(2)


def test_mark_all_has_no_surplus_bits() -> None:
    log = DirtyLog(11 * PAGE)
    log.mark_all()
    assert bits_of(log.bits) == set(range(11))


@given(logs())
def test_mark(case: tuple[DirtyLog, set[int]]) -> None:
    log, dirty = case
    assert bits_of(log.bits) == dirty


@given(st.data())
def test_report_of_any_range_in_any_page_size(data: st.DataObject) -> None:
    log, dirty = data.draw(logs())
    offset, length = data.draw(ranges(log.size))
    page_size = data.draw(PAGE_SIZES)
    report = log.report(offset, length, page_size)
    assert len(report) == (-(-length // page_size) + 7) // 8
    assert bits_of(report) == expected_report(log.page_size, dirty, offset, length, page_size)
    assert bits_of(log.bits) == dirty


@given(st.data())
def test_report_and_clear_forgets_what_it_reported_and_nothing_else(data: st.DataObject) -> None:
    log, dirty = data.draw(logs())
    offset, length = data.draw(ranges(log.size))
    page_size = data.draw(PAGE_SIZES)
    report = log.report_and_clear(offset, length, page_size)
    assert bits_of(report) == expected_report(log.page_size, dirty, offset, length, page_size)
    tracked = log.page_size
    whole = {
        page
        for page in dirty
        if page * tracked >= offset and min((page + 1) * tracked, log.size) <= offset + length
    }
    assert bits_of(log.bits) == dirty - whole


@given(st.sets(st.integers(0, 199)), st.integers(0, 199), st.integers(0, 200))
def test_extract(pages: set[int], start: int, count: int) -> None:
    count = min(count, 200 - start)
    piece = extract(bitmap_of(pages, 200), start, count)
    assert len(piece) == (count + 7) // 8
    assert bits_of(piece) == {page - start for page in pages if start <= page < start + count}


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
    ("offset", "length"),
    [(-PAGE, PAGE), (0, 0), (0, 17 * PAGE), (16 * PAGE, PAGE), (8 * PAGE, -PAGE), (100, PAGE), (0, 100)],
)
def test_ranges_that_are_none(offset: int, length: int) -> None:
    log = DirtyLog(16 * PAGE)
    log.mark_all()
    with pytest.raises(ValueError, match="bytes at"):
        log.report_and_clear(offset, length)
    assert bits_of(log.bits) == set(range(16))
