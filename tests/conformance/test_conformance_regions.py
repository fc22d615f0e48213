# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "VFIO region capabilities", "VFIO_USER_DEVICE_GET_REGION_IO_FDS"."""

import errno
import mmap
import os
import struct
from collections.abc import AsyncIterator

import pytest

from conformance import wire
from conformance.driving import read_word
from conformance.engines import Serve
from conformance.models import PAGE, Bells, Mappable
from conformance.raw import RawClient, connect
from vfio_user.client.client import open_client

READ, WRITE, MMAP, CAPS = 1, 2, 4, 8


@pytest.fixture
async def board(serve: Serve) -> AsyncIterator[RawClient]:
    """A client of a device with regions that can be mapped."""
    async with connect(serve(Mappable).path) as raw:
        yield raw


async def test_a_region_that_can_be_mapped_comes_with_a_descriptor(board: RawClient) -> None:
    answer = await board.call(wire.GET_REGION_INFO, wire.get_region_info(0, 4096))
    assert struct.unpack("=IIIIQQ", answer.ok) == (32, READ | WRITE | MMAP, 0, 0, 2 * PAGE, 0)
    assert len(answer.fds) == 1


async def test_a_region_that_cannot_be_mapped_comes_without(board: RawClient) -> None:
    for index in (1, wire.CONFIG):
        answer = await board.call(wire.GET_REGION_INFO, wire.get_region_info(index, 4096))
        assert not answer.ok[4] & MMAP
        assert answer.fds == ()


async def test_the_areas_of_a_region_that_can_be_mapped_in_part(board: RawClient) -> None:
    answer = await board.call(wire.GET_REGION_INFO, wire.get_region_info(2, 4096))
    argsz, flags, _, cap_offset, size, _ = struct.unpack_from("=IIIIQQ", answer.ok)
    assert (argsz, flags, cap_offset, size) == (len(answer.ok), READ | WRITE | MMAP | CAPS, 32, 4 * PAGE)
    capability = struct.unpack("=HHIIIQQQQ", answer.ok[cap_offset:])
    assert capability == (1, 1, 0, 2, 0, PAGE, PAGE, 3 * PAGE, PAGE)


async def test_a_too_small_argsz_is_answered_with_the_size_needed(board: RawClient) -> None:
    for argsz in (32, 33, 79):
        reply = (await board.call(wire.GET_REGION_INFO, wire.get_region_info(2, argsz))).ok
        needed, flags, _, cap_offset, _, _ = struct.unpack("=IIIIQQ", reply)
        assert (needed, flags & CAPS, cap_offset) == (80, 0, 0)
    assert len((await board.call(wire.GET_REGION_INFO, wire.get_region_info(2, 80))).ok) == 80


async def test_both_sides_see_what_the_other_writes(board: RawClient) -> None:
    answer = await board.call(wire.GET_REGION_INFO, wire.get_region_info(2, 4096))
    with mmap.mmap(answer.fds[0], PAGE, offset=3 * PAGE) as ours:
        ours[5:9] = b"ours"
        reply = (await board.call(wire.REGION_READ, wire.region_read(2, 3 * PAGE + 5, 4))).ok
        assert reply[16:] == b"ours"
        await board.call(wire.REGION_WRITE, wire.region_write(2, 4 * PAGE - 6, b"theirs"))
        assert ours[PAGE - 6 :] == b"theirs"
        assert (await board.call(wire.RESET)).ok == b""
        assert ours[:] == bytes(PAGE)


async def test_the_typed_client_maps_the_areas(serve: Serve) -> None:
    async with open_client(serve(Mappable).path) as client:
        with await client.map_region(2) as mapped:
            assert [(area.offset, area.size) for area in mapped.areas] == [(PAGE, PAGE), (3 * PAGE, PAGE)]
            mapped.areas[0].view[:4] = b"mine"
            assert await client.region_read(2, PAGE, 4) == b"mine"


async def test_a_client_cannot_change_the_size_of_the_memory(board: RawClient) -> None:
    (fd,) = (await board.call(wire.GET_REGION_INFO, wire.get_region_info(0))).fds
    for size in (0, PAGE, 4 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert await read_word(board, PAGE) == 0


async def test_a_client_that_takes_no_descriptors_gets_no_mapping(serve: Serve) -> None:
    async with connect(serve(Mappable).path, negotiated=False) as raw:
        await raw.negotiate({"max_msg_fds": 0})
        for index in (0, 2):
            answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(index, 4096))
            assert answer.fds == ()
            assert struct.unpack_from("=II", answer.ok) == (32, READ | WRITE)


