# SPDX-License-Identifier: BSD-3-Clause
"""Dirty tracking over many regions, against a model that looks at every page of 4 KiB by itself."""

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user.protocol.bitmaps import ADDRESS_SPACE, bitmap_size
from vfio_user.protocol.capabilities import Migration
from vfio_user.protocol.errors import VfioUserError
from vfio_user.server import dirty_tracking
from vfio_user.server.dirty import Bits
from vfio_user.server.dirty_tracking import MAX_PAGE_SIZE, DirtyTracking
from vfio_user.server.dma_region import DmaRegion
from vfio_user.server.dma_table import DmaTable
from vfio_user.transport.fds import OwnedFd

PAGE = 4096
PAGES = 48
KINDS = ("mapped", "file", "message", "read-only")


def memfd(size: int, *, sealed: bool = True) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK if sealed else 0)
    return fd


def map_region(table: DmaTable, address: int, size: int, kind: str = "mapped") -> DmaRegion:
    fd = None if kind == "message" else memfd(size, sealed=kind != "file")
    return table.map(address, size, fd, writable=kind != "read-only")


def bits_of(bitmap: Bits) -> set[int]:
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


@pytest.fixture
def table() -> Iterator[DmaTable]:
    before = len(os.listdir("/proc/self/fd"))
    table = DmaTable()
    yield table
    table.unmap_all()
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


@pytest.fixture
def tracking(table: DmaTable) -> DirtyTracking:
    return DirtyTracking(table)


def refused(tracking: DirtyTracking, address: int, size: int, page_size: int = PAGE) -> int:
    """The errno of a report, by `check` and by `report`."""
    numbers = []
    for ask in (tracking.check, tracking.report):
        with pytest.raises(VfioUserError) as caught:
            ask(address, size, page_size)
        numbers.append(caught.value.errno)
    assert numbers[0] == numbers[1]
    return numbers[0]


# The model: every log is the set of its tracked pages


@dataclass
class ModelLog:
    """Addresses are in pages of 4 KiB; `unit` is how many of them are one tracked page."""

    start: int
    count: int
    unit: int
    dirty: set[int] = field(default_factory=set)

    def covers(self, page: int) -> bool:
        return self.start <= page < self.start + self.count

    def is_dirty(self, page: int) -> bool:
        return self.covers(page) and (page - self.start) // self.unit in self.dirty

    def forget(self, first: int, count: int) -> None:
        """Only what the range covers wholly; beyond the log's end there is nothing to cover."""
        asked = set(range(first, first + count))
        for number in set(self.dirty):
            begin = self.start + number * self.unit
            if asked.issuperset(range(begin, min(begin + self.unit, self.start + self.count))):
                self.dirty.discard(number)


