# SPDX-License-Identifier: BSD-3-Clause
"""Sets of pages of guest memory, compared with sets of numbers."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user.client.memory import PAGE, RamRange
from vfio_user.client.migration.pages import PageSet

RANGES = tuple(
    RamRange(address, pages * PAGE, memoryview(b""))
    for address, pages in ((0, 3), (0x10_0000, 37), (0x12_5000, 8), (1 << 32, 130))
)
PAGES = frozenset(part.address // PAGE + n for part in RANGES for n in range(part.size // PAGE))


def numbers(pages: PageSet) -> set[int]:
    found: set[int] = set()
    for part, offset, length in pages.runs():
        assert offset % PAGE == length % PAGE == 0
        assert 0 < length <= part.size - offset
        first = (part.address + offset) // PAGE
        run = set(range(first, first + length // PAGE))
        assert not run & found
        found |= run
    assert len(pages) == len(found)
    assert pages.size == len(found) * PAGE
    return found


def touched(address: int, length: int) -> set[int]:
    end = address + length
    return {page for page in PAGES if length and page * PAGE < end and address < (page + 1) * PAGE}


places = st.sampled_from(RANGES).flatmap(
    lambda part: st.tuples(
        st.integers(max(part.address - 2 * PAGE, 0), part.end + PAGE), st.integers(0, part.size + PAGE)
    )
)


@given(st.lists(places, max_size=5))
def test_marks_are_the_pages_that_are_touched(marks: list[tuple[int, int]]) -> None:
    pages = PageSet(RANGES)
    for address, length in marks:
        pages.mark(address, length)
    assert numbers(pages) == set().union(*(touched(*mark) for mark in marks))


@st.composite
def bitmaps(draw: st.DrawFn) -> tuple[int, int, int, bytes]:
    """Address, length, page size and bitmap of a part of a range; surplus bits may be set."""
    part = draw(st.sampled_from(RANGES))
    page_size = PAGE << draw(st.integers(0, 3))
    first = draw(st.integers(0, part.size // PAGE - 1))
    length = draw(st.integers(1, part.size // PAGE - first)) * PAGE
    words = -(-length // (page_size * 64))
    return (
        part.address + first * PAGE,
        length,
        page_size,
        draw(st.binary(min_size=words * 8, max_size=words * 8)),
    )


@given(bitmaps(), st.lists(places, max_size=2))
def test_bitmaps_are_added(reported: tuple[int, int, int, bytes], marks: list[tuple[int, int]]) -> None:
    address, length, page_size, bitmap = reported
    pages = PageSet(RANGES)
    expected: set[int] = set()
    for mark in marks:
        pages.mark(*mark)
        expected |= touched(*mark)
    pages.add_bitmap(address, length, page_size, bitmap)
    for bit in range(-(-length // page_size)):
        if bitmap[bit // 8] >> bit % 8 & 1:
            begin = bit * page_size
            expected |= touched(address + begin, min(page_size, length - begin))
    assert numbers(pages) == expected


@given(st.lists(places, max_size=3), st.lists(places, max_size=3))
def test_take_and_update(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    pages = PageSet(RANGES)
    for mark in first:
        pages.mark(*mark)
    before = numbers(pages)
    taken = pages.take()
    assert (numbers(taken), numbers(pages)) == (before, set())
    for mark in second:
        pages.mark(*mark)
    assert numbers(taken) == before
    pages.update(taken)
    assert numbers(pages) == before | set().union(*(touched(*mark) for mark in second))


@pytest.mark.parametrize("longest", [PAGE, 3 * PAGE, 64 * PAGE, 1 << 20])
def test_runs_are_as_long_as_they_may_be(longest: int) -> None:
    pages = PageSet(RANGES)
    pages.mark_all()

    def expected() -> Iterator[tuple[RamRange, int, int]]:
        for part in RANGES:
            for begin in range(0, part.size, longest):
                yield part, begin, min(longest, part.size - begin)

    assert list(pages.runs(longest)) == list(expected())
    assert numbers(pages) == PAGES