async def test_the_memory_stays_when_its_client_leaves(serve: Serve) -> None:
    served = serve(Mappable)
    async with connect(served.path) as raw:
        (fd,) = (await raw.call(wire.GET_REGION_INFO, wire.get_region_info(0))).fds
        with mmap.mmap(fd, PAGE) as ours:
            ours[:4] = b"kept"
    async with connect(served.path) as raw:
        assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok[16:] == b"kept"


# GET_REGION_IO_FDS


@pytest.fixture
async def bells(serve: Serve) -> AsyncIterator[RawClient]:
    """A client of a device with 20 doorbells; ours takes 16 descriptors in a message."""
    async with connect(serve(Bells).path) as raw:
        yield raw


async def test_doorbells_come_with_an_eventfd_each(bells: RawClient) -> None:
    answer = await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096))
    argsz, flags, index, count = struct.unpack_from("=IIII", answer.ok)
    assert (argsz, flags, index, count) == (16 + 16 * 40, 0, 0, 16)
    assert len(answer.fds) == 16
    for i in range(count):
        entry = struct.unpack_from("=QQIIIIQ", answer.ok, 16 + 40 * i)
        assert entry == (8 * i, 4, i, 0, 1 if i else 0, 0, i)


async def test_a_signal_is_a_write_to_the_doorbell(bells: RawClient, serve: Serve) -> None:
    fds = (await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096))).fds
    os.eventfd_write(fds[3], 1)
    os.eventfd_write(fds[0], 1)
    while not (await read_word(bells, 24) and await read_word(bells, 0)):
        pass
    assert [await read_word(bells, 8 * i) for i in range(5)] == [1, 0, 0, 1, 0]


async def test_a_doorbell_can_still_be_rung_by_message(bells: RawClient) -> None:
    await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096))
    await bells.call(wire.REGION_WRITE, wire.region_write(0, 19 * 8, b"\x13\0\0\0"))
    assert await read_word(bells, 19 * 8) == 1


async def test_who_asks_again_gets_the_same_eventfds(bells: RawClient) -> None:
    answers = [await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096)) for _ in range(3)]
    assert answers[0].body == answers[1].body == answers[2].body
    os.eventfd_write(answers[0].fds[7], 1)
    while not await read_word(bells, 56):
        pass


async def test_a_too_small_argsz_gets_the_size_and_no_descriptors(bells: RawClient) -> None:
    for argsz in (16, 56, 655):
        answer = await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, argsz))
        assert struct.unpack("=IIII", answer.ok) == (656, 0, 0, 16)
        assert answer.fds == ()


@pytest.mark.parametrize("limit", [0, 1, 3, 20, 1000])
async def test_a_message_has_no_more_descriptors_than_the_client_takes(serve: Serve, limit: int) -> None:
    async with connect(serve(Bells).path, negotiated=False) as raw:
        await raw.negotiate({"max_msg_fds": limit})
        answer = await raw.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096))
        assert len(answer.fds) == min(limit, 20)
        assert struct.unpack_from("=I", answer.ok, 12) == (min(limit, 20),)


async def test_a_region_without_doorbells_has_none(bells: RawClient) -> None:
    for index in (1, wire.CONFIG):
        answer = await bells.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(index, 4096))
        assert struct.unpack("=IIII", answer.ok) == (16, 0, index, 0)
        assert answer.fds == ()


@pytest.mark.parametrize(("flags", "count"), [(1, 0), (0, 1), (0xFFFFFFFF, 0xFFFFFFFF)])
async def test_fields_that_must_be_zero_are_checked(bells: RawClient, flags: int, count: int) -> None:
    body = wire.get_region_io_fds(0, 4096, flags, count)
    assert (await bells.call(wire.GET_REGION_IO_FDS, body)).errno == errno.EINVAL


async def test_a_doorbell_of_a_client_that_has_left_rings_nothing(serve: Serve) -> None:
    served = serve(Bells)
    async with connect(served.path) as raw:
        fds = (await raw.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(0, 4096))).fds
        kept = os.dup(fds[2])
    try:
        async with connect(served.path) as raw:
            os.eventfd_write(kept, 1)
            assert await read_word(raw, 16) == 0
    finally:
        os.close(kept)