@dataclass
class Model:
    precise: bool
    keep: bool
    unit: int
    live: dict[int, ModelLog | None] = field(default_factory=dict)
    kept: list[ModelLog] = field(default_factory=list)

    def map(self, first: int, count: int, kind: str) -> None:
        if kind in ("message", "read-only"):
            self.live[first] = None
            return
        same = [log for log in self.kept if (log.start, log.count) == (first, count)]
        if same:
            self.kept.remove(same[0])
            self.live[first] = same[0]
            return
        unit = self.unit
        while first % unit:
            unit //= 2
        self.live[first] = ModelLog(first, count, unit)

    def unmap(self, first: int) -> None:
        log = self.live.pop(first)
        if log is not None and self.keep:
            self.touch(log)
            if log.dirty:
                self.kept.append(log)

    def touch(self, log: ModelLog) -> None:
        if not self.precise:
            log.dirty.update(range(-(-log.count // log.unit)))

    def write(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            for log in self.live.values():
                if log is not None and log.covers(page):
                    log.dirty.add((page - log.start) // log.unit)

    def report(self, first: int, count: int, unit: int) -> set[int]:
        asked = range(first, first + count)
        for log in self.live.values():
            if log is not None and any(map(log.covers, asked)):
                self.touch(log)
        logs = [log for log in (*self.live.values(), *self.kept) if log is not None]
        dirty = {(page - first) // unit for page in asked if any(log.is_dirty(page) for log in logs)}
        for log in logs:
            log.forget(first, count)
        self.kept = [log for log in self.kept if log.dirty]
        return dirty


STEPS = st.lists(st.sampled_from([0, 1, 2, 2, 2, 3, 3]), min_size=12, max_size=30)
UNITS = st.integers(0, 7).map(lambda shift: 1 << shift)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_against_a_model(data: st.DataObject) -> None:
    """Any regions that come and go, writes, and reports of any range in any page size."""
    table = DmaTable()
    try:
        drive(table, data)
    finally:
        table.unmap_all()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_report_in_steps(data: st.DataObject) -> None:
    """As large ranges go; here already beyond 4 pages, of which none is larger than that."""
    table = DmaTable()
    with mock.patch.object(dirty_tracking, "_STEP", 4 * PAGE):
        try:
            drive(table, data, tracked=st.sampled_from([1, 2, 4]))
        finally:
            table.unmap_all()


def test_no_step_ends_within_a_tracked_page(
    table: DmaTable, tracking: DirtyTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That page would be reported again and again."""
    monkeypatch.setattr(dirty_tracking, "_STEP", 4 * PAGE)
    region = map_region(table, 0, 16 * PAGE)
    tracking.start(4 * PAGE, keep_unmapped=False)
    region.store(5 * PAGE, b"x")
    assert bits_of(tracking.report(PAGE, 15 * PAGE, PAGE)) == {3, 4, 5, 6}
    assert bits_of(tracking.report(PAGE, 15 * PAGE, PAGE)) == set()


@given(st.data())
def test_many_stores_at_once_are_marked_as_so_many_by_themselves(data: st.DataObject) -> None:
    table, page_size = DmaTable(), PAGE * data.draw(st.sampled_from((1, 2, 8)))
    try:
        one_by_one, at_once = (map_region(table, address, PAGES * PAGE) for address in (0, 1 << 32))
        DirtyTracking(table).start(page_size, keep_unmapped=False)
        segments = []
        for _ in range(data.draw(st.integers(0, 6))):
            offset = data.draw(st.integers(0, PAGES * PAGE - 1))
            written = b"x" * data.draw(st.integers(1, min(3 * PAGE, PAGES * PAGE - offset)))
            one_by_one.store(offset, written)
            segments.append(((1 << 32) + offset, written))
        at_once.store_many(segments)
        assert at_once.dirty is not None
        assert one_by_one.dirty is not None
        assert at_once.dirty.bits == one_by_one.dirty.bits
        assert at_once.load(0, PAGES * PAGE) == one_by_one.load(0, PAGES * PAGE)
    finally:
        table.unmap_all()


def drive(table: DmaTable, data: st.DataObject, tracked: st.SearchStrategy[int] = UNITS) -> None:
    tracking = DirtyTracking(table)
    tracking.precise = data.draw(st.integers(0, 3), "precise") > 0
    model = Model(tracking.precise, data.draw(st.booleans(), "keep"), data.draw(tracked, "unit"))
    regions: dict[int, tuple[int, DmaRegion]] = {}

    def range_of(most: int) -> tuple[int, int]:
        first = data.draw(st.integers(0, PAGES - 1))
        return first, data.draw(st.integers(1, min(most, PAGES - first)))

    def add() -> None:
        first, count = range_of(20)
        if any(first < start + n and start < first + count for start, (n, _) in regions.items()):
            return
        kind = data.draw(st.sampled_from(KINDS))
        regions[first] = count, map_region(table, first * PAGE, count * PAGE, kind)
        model.map(first, count, kind)

    def remove() -> None:
        if regions:
            first = data.draw(st.sampled_from(sorted(regions)))
            table.unmap(first * PAGE, regions.pop(first)[0] * PAGE)
            model.unmap(first)

    def write() -> None:
        writable = [first for first, log in model.live.items() if log is not None]
        if writable:
            first = data.draw(st.sampled_from(sorted(writable)))
            count, region = regions[first]
            low = data.draw(st.integers(0, count * PAGE - 1))
            length = data.draw(st.integers(1, min(3 * PAGE, count * PAGE - low)))
            region.store(low, bytes(length))
            model.write(first + low // PAGE, (low + length - 1) // PAGE - low // PAGE + 1)

    def report() -> None:
        first, count = range_of(PAGES)
        whole = data.draw(st.booleans(), "whole")
        if regions and whole:
            first = data.draw(st.sampled_from(sorted(regions)))
            count = regions[first][0]
        unit = data.draw(UNITS)
        bitmap = tracking.report(first * PAGE, count * PAGE, unit * PAGE)
        assert len(bitmap) == bitmap_size(count * PAGE, unit * PAGE)
        assert bits_of(bitmap) == model.report(first, count, unit)

    for _ in range(data.draw(st.integers(1, 4))):
        add()
    tracking.start(model.unit * PAGE, keep_unmapped=model.keep)
    steps = (add, remove, write, report)
    for number in data.draw(STEPS, "steps"):
        steps[number]()
    report()
    tracking.report(0, PAGES * PAGE, PAGE)
    table.unmap_all()
    tracking.report(0, PAGES * PAGE, PAGE)
    assert tracking._memory == 0, "memory is given back with the last report"


# One by one


def test_logging_is_off_until_it_is_started_and_after_it_is_stopped(
    table: DmaTable, tracking: DirtyTracking
) -> None:
    region = map_region(table, 0, 4 * PAGE)
    region.store(0, b"x")
    assert not tracking.active
    assert refused(tracking, 0, PAGE) == errno.EINVAL
    tracking.start(PAGE, keep_unmapped=False)
    assert tracking.active
    assert bits_of(tracking.report(0, 4 * PAGE, PAGE)) == set()
    region.store(0, b"x")
    tracking.stop()
    assert region.dirty is None
    assert table.watcher is None
    assert refused(tracking, 0, PAGE) == errno.EINVAL
    tracking.stop()
    tracking.start(PAGE, keep_unmapped=False)
    assert bits_of(tracking.report(0, 4 * PAGE, PAGE)) == set(), "what was written before is forgotten"


def test_a_whole_region_in_its_page_size_is_one_swap(table: DmaTable, tracking: DirtyTracking) -> None:
    region = map_region(table, 0, 64 * PAGE)
    tracking.start(PAGE, keep_unmapped=False)
    region.store(5 * PAGE, b"x")
    assert region.dirty is not None
    bits = region.dirty.bits
    assert tracking.report(0, 64 * PAGE, PAGE) is bits


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (1, PAGE),
        (2048, PAGE),
        (PAGE, PAGE),
        (1 << 16, 1 << 16),
        (1 << 21, 1 << 21),
        (1 << 30, 1 << 30),
        (1 << 31, MAX_PAGE_SIZE),
        (1 << 63, MAX_PAGE_SIZE),
    ],
)
def test_the_page_size_that_is_tracked(tracking: DirtyTracking, asked: int, given: int) -> None:
    assert tracking.start(asked, keep_unmapped=True) == given == tracking.page_size


def test_a_region_that_is_not_aligned_is_tracked_in_pages_of_the_address_space(
    table: DmaTable, tracking: DirtyTracking
) -> None:
    """Of 64 KiB; the region begins 4 KiB after such a page."""
    region = map_region(table, 0x11000, 0x2F000)
    tracking.start(0x10000, keep_unmapped=False)
    region.store(0xF000 - 1, b"x")
    assert bits_of(tracking.report(0x10000, 0x30000, 0x10000)) == {0}
    region.store(0xF000, b"x")
    assert bits_of(tracking.report(0x10000, 0x30000, 0x10000)) == {1}
    assert bits_of(tracking.report(0x10000, 0x30000, 0x10000)) == set()


def test_the_last_page_of_the_address_space(table: DmaTable, tracking: DirtyTracking) -> None:
    region = map_region(table, ADDRESS_SPACE - 2 * PAGE, 2 * PAGE)
    tracking.start(PAGE, keep_unmapped=False)
    region.store(2 * PAGE - 1, b"x")
    assert bits_of(tracking.report(ADDRESS_SPACE - 8 * PAGE, 8 * PAGE, PAGE)) == {7}


@pytest.mark.parametrize(
    ("address", "size", "page_size"),
    [
        (0, 0, PAGE),
        (0, 100, PAGE),
        (100, PAGE, PAGE),
        (2048, 2048, PAGE),
        (ADDRESS_SPACE - PAGE, 2 * PAGE, PAGE),
        (0, ADDRESS_SPACE - PAGE, 1 << 30),
        (0, PAGE, 0),
        (0, PAGE, 1),
        (0, PAGE, 2048),
        (0, PAGE, 3 * PAGE),
        (0, PAGE, (1 << 64) - 1),
    ],
)
def test_reports_that_cannot_be(
    table: DmaTable, tracking: DirtyTracking, address: int, size: int, page_size: int
) -> None:
    region = map_region(table, 0, PAGE)
    tracking.start(PAGE, keep_unmapped=False)
    region.store(0, b"x")
    assert refused(tracking, address, size, page_size) == errno.EINVAL
    assert bits_of(tracking.report(0, PAGE, PAGE)) == {0}, "nothing is lost"


def test_the_longest_bitmap_is_negotiated(table: DmaTable, tracking: DirtyTracking) -> None:
    tracking.negotiated(Migration(pgsize=8192, max_bitmap_size=16))
    assert tracking.pgsize == 8192
    tracking.start(PAGE, keep_unmapped=False)
    assert tracking.check(0, 128 * PAGE, PAGE) == 16
    assert refused(tracking, 0, 129 * PAGE, PAGE) == errno.EINVAL
    assert tracking.check(0, 129 * PAGE, 2 * PAGE) == 16
    tracking.negotiated(None)
    assert tracking.check(0, 129 * PAGE, PAGE) == 24
    tracking.negotiated(Migration(pgsize=512))
    assert tracking.pgsize == PAGE, "the finest that there is"


def test_more_memory_than_can_be_logged(
    table: DmaTable, tracking: DirtyTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirty_tracking, "MAX_MEMORY", 16)
    first = map_region(table, 0, 64 * PAGE)
    second = map_region(table, 64 * PAGE, 65 * PAGE)
    with pytest.raises(VfioUserError) as caught:
        tracking.start(PAGE, keep_unmapped=True)
    assert caught.value.errno == errno.ENOMEM
    assert not tracking.active
    assert (first.dirty, second.dirty, table.watcher) == (None, None, None)
    tracking.start(2 * PAGE, keep_unmapped=True)
    with pytest.raises(VfioUserError) as caught:
        map_region(table, 1 << 30, PAGE)
    assert caught.value.errno == errno.ENOMEM
    assert len(table) == 2
    second.store(0, b"x")
    table.unmap(64 * PAGE, 65 * PAGE)
    with pytest.raises(VfioUserError):  # its log is kept until it has been reported
        map_region(table, 1 << 30, PAGE)
    tracking.report(64 * PAGE, 65 * PAGE, PAGE)
    map_region(table, 1 << 30, PAGE)


def test_a_bitmap_for_which_there_is_no_memory(
    table: DmaTable, tracking: DirtyTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(size: int, page_size: int) -> None:
        raise MemoryError

    map_region(table, 0, PAGE)
    monkeypatch.setattr(dirty_tracking, "DirtyLog", no_memory)
    with pytest.raises(VfioUserError) as caught:
        tracking.start(PAGE, keep_unmapped=True)
    assert caught.value.errno == errno.ENOMEM
    assert not tracking.active


def test_pages_of_too_many_regions_that_went_are_not_lost_in_silence(
    table: DmaTable, tracking: DirtyTracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirty_tracking, "MAX_KEPT", 2)
    tracking.start(PAGE, keep_unmapped=True)
    for page in range(3):
        assert tracking.check(0, PAGE, PAGE)
        map_region(table, page * PAGE, PAGE).store(0, b"x")
        table.unmap(page * PAGE, PAGE)
    assert refused(tracking, 0, PAGE) == errno.ENOMEM
    tracking.start(PAGE, keep_unmapped=True)
    assert bits_of(tracking.report(0, PAGE, PAGE)) == set()


def test_a_region_that_comes_again_has_the_pages_of_its_predecessor(
    table: DmaTable, tracking: DirtyTracking
) -> None:
    tracking.start(PAGE, keep_unmapped=True)
    for page in range(3):
        map_region(table, 0, 4 * PAGE).store(page * PAGE, b"x")
        table.unmap(0, 4 * PAGE)
    assert bits_of(tracking.report(0, 4 * PAGE, PAGE)) == {0, 1, 2}
    assert tracking._memory == 0


def test_a_clean_region_that_goes_is_not_kept(table: DmaTable, tracking: DirtyTracking) -> None:
    tracking.start(PAGE, keep_unmapped=True)
    map_region(table, 0, PAGE)
    table.unmap(0, PAGE)
    assert tracking._memory == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_cannot_tell(table: DmaTable, tracking: DirtyTracking, kind: str) -> None:
    """Each report has all that it could have written without the client's seeing it."""
    tracking.precise = False
    map_region(table, PAGE, 2 * PAGE, kind)
    tracking.start(PAGE, keep_unmapped=True)
    expected = {1, 2} if kind in ("mapped", "file") else set()
    for _ in range(2):
        assert bits_of(tracking.report(0, 8 * PAGE, PAGE)) == expected
        assert bits_of(tracking.report(2 * PAGE, PAGE, PAGE)) == ({0} if expected else set())
    table.unmap(PAGE, 2 * PAGE)
    assert bits_of(tracking.report(0, 8 * PAGE, PAGE)) == expected
    assert bits_of(tracking.report(0, 8 * PAGE, PAGE)) == set()
