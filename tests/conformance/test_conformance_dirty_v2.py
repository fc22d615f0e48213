# SPDX-License-Identifier: BSD-3-Clause
"""v2 specification: "VFIO_DEVICE_FEATURE_DMA_LOGGING_START / STOP" and "…_REPORT"; the kernel's rules."""

import errno
import struct
from collections.abc import AsyncIterator

import pytest

from conformance.dirty_log import DirtyLogTests, Log
from conformance.dirtying import (
    SIZE,
    START,
    TIB,
    TOP,
    WAYS,
    Guest,
    dirty_guest,
    dirty_pages,
    dirty_v1,
    dirty_v2,
    logging_report,
    logging_start,
    logging_stop,
    rounded,
    unmap_v1,
)
from conformance.driving import PAGE, start_copy
from conformance.engines import Serve, Served
from conformance.models import Blind
from conformance.moving import GET, LOGGING_REPORT, LOGGING_START, LOGGING_STOP, SET, feature
from conformance.raw import RawClient
from vfio_user.client.client import open_client
from vfio_user.client.errors import RemoteError
from vfio_user.protocol.values import DmaLoggingRange

U64 = (1 << 64) - 1


@pytest.fixture
async def guest(scratch: Served) -> AsyncIterator[Guest]:
    """One region of 16 pages at 0, logged in pages of 4 KiB."""
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, SIZE)
        assert (await logging_start(guest.raw)).ok
        yield guest


async def start(raw: RawClient) -> None:
    assert (await logging_start(raw)).ok


async def stop(raw: RawClient) -> None:
    assert (await logging_stop(raw)).ok == struct.pack("=II", 8, SET | LOGGING_STOP)


class TestLog(DirtyLogTests):
    log = Log(start, stop, logging_report, dirty_v2)


# START and STOP


RANGES = {
    "none": [],
    "one": [(0, SIZE)],
    "many": [(number * 2 * PAGE, PAGE) for number in range(256)],
    "unsorted": [(8 * PAGE, PAGE), (0, PAGE), (4 * PAGE, PAGE), (5 * PAGE, 3 * PAGE)],
    "the last page": [(TOP, PAGE)],
    "everything": [(0, U64 - PAGE + 1)],
}


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES.keys())
async def test_the_reply_to_start_is_its_request(raw: RawClient, ranges: list[tuple[int, int]]) -> None:
    """Specification: no ranges mean that all writes are logged; the kernel refuses that."""
    packed = b"".join(struct.pack("=QQ", *one) for one in ranges)
    data = struct.pack("=QII", PAGE, len(ranges), 0) + packed
    reply = (await logging_start(raw, PAGE, ranges)).ok
    assert reply == struct.pack("=II", 8 + len(data), SET | LOGGING_START) + data


async def test_writes_outside_of_the_ranges_are_logged_too(scratch: Served) -> None:
    """The ranges say what the device may leave out; ours leaves nothing out."""
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, SIZE)
        assert (await logging_start(guest.raw, PAGE, [(0, PAGE)])).ok
        for page in (0, 5):
            await guest.write(page * PAGE)
        assert await dirty_v2(guest.raw, 0, SIZE) == {0, 5}


@pytest.mark.parametrize("shift", [*range(13), 16, 21, 30, 31, 40, 63])
async def test_the_page_size_is_a_hint(raw: RawClient, shift: int) -> None:
    """Specification: "On output the device will return the page size it selected"."""
    reply = (await logging_start(raw, 1 << shift)).ok
    assert struct.unpack_from("=Q", reply, 8) == (1 << min(max(shift, 12), 30),)


@pytest.mark.parametrize("page_size", [0, 3, PAGE - 1, PAGE + 1, 3 * PAGE, U64])
async def test_a_page_size_that_is_no_power_of_two(raw: RawClient, page_size: int) -> None:
    assert (await logging_start(raw, page_size)).errno == errno.EINVAL
    assert (await logging_start(raw)).ok


BAD_RANGES = {
    "empty": ([(0, 0)], errno.EINVAL),
    "not aligned": ([(100, PAGE)], errno.EINVAL),
    "length not aligned": ([(0, 100)], errno.EINVAL),
    "twice": ([(0, PAGE), (0, PAGE)], errno.EINVAL),
    "overlap": ([(0, 2 * PAGE), (PAGE, 2 * PAGE)], errno.EINVAL),
    "overlap before": ([(PAGE, 2 * PAGE), (0, 2 * PAGE)], errno.EINVAL),
    "within": ([(0, 8 * PAGE), (16 * PAGE, PAGE), (PAGE, PAGE)], errno.EINVAL),
    "around": ([(PAGE, PAGE), (0, 8 * PAGE)], errno.EINVAL),
    "wraps": ([(TOP, 2 * PAGE)], errno.EOVERFLOW),
    "wraps far": ([(TOP, TOP)], errno.EOVERFLOW),
    "too many": ([(number * PAGE, PAGE) for number in range(257)], errno.E2BIG),
}


