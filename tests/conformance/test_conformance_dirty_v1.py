# SPDX-License-Identifier: BSD-3-Clause
"""v1 specification: "VFIO_USER_DIRTY_PAGES", and "VFIO_USER_DMA_UNMAP" with its bitmap."""

import errno
import json
import struct
from collections.abc import AsyncIterator

import pytest

from conformance import wire
from conformance.dirty_log import DirtyLogTests, Log
from conformance.dirtying import (
    GET_BITMAP,
    SIZE,
    SOURCE,
    START,
    STOP,
    TIB,
    TOP,
    WAYS,
    Guest,
    dirty_guest,
    dirty_pages,
    dirty_v1,
    get_bitmap,
    get_bitmap_body,
    pages,
    unmap_v1,
)
from conformance.driving import PAGE, start_copy
from conformance.engines import Serve, Served
from conformance.models import Blind
from conformance.raw import Answer, RawClient, connect
from vfio_user.client.client import open_client
from vfio_user.client.memory import GuestRam
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.values import Bitmap, BitmapRange


@pytest.fixture
async def guest(scratch: Served) -> AsyncIterator[Guest]:
    """One region of 16 pages at 0, logged."""
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, SIZE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        yield guest


async def start(raw: RawClient) -> None:
    assert (await dirty_pages(raw, START)).ok == b""


async def stop(raw: RawClient) -> None:
    assert (await dirty_pages(raw, STOP)).ok == b""


class TestLog(DirtyLogTests):
    log = Log(start, stop, get_bitmap, dirty_v1)


# START and STOP


async def test_the_reply_is_as_specified(guest: Guest) -> None:
    """With the sizes that real code has, 32 and 16 bytes; the text says 40 and 24."""
    await guest.write(9 * PAGE)
    reply = (await get_bitmap(guest.raw, 0, SIZE)).ok
    assert reply == struct.pack("=IIQQQQQ", 48, GET_BITMAP, 0, SIZE, PAGE, 8, 1 << 9)


async def test_nothing_is_logged_before_the_start(scratch: Served) -> None:
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, SIZE)
        await guest.write(0)
        assert (await get_bitmap(guest.raw, 0, SIZE)).errno == errno.EINVAL
        assert (await dirty_pages(guest.raw, START)).ok == b""
        await guest.write(PAGE)
        assert await dirty_v1(guest.raw, 0, SIZE) == {1}


async def test_a_second_start_is_harmless(guest: Guest) -> None:
    await guest.write(2 * PAGE)
    assert (await dirty_pages(guest.raw, START)).ok == b""
    assert await dirty_v1(guest.raw, 0, SIZE) == {2}


@pytest.mark.parametrize("flags", [0, START | STOP, START | GET_BITMAP, 7, 8, 1 << 31])
async def test_the_flags_exclude_each_other(guest: Guest, flags: int) -> None:
    body = get_bitmap_body(0, SIZE)[8:] if flags & GET_BITMAP else b""
    answer = await guest.raw.call(wire.DIRTY_PAGES, struct.pack("=II", 48, flags) + body)
    assert answer.errno == errno.EINVAL
    await guest.raw.expect_alive()


@pytest.mark.parametrize("flags", [START, STOP])
@pytest.mark.parametrize("argsz", [0, 7])
async def test_argsz_below_the_structure_is_refused(raw: RawClient, flags: int, argsz: int) -> None:
    assert (await dirty_pages(raw, flags, argsz)).errno == errno.EINVAL


async def test_a_body_that_is_cut_is_refused(guest: Guest) -> None:
    whole = get_bitmap_body(0, SIZE)
    for length in (0, 4, 7, 8, 20, 39):
        assert (await guest.raw.call(wire.DIRTY_PAGES, whole[:length])).errno == errno.EINVAL
    await guest.raw.expect_alive()


# Which writes