@pytest.mark.parametrize(("ranges", "error"), BAD_RANGES.values(), ids=BAD_RANGES.keys())
async def test_ranges_that_cannot_be(raw: RawClient, ranges: list[tuple[int, int]], error: int) -> None:
    assert (await logging_start(raw, PAGE, ranges)).errno == error
    assert (await logging_report(raw, 0, PAGE)).errno == errno.EINVAL, "it has not been started"
    assert (await logging_start(raw)).ok


async def test_ranges_are_whole_pages_of_the_page_size(raw: RawClient) -> None:
    for one in ((PAGE, 0x20000), (0x10000, PAGE)):
        assert (await logging_start(raw, 0x10000, [one])).errno == errno.EINVAL
    assert (await logging_start(raw, 0x10000, [(0x10000, 0x20000)])).ok


@pytest.mark.parametrize("count", [1, 2, 256, 257, 4096, 5000, 0xFFFFFFFF])
async def test_more_ranges_than_follow(raw: RawClient, count: int) -> None:
    answer = await logging_start(raw, PAGE, (), count)
    assert answer.errno == (errno.EINVAL if count <= 256 else errno.E2BIG)
    await raw.expect_alive()


@pytest.mark.parametrize("length", [0, 1, 8, 12, 15])
async def test_data_that_is_cut_is_refused(raw: RawClient, length: int) -> None:
    data = struct.pack("=QII", PAGE, 0, 0)[:length]
    assert (await feature(raw, SET | LOGGING_START, data)).errno == errno.EINVAL


async def test_a_second_start_is_refused(guest: Guest) -> None:
    """As the kernel's drivers do; the log stays as it is."""
    await guest.write(2 * PAGE)
    assert (await logging_start(guest.raw)).errno == errno.EINVAL
    assert await dirty_v2(guest.raw, 0, SIZE) == {2}


# REPORT: what is in it


async def test_the_pages_of_a_region_that_went_are_reported_once(guest: Guest) -> None:
    """DMA_UNMAP of v2 gives no bitmap: QEMU asks after it, and the kernel's devices log addresses."""
    await guest.write(2 * PAGE)
    await guest.unmap(0, SIZE)
    assert await dirty_v2(guest.raw, PAGE, PAGE) == set()
    assert await dirty_v2(guest.raw, 0, SIZE) == {2}
    assert await dirty_v2(guest.raw, 0, SIZE) == set()


async def test_another_region_in_place_of_one_that_went(guest: Guest) -> None:
    await guest.write(2 * PAGE)
    await guest.write(9 * PAGE)
    await guest.unmap(0, SIZE)
    await guest.map(0, 4 * PAGE)
    await guest.write(3 * PAGE)
    assert await dirty_v2(guest.raw, 0, SIZE) == {2, 3, 9}
    assert await dirty_v2(guest.raw, 0, SIZE) == set()


async def test_the_same_region_again(guest: Guest) -> None:
    """As under a virtual IOMMU, which maps and unmaps all the time."""
    ram = await guest.map(1 << 30, SIZE)
    for page in range(5):
        await guest.write((1 << 30) + page * PAGE)
        await guest.unmap(1 << 30, SIZE)
        assert (await guest.map_again(ram.ranges[0])).ok == b""
    assert await dirty_v2(guest.raw, 1 << 30, SIZE) == set(range(5))
    assert await dirty_v2(guest.raw, 1 << 30, SIZE) == set()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writable", [True, False])
async def test_a_device_that_cannot_tell_has_all_that_it_could_write(
    serve: Serve, way: str, writable: bool
) -> None:
    async with dirty_guest(serve(Blind).path) as guest:
        await guest.map(PAGE, 3 * PAGE, way, writable=writable)
        assert (await logging_start(guest.raw)).ok
        expected = {1, 2, 3} if writable and way != "message" else set()
        for _ in range(2):
            assert await dirty_v2(guest.raw, 0, SIZE) == expected
            assert await dirty_v2(guest.raw, 2 * PAGE, PAGE) == ({0} if expected else set())
        await guest.unmap(PAGE, 3 * PAGE)
        assert await dirty_v2(guest.raw, 0, SIZE) == expected
        assert await dirty_v2(guest.raw, 0, SIZE) == set()


async def test_a_read_only_region_is_never_dirty(scratch: Served) -> None:
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, PAGE, writable=False)
        assert (await logging_start(guest.raw)).ok
        await start_copy(guest.raw, 0, 0, 8)
        assert await dirty_v2(guest.raw, 0, SIZE) == set()


# REPORT: ranges and page sizes


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 9])
async def test_a_range_may_begin_and_end_inside_a_region(guest: Guest, offset: int) -> None:
    for page in range(SIZE // PAGE):
        await guest.write(page * PAGE)
    assert await dirty_v2(guest.raw, offset * PAGE, 4 * PAGE) == {0, 1, 2, 3}
    assert await dirty_v2(guest.raw, 0, SIZE) == set(range(16)) - set(range(offset, offset + 4))


@pytest.mark.parametrize("tracked", [12, 13, 16, 21])
@pytest.mark.parametrize("asked", [12, 13, 16, 21])
async def test_a_report_in_other_pages_than_those_that_are_tracked(
    scratch: Served, tracked: int, asked: int
) -> None:
    """The region begins at a page of every size; a page that is tracked is dirty in all of its parts."""
    async with dirty_guest(scratch.path) as guest:
        base, size = 1 << 22, 1 << 22
        await guest.map(base, size)
        assert (await logging_start(guest.raw, 1 << tracked)).ok
        written = (0x3123, 0x1FFFFF, 0x350000)
        for place in written:
            await guest.write(base + place, 1)
        small = {
            page
            for place in written
            for page in range((place >> tracked << tracked) >> 12, ((place >> tracked) + 1 << tracked) >> 12)
        }
        expected = {page << 12 >> asked for page in small}
        assert await dirty_v2(guest.raw, base, size, 1 << asked) == expected
        assert await dirty_v2(guest.raw, base, size, 1 << asked) == set()


async def test_a_region_that_begins_within_a_page_of_the_report(scratch: Served) -> None:
    """Pages of 64 KiB count from the range's start, and the region begins 4 KiB after such a page."""
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0x11000, 0x2F000)
        assert (await logging_start(guest.raw, 0x10000)).ok
        await guest.write(0x20000 - 1, 1)
        assert await dirty_v2(guest.raw, 0x10000, 0x30000, 0x10000) == {0}
        await guest.write(0x20000, 1)
        assert await dirty_v2(guest.raw, 0x10000, 0x30000, 0x10000) == {1}
        await guest.write(0x20000, 1)
        assert await dirty_v2(guest.raw, 0x8000, 0x38000, 0x10000) == {1}
        assert await dirty_v2(guest.raw, 0, 0x40000) == set()


async def test_a_range_need_not_be_whole_pages_of_the_report(guest: Guest) -> None:
    await guest.write(4 * PAGE)
    assert await dirty_v2(guest.raw, 0, 5 * PAGE, 1 << 21) == {0}
    assert await dirty_v2(guest.raw, 0, 5 * PAGE, 1 << 63) == set()


BAD_REPORTS = {
    "page size 0": ((0, SIZE, 0), errno.EINVAL),
    "page size 1": ((0, SIZE, 1), errno.EINVAL),
    "page size 2048": ((0, SIZE, 2048), errno.EINVAL),
    "no power of two": ((0, SIZE, 3 * PAGE), errno.EINVAL),
    "page size of all bits": ((0, SIZE, U64), errno.EINVAL),
    "empty": ((0, 0, PAGE), errno.EINVAL),
    "not aligned": ((100, PAGE, PAGE), errno.EINVAL),
    "length not aligned": ((0, 100, PAGE), errno.EINVAL),
    "wraps": ((TOP, 2 * PAGE, PAGE), errno.EOVERFLOW),
    "wraps by all": ((U64, U64, PAGE), errno.EOVERFLOW),
    "length of all bits": ((0, U64, PAGE), errno.EINVAL),
    "above 256 MiB of bitmap": ((0, (8 << 40) + PAGE, PAGE), errno.EINVAL),
}