async def test_a_write_across_regions_is_logged_where_it_went(scratch: Served) -> None:
    async with dirty_guest(scratch.path) as guest:
        await guest.map(0, 2 * PAGE)
        await guest.map(2 * PAGE, 2 * PAGE, "file")
        await guest.map(4 * PAGE, 2 * PAGE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        await guest.write(2 * PAGE - 1, 2 * PAGE + 2)
        assert await dirty_v1(guest.raw, 0, 6 * PAGE) == {1, 2, 3, 4}


async def test_reading_makes_nothing_dirty(guest: Guest) -> None:
    await start_copy(guest.raw, 0, SOURCE, 8)  # the source cannot be written
    assert await dirty_v1(guest.raw, 0, SIZE) == set()
    assert await dirty_v1(guest.raw, SOURCE, 64 * PAGE) == set()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writable", [True, False])
async def test_a_device_that_cannot_tell_has_all_that_it_could_write(
    serve: Serve, way: str, writable: bool
) -> None:
    """As the kernel does for a device that pins everything: in each report."""
    async with dirty_guest(serve(Blind).path) as guest:
        await guest.map(PAGE, 3 * PAGE, way, writable=writable)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        expected = {1, 2, 3} if writable and way != "message" else set()
        for _ in range(2):
            assert await dirty_v1(guest.raw, 0, SIZE) == expected
            assert await dirty_v1(guest.raw, PAGE, 3 * PAGE) == {page - 1 for page in expected}


# Ranges


async def test_a_range_may_begin_and_end_inside_a_region(guest: Guest) -> None:
    for page in (3, 4, 7, 8):
        await guest.write(page * PAGE)
    assert await dirty_v1(guest.raw, 4 * PAGE, 4 * PAGE) == {0, 3}
    assert await dirty_v1(guest.raw, 0, SIZE) == {3, 8}, "the others have been reported"


@pytest.mark.parametrize(
    ("address", "size"),
    [(0, 0), (100, PAGE), (0, 100), (2048, 2048), (TOP, 2 * PAGE), (PAGE, (1 << 64) - PAGE), (TOP + 1, PAGE)],
)
async def test_a_range_that_cannot_be_is_refused(guest: Guest, address: int, size: int) -> None:
    await guest.write(0)
    assert (await get_bitmap(guest.raw, address, size)).errno == errno.EINVAL
    assert await dirty_v1(guest.raw, 0, SIZE) == {0}


# Page sizes and bitmaps


@pytest.mark.parametrize("shift", range(12, 22))
async def test_a_report_in_coarser_pages(guest: Guest, shift: int) -> None:
    for page in (0, 5, 6, 15):
        await guest.write(page * PAGE)
    assert await dirty_v1(guest.raw, 0, SIZE, 1 << shift) == {page * PAGE >> shift for page in (0, 5, 6, 15)}
    assert await dirty_v1(guest.raw, 0, SIZE) == set()


@pytest.mark.parametrize("pgsize", [0, 1, 512, 2048, 4095, 4097, 3 * PAGE, (1 << 64) - 1])
async def test_a_page_size_that_is_not_supported(guest: Guest, pgsize: int) -> None:
    await guest.write(0)
    assert (await get_bitmap(guest.raw, 0, SIZE, pgsize, length=8)).errno == errno.EINVAL
    assert (await unmap_v1(guest.raw, 0, SIZE, pgsize, length=8)).errno == errno.EINVAL
    assert await dirty_v1(guest.raw, 0, SIZE) == {0}


@pytest.mark.parametrize("length", [0, 1, 9, 16, 4096, 1 << 32, (1 << 64) - 1])
async def test_a_bitmap_that_does_not_fit_the_range_is_refused(guest: Guest, length: int) -> None:
    """Two bytes are needed, and the eight of a u64 are what clients give."""
    await guest.write(0)
    answer = await get_bitmap(guest.raw, 0, SIZE, length=length, argsz=0xFFFFFFFF)
    assert answer.errno == errno.EINVAL
    answer = await unmap_v1(guest.raw, 0, SIZE, length=length, argsz=0xFFFFFFFF)
    assert answer.errno == errno.EINVAL
    assert await dirty_v1(guest.raw, 0, SIZE) == {0}


@pytest.mark.parametrize("length", [2, 3, 7])
async def test_a_bitmap_may_have_just_the_bytes_of_its_bits(guest: Guest, length: int) -> None:
    await guest.write(9 * PAGE)
    reply = (await get_bitmap(guest.raw, 0, SIZE, length=length)).ok
    assert reply[40:] == b"\0\2".ljust(length, b"\0")


@pytest.mark.parametrize("argsz", [8, 39, 40, 47])
async def test_a_reply_that_does_not_fit_tells_its_size_and_clears_nothing(guest: Guest, argsz: int) -> None:
    """Specification: "Message sizes"."""
    await guest.write(0)
    assert (await get_bitmap(guest.raw, 0, SIZE, argsz=argsz)).ok == struct.pack("=II", 48, GET_BITMAP)
    for below in (0, 7):
        assert (await get_bitmap(guest.raw, 0, SIZE, argsz=below)).errno == errno.EINVAL
    assert await dirty_v1(guest.raw, 0, SIZE) == {0}


@pytest.mark.parametrize("pgsize", [1024, 4096, 65536, 1 << 40])
async def test_the_smaller_page_size_is_agreed_on(scratch: Served, pgsize: int) -> None:
    """Specification: the capability `migration`. Smaller pages than ours are in no bitmap all the same."""
    async with connect(scratch.path, negotiated=False) as raw:
        assert said_of_migration(await raw.negotiate({"migration": {"pgsize": pgsize}})) == {"pgsize": 4096}
        guest = Guest(raw)
        await guest.map_sparse(0, SIZE)
        await start(raw)
        for asked in (512, 1024, 2048):
            assert (await get_bitmap(raw, 0, SIZE, asked)).errno == errno.EINVAL
        for asked in (4096, 65536):
            assert await dirty_v1(raw, 0, SIZE, asked) == set()


def said_of_migration(answer: Answer) -> object:
    return json.loads(answer.ok[4:-1])["capabilities"]["migration"]


COARSE = 65536


@pytest.mark.parametrize(
    ("theirs", "agreed"), [(1024, 4096), (4096, 4096), (8192, 8192), (COARSE, COARSE), (1 << 21, COARSE)]
)
async def test_pages_are_as_large_as_was_agreed_on(serve: Serve, theirs: int, agreed: int) -> None:
    """A server with pages of 64 KiB, at most: what is finer than the agreed ones is refused, and nothing is
    reported, cleared or unmapped."""
    served = serve(Scratch, pgsize=COARSE)
    async with dirty_guest(served.path, {"migration": {"pgsize": theirs}}) as guest:
        await guest.map(0, 4 * COARSE)
        await start(guest.raw)
        await guest.write(COARSE + PAGE)
        for finer in (size for size in (4096, 8192, 32768) if size < agreed):
            assert (await get_bitmap(guest.raw, 0, 4 * COARSE, finer)).errno == errno.EINVAL
            assert (await unmap_v1(guest.raw, 0, 4 * COARSE, finer)).errno == errno.EINVAL
        assert await dirty_v1(guest.raw, 0, 4 * COARSE, agreed) == {(COARSE + PAGE) // agreed}
        await guest.write(3 * COARSE)
        answer = await unmap_v1(guest.raw, 0, 4 * COARSE, COARSE)
        assert pages(answer.ok[40:]) == {3}


async def test_max_bitmap_size_is_negotiated_and_enforced(scratch: Served) -> None:
    migration = {"pgsize": 65536, "max_bitmap_size": 16}
    async with dirty_guest(scratch.path, {"migration": migration}) as guest:
        await guest.map(0, 200 * PAGE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        await guest.write(100 * PAGE)
        assert await dirty_v1(guest.raw, 0, 100 * PAGE) == set()
        assert (await get_bitmap(guest.raw, 0, 200 * PAGE)).errno == errno.EINVAL
        assert (await unmap_v1(guest.raw, 0, 200 * PAGE)).errno == errno.EINVAL
        assert await dirty_v1(guest.raw, 0, 200 * PAGE, 2 * PAGE) == {50}


async def test_a_bitmap_above_the_limit_of_the_server_is_refused(guest: Guest) -> None:
    """256 MiB: of 8 TiB and a page."""
    assert (await get_bitmap(guest.raw, 0, (8 << 40) + PAGE)).errno == errno.EINVAL
    await guest.raw.expect_alive()


async def test_the_bitmap_of_a_tebibyte_comes_in_one_reply(guest: Guest) -> None:
    await guest.map_sparse(TIB, TIB)
    written = {0, 7, 12345678, (TIB // PAGE) - 1}
    for page in written:
        await guest.write(TIB + page * PAGE)
    reply = (await get_bitmap(guest.raw, TIB, TIB)).ok
    assert len(reply) == 40 + (32 << 20)
    bitmap = reply[40:]
    assert all(bitmap[page // 8] == 1 << page % 8 for page in written if page > 7)
    assert bitmap[0] == 0b10000001
    assert bitmap.count(0) == len(bitmap) - 3
    assert await dirty_v1(guest.raw, TIB, 64 * PAGE) == set()


async def test_our_client_takes_a_bitmap_above_max_data_xfer_size(scratch: Served) -> None:
    async with open_client(scratch.path) as client:
        await client.dirty_pages_start()
        length = (64 << 30) // PAGE // 8
        bitmap = await client.dirty_pages_bitmap(BitmapRange(0, 64 << 30, Bitmap(PAGE, length)))
        assert len(bitmap) == length == 2 << 20
        assert not any(bitmap)


# DMA_UNMAP


async def test_unmap_gives_the_bitmap_of_what_goes(guest: Guest) -> None:
    await guest.write(9 * PAGE)
    reply = (await unmap_v1(guest.raw, 0, SIZE)).ok
    assert reply == struct.pack("=IIQQQQQ", 48, wire.UNMAP_BITMAP, 0, SIZE, PAGE, 8, 1 << 9)
    assert (await unmap_v1(guest.raw, 0, SIZE)).errno == errno.ENOENT


async def test_unmap_of_several_regions_gives_one_bitmap(scratch: Served) -> None:
    """The size that comes back is that of the regions, the bitmap is that of the range."""
    async with dirty_guest(scratch.path) as guest:
        for first, count in ((2, 3), (5, 2), (70, 4)):
            await guest.map(first * PAGE, count * PAGE)
        await guest.map(80 * PAGE, PAGE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        for page in (2, 4, 5, 73, 80):
            await guest.write(page * PAGE)
        reply = (await unmap_v1(guest.raw, 0, 80 * PAGE)).ok
        assert struct.unpack_from("=IIQQQQ", reply) == (56, wire.UNMAP_BITMAP, 0, 9 * PAGE, PAGE, 16)
        assert pages(reply[40:]) == {2, 4, 5, 73}
        assert (await unmap_v1(guest.raw, 0, 80 * PAGE)).errno == errno.ENOENT
        assert pages((await unmap_v1(guest.raw, 80 * PAGE, PAGE)).ok[40:]) == {0}


async def test_unmap_in_coarser_pages(guest: Guest) -> None:
    await guest.write(9 * PAGE)
    assert pages((await unmap_v1(guest.raw, 0, SIZE, 4 * PAGE)).ok[40:]) == {2}


async def test_unmap_gives_only_what_has_not_been_reported(guest: Guest) -> None:
    await guest.write(9 * PAGE)
    assert await dirty_v1(guest.raw, 0, SIZE) == {9}
    await guest.write(4 * PAGE)
    assert pages((await unmap_v1(guest.raw, 0, SIZE)).ok[40:]) == {4}


async def test_unmap_of_a_device_that_cannot_tell(serve: Serve) -> None:
    async with dirty_guest(serve(Blind).path) as guest:
        await guest.map(0, 3 * PAGE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        assert pages((await unmap_v1(guest.raw, 0, 3 * PAGE)).ok[40:]) == {0, 1, 2}


REFUSED = {
    "cut at its end": ((0, 8 * PAGE), {}, errno.EINVAL),
    "cut at its start": ((8 * PAGE, 8 * PAGE), {}, errno.EINVAL),
    "nothing there": ((1 << 40, PAGE), {}, errno.ENOENT),
    "empty": ((0, 0), {"length": 8}, errno.EINVAL),
    "wraps": ((TOP, 2 * PAGE), {}, errno.EINVAL),
    "argsz too small": ((0, SIZE), {"argsz": 47}, errno.EINVAL),
    "argsz of the request": ((0, SIZE), {"argsz": 24}, errno.EINVAL),
    "with all": ((0, 0), {"length": 8, "flags": wire.UNMAP_BITMAP | wire.UNMAP_ALL}, errno.EINVAL),
    "unknown flag": ((0, SIZE), {"flags": 4}, errno.EINVAL),
    "unknown flag too": ((0, SIZE), {"flags": wire.UNMAP_BITMAP | 4}, errno.EINVAL),
}


@pytest.mark.parametrize(("place", "rest", "error"), REFUSED.values(), ids=REFUSED.keys())
async def test_an_unmap_that_is_refused_has_lost_nothing(
    guest: Guest, place: tuple[int, int], rest: dict[str, int], error: int
) -> None:
    await guest.write(9 * PAGE)
    assert (await unmap_v1(guest.raw, *place, **rest)).errno == error
    assert pages((await unmap_v1(guest.raw, 0, SIZE)).ok[40:]) == {9}


@pytest.mark.parametrize("argsz", [0, 23])
async def test_argsz_below_the_entry_unmaps_nothing(guest: Guest, argsz: int) -> None:
    body = wire.dma_unmap(0, SIZE, argsz=argsz)
    assert (await guest.raw.call(wire.DMA_UNMAP, body)).errno == errno.EINVAL
    await guest.unmap(0, SIZE)


@pytest.mark.parametrize(("address", "size"), [(0, SIZE), (PAGE, 0)])
async def test_unmap_of_all_takes_no_range(guest: Guest, address: int, size: int) -> None:
    body = wire.dma_unmap(address, size, wire.UNMAP_ALL)
    assert (await guest.raw.call(wire.DMA_UNMAP, body)).errno == errno.EINVAL
    assert (await guest.raw.call(wire.DMA_UNMAP, wire.dma_unmap(0, 0, wire.UNMAP_ALL))).ok
    assert (await unmap_v1(guest.raw, 0, SIZE)).errno == errno.ENOENT


async def test_a_log_goes_with_its_region(scratch: Served) -> None:
    """As in the kernel of v1: who wants it asks for it when he unmaps."""
    async with dirty_guest(scratch.path) as guest:
        ram = await guest.map(0, SIZE)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        await guest.write(0)
        await guest.unmap(0, SIZE)
        assert await dirty_v1(guest.raw, 0, SIZE) == set()
        assert (await guest.map_again(ram.ranges[0])).ok == b""
        assert await dirty_v1(guest.raw, 0, SIZE) == set()
        await guest.write(PAGE)
        assert await dirty_v1(guest.raw, 0, SIZE) == {1}


# Reset, and the end of a client


async def test_a_client_that_leaves_a_long_report_unread(scratch: Served) -> None:
    async with dirty_guest(scratch.path) as guest:
        await guest.map_sparse(0, TIB)
        assert (await dirty_pages(guest.raw, START)).ok == b""
        for _ in range(4):
            await guest.raw.command(wire.DIRTY_PAGES, get_bitmap_body(0, TIB))
    with GuestRam() as ram:
        memory = ram.add(0, SIZE)
        async with open_client(scratch.path) as client:
            await client.dma_map(memory)
            await client.dirty_pages_start()
            await client.reset()