@pytest.mark.parametrize(("asked", "error"), BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
async def test_a_report_that_cannot_be(guest: Guest, asked: tuple[int, int, int], error: int) -> None:
    await guest.write(0)
    assert (await logging_report(guest.raw, *asked)).errno == error
    assert await dirty_v2(guest.raw, 0, SIZE) == {0}, "nothing is lost"


async def test_the_longest_bitmap_is_what_was_negotiated(scratch: Served) -> None:
    async with dirty_guest(scratch.path, {"migration": {"max_bitmap_size": 16}}) as guest:
        await guest.map(0, SIZE)
        assert (await logging_start(guest.raw)).ok
        await guest.write(0)
        assert (await logging_report(guest.raw, 0, 129 * PAGE)).errno == errno.EINVAL
        assert await dirty_v2(guest.raw, 0, 128 * PAGE) == {0}


@pytest.mark.parametrize("argsz", [8, 31, 32, 39])
async def test_a_reply_that_does_not_fit_tells_its_size_and_clears_nothing(guest: Guest, argsz: int) -> None:
    """Specification: "Message sizes"."""
    await guest.write(0)
    reply = (await logging_report(guest.raw, 0, SIZE, argsz=argsz)).ok
    assert reply == struct.pack("=II", 40, GET | LOGGING_REPORT)
    assert await dirty_v2(guest.raw, 0, SIZE) == {0}


@pytest.mark.parametrize("length", [0, 1, 8, 16, 23])
async def test_a_question_that_is_cut_is_refused(guest: Guest, length: int) -> None:
    data = struct.pack("=QQQ", 0, SIZE, PAGE)[:length]
    assert (await feature(guest.raw, GET | LOGGING_REPORT, data)).errno == errno.EINVAL


async def test_report_without_start_is_refused(raw: RawClient) -> None:
    assert (await logging_report(raw, 0, PAGE)).errno == errno.EINVAL


async def test_the_bitmap_of_a_tebibyte_comes_in_one_reply(guest: Guest) -> None:
    await guest.map_sparse(TIB, TIB)
    written = {0, 12345678, (TIB // PAGE) - 1}
    for page in written:
        await guest.write(TIB + page * PAGE)
    reply = (await logging_report(guest.raw, TIB, TIB)).ok
    bitmap = reply[32:]
    assert len(bitmap) == rounded(TIB, PAGE) == 32 << 20
    assert all(bitmap[page // 8] == 1 << page % 8 for page in written)
    assert bitmap.count(0) == len(bitmap) - 3
    assert await dirty_v2(guest.raw, TIB, TIB, 1 << 30) == set()


# Beside other things


async def test_both_editions_have_one_log(guest: Guest) -> None:
    await guest.write(PAGE)
    assert (await dirty_pages(guest.raw, START)).ok == b"", "it is on already"
    assert await dirty_v1(guest.raw, 0, SIZE) == {1}
    assert await dirty_v2(guest.raw, 0, SIZE) == set()
    await guest.write(2 * PAGE)
    assert (await unmap_v1(guest.raw, 0, SIZE)).ok[40:] == struct.pack("=Q", 1 << 2)
    assert await dirty_v2(guest.raw, 0, SIZE) == set()
    assert (await logging_stop(guest.raw)).ok
    assert (await dirty_pages(guest.raw, START)).ok == b""
    assert (await logging_start(guest.raw)).errno == errno.EINVAL


async def test_what_is_tracked_in_large_pages_is_reported_in_small_ones_to_v1(scratch: Served) -> None:
    """All of them: which one it was is not known. Only pages below the negotiated size are refused."""
    async with dirty_guest(scratch.path, {"migration": {"pgsize": PAGE}}) as guest:
        await guest.map(0, 3 * SIZE)
        assert (await logging_start(guest.raw, SIZE)).ok
        await guest.write(SIZE + 5 * PAGE)
        assert await dirty_v1(guest.raw, SIZE, SIZE) == set(range(16))
        await guest.write(2 * SIZE + 5 * PAGE)
        assert (await unmap_v1(guest.raw, 0, 3 * SIZE)).ok[40:] == struct.pack("=Q", 0xFFFF << 32)
        assert await dirty_v2(guest.raw, 0, 3 * SIZE) == set()


async def test_our_client_has_a_method_for_each(scratch: Served) -> None:
    async with open_client(scratch.path) as client:
        assert await client.dma_logging_start(1 << 40, [DmaLoggingRange(0, 1 << 40)]) == 1 << 30
        await client.dma_logging_stop()
        assert await client.dma_logging_start() == PAGE
        bitmap = await client.dma_logging_report(0, 64 << 30)
        assert len(bitmap) == 2 << 20
        assert not any(bitmap)
        with pytest.raises(RemoteError):
            await client.dma_logging_report(0, PAGE, 0)
        await client.dma_logging_stop()
