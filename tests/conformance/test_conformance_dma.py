# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "Client memory access", "VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE": the three ways."""

import errno
import os
import struct
from collections.abc import AsyncIterator

import pytest

from conformance import wire
from conformance.driving import (
    BUSY,
    DONE,
    FAILED,
    PAGE,
    STATUS,
    answer_dma,
    dma_fields,
    enable_bus_master,
    finished,
    map_private,
    prepare_private,
    read_word,
    serve_dma,
    start_copy,
)
from conformance.engines import Serve, Served
from conformance.raw import Answer, RawClient, connect
from vfio_user.client.memory import FIXED_SIZE, GuestRam, RamRange
from vfio_user.device_models.scratch import Scratch

SIZE = 64 * PAGE
WAYS = {"mapped": (True, FIXED_SIZE), "file": (True, 0), "message": (False, 0)}


async def map_ram(raw: RawClient, memory: RamRange) -> None:
    body = wire.dma_map(memory.address, memory.size, memory.offset, memory.flags)
    fds = () if memory.fd is None else (memory.fd,)
    assert (await raw.call(wire.DMA_MAP, body, fds=fds)).ok == b""


async def copy(raw: RawClient, ram: GuestRam, source: int, destination: int, length: int) -> int:
    """Let the device copy, answer its messages from `ram`, and give the status."""
    await start_copy(raw, source, destination, length)
    while True:
        await raw.command(wire.REGION_READ, wire.region_read(0, STATUS, 4))
        while (message := await raw.receive()).command != wire.REGION_READ:
            address, count, data = dma_fields(message)
            if message.command == wire.DMA_READ:
                await raw.answer(message, wire.dma_read_reply(address, bytes(ram.dma_read(address, count))))
            else:
                ram.dma_write(address, data)
                await raw.answer(message, wire.dma_write_reply(address, count))
        status = int.from_bytes(message.ok[16:], "little")
        if not status & BUSY:
            return status


@pytest.mark.parametrize("way", WAYS)
async def test_guest_memory_is_copied_and_the_counters_tell_the_way(serve: Serve, way: str) -> None:
    served = serve(Scratch)
    shared, seals = WAYS[way]
    data = os.urandom(150_000)
    with GuestRam(shared=shared, seals=seals) as ram:
        for place in (0, SIZE):
            ram.add_file([(place, SIZE)])
        ram.write(0x123, data)
        async with connect(served.path) as raw:
            for memory in ram.ranges:
                await map_ram(raw, memory)
            await enable_bus_master(raw)
            assert await copy(raw, ram, 0x123, SIZE + 0x77, len(data)) == DONE
        assert ram.read(SIZE + 0x77, len(data)) == data
    moved = {name: served.counted(f"dma_{name}_write_bytes") for name in WAYS}
    assert moved == dict.fromkeys(WAYS, 0) | {way: len(data)}
    assert served.counted(f"dma_{way}_read_bytes") == len(data)


@pytest.mark.parametrize("way", WAYS)
async def test_a_range_may_cross_regions_of_different_ways(scratch: Served, way: str) -> None:
    """`way` in the middle, a mapped region before it and one by message after it."""
    data = os.urandom(3 * PAGE - 20)
    with GuestRam() as before, GuestRam(shared=WAYS[way][0], seals=WAYS[way][1]) as middle:
        before.add(0, PAGE)
        middle.add(PAGE, PAGE)
        async with connect(scratch.path) as raw:
            await map_ram(raw, before.ranges[0])
            await map_ram(raw, middle.ranges[0])
            await map_private(raw, 2 * PAGE, PAGE)
            await map_private(raw, 0x100000, 4 * PAGE)
            await enable_bus_master(raw)
            memory = bytearray(0x100000 + 4 * PAGE)
            memory[10 : 10 + len(data)] = data
            before.write(0, bytes(memory[:PAGE]))
            middle.write(PAGE, bytes(memory[PAGE : 2 * PAGE]))
            await start_copy(raw, 10, 0x100000, len(data))
            await serve_dma(raw, memory, 3 if way == "message" else 2)
            assert await finished(raw) == DONE
            assert memory[0x100000 : 0x100000 + len(data)] == data


@pytest.mark.parametrize("way", WAYS)
async def test_the_device_cannot_write_a_read_only_range(scratch: Served, way: str) -> None:
    shared, seals = WAYS[way]
    with GuestRam(shared=shared, seals=seals) as ram:
        ram.add(0, PAGE)
        ram.add(PAGE, PAGE, writable=False)
        async with connect(scratch.path) as raw:
            for memory in ram.ranges:
                await map_ram(raw, memory)
            await enable_bus_master(raw)
            ram.write(0, b"source")
            assert await copy(raw, ram, 0, PAGE, 6) == FAILED
            assert await copy(raw, ram, 0, PAGE - 3, 6) == FAILED, "half of it"
            assert await copy(raw, ram, PAGE, 64, 6) == DONE, "but it can be read"
        assert ram.read(PAGE, 6) == bytes(6)


@pytest.mark.parametrize("way", WAYS)
async def test_the_device_cannot_read_a_write_only_range(scratch: Served, way: str) -> None:
    shared, seals = WAYS[way]
    with GuestRam(shared=shared, seals=seals) as ram:
        memory = ram.add(0, 2 * PAGE)
        async with connect(scratch.path) as raw:
            body = wire.dma_map(0, 2 * PAGE, 0, wire.WRITABLE)
            await raw.call(wire.DMA_MAP, body, fds=() if memory.fd is None else (memory.fd,))
            await enable_bus_master(raw)
            assert await copy(raw, ram, 0, PAGE, 8) == FAILED


@pytest.mark.parametrize("way", WAYS)
async def test_a_range_that_is_not_mapped_fails(scratch: Served, way: str) -> None:
    shared, seals = WAYS[way]
    with GuestRam(shared=shared, seals=seals) as ram:
        ram.add(PAGE, PAGE)
        async with connect(scratch.path) as raw:
            await map_ram(raw, ram.ranges[0])
            await enable_bus_master(raw)
            for source, destination in ((0, PAGE), (PAGE, 0), (PAGE - 4, PAGE), (2 * PAGE - 4, PAGE)):
                assert await copy(raw, ram, source, destination, 8) == FAILED
            assert await copy(raw, ram, (1 << 64) - 4, PAGE, 8) == FAILED, "wraps around"
            assert await copy(raw, ram, PAGE, PAGE + 8, 8) == DONE


async def test_without_bus_master_there_is_no_dma(raw: RawClient) -> None:
    await map_private(raw, 0, PAGE)
    await start_copy(raw, 0, 64, 8)
    assert await finished(raw) == FAILED


@pytest.mark.parametrize("grows_again", [False, True])
async def test_a_file_that_is_truncated_later_gives_an_error(scratch: Served, grows_again: bool) -> None:
    """A mapping would have killed the server by SIGBUS, and this test's process with it."""
    with GuestRam(seals=0) as ram:
        memory = ram.add(0, 4 * PAGE)
        assert memory.fd is not None
        async with connect(scratch.path) as raw:
            await map_ram(raw, memory)
            await enable_bus_master(raw)
            os.ftruncate(memory.fd, PAGE)
            await start_copy(raw, 2 * PAGE, 0, 8)
            assert await finished(raw) == FAILED, "reading"
            await start_copy(raw, 0, 2 * PAGE, 8)
            assert await finished(raw) == FAILED, "writing"
            if grows_again:
                os.ftruncate(memory.fd, 4 * PAGE)
            await start_copy(raw, 0, 8, 8)
            assert await finished(raw) == DONE
            assert os.fstat(memory.fd).st_size == (4 if grows_again else 1) * PAGE


# By message


@pytest.fixture
async def private(scratch: Served) -> AsyncIterator[RawClient]:
    """A client of `scratch` whose memory at address 0 is reached by message, 4096 bytes at a time."""
    async with connect(scratch.path, negotiated=False) as raw:
        await prepare_private(raw, max_data_xfer_size=4096)
        yield raw


async def one_request(raw: RawClient, command: int, *, source: int = 0, length: int = 8) -> Answer:
    """Start a copy, and give the device's request that follows; a read before it has been answered."""
    await start_copy(raw, source, PAGE, length)
    request = await raw.receive()
    if command == wire.DMA_WRITE:
        await answer_dma(raw, request, bytearray(SIZE))
        request = await raw.receive()
    assert request.command == command
    return request


async def test_requests_of_the_server_are_as_specified(private: RawClient) -> None:
    memory = bytearray(b"original" + bytes(2 * PAGE))
    await start_copy(private, 0, PAGE, 8)
    read, write = await serve_dma(private, memory, 2)
    assert (read.command, read.body) == (wire.DMA_READ, struct.pack("=QQ", 0, 8))
    assert (write.command, write.body) == (wire.DMA_WRITE, struct.pack("=QQ", PAGE, 8) + b"original")
    assert await finished(private) == DONE


async def test_replies_may_come_in_any_order(private: RawClient) -> None:
    memory = bytearray(os.urandom(4 * PAGE) + bytes(12 * PAGE))
    await start_copy(private, 0, 8 * PAGE, 4 * PAGE)
    for command in (wire.DMA_READ, wire.DMA_WRITE):
        requests = [await private.receive() for _ in range(4)]
        assert [request.command for request in requests] == [command] * 4
        assert len({request.message_id for request in requests}) == 4
        for request in reversed(requests):
            await answer_dma(private, request, memory)
    assert await finished(private) == DONE
    assert memory[8 * PAGE : 12 * PAGE] == memory[: 4 * PAGE]


async def test_a_request_has_at_most_max_data_xfer_size(private: RawClient) -> None:
    await start_copy(private, 4, 8 * PAGE, PAGE + 1)
    requests = await serve_dma(private, bytearray(16 * PAGE), 4)
    assert [dma_fields(request)[:2] for request in requests] == [
        (4, PAGE),
        (4 + PAGE, 1),
        (8 * PAGE, PAGE),
        (9 * PAGE, 1),
    ]
    assert await finished(private) == DONE


@pytest.mark.parametrize("command", [wire.DMA_READ, wire.DMA_WRITE])
@pytest.mark.parametrize("error", [errno.ENODEV, errno.EFAULT, 0, 0xFFFFFFFF])
async def test_an_error_reply_fails_the_access(private: RawClient, command: int, error: int) -> None:
    request = await one_request(private, command)
    header = wire.HEADER.pack(request.message_id, command, wire.HEADER.size, wire.REPLY | wire.ERROR, error)
    await private.send(header)
    assert await finished(private) == FAILED


WRONG = {
    "fewer bytes": (wire.DMA_READ, wire.dma_read_reply(0, b"four")),
    "more bytes": (wire.DMA_READ, wire.dma_read_reply(0, b"very much more")),
    "no bytes": (wire.DMA_READ, wire.dma_read_reply(0, b"")),
    "count above the data": (wire.DMA_READ, struct.pack("=QQ", 0, 8) + b"four"),
    "count of all bits": (wire.DMA_READ, struct.pack("=QQ", 0, (1 << 64) - 1) + b"12345678"),
    "no body": (wire.DMA_READ, b""),
    "half a body": (wire.DMA_READ, bytes(9)),
    "wrote fewer": (wire.DMA_WRITE, wire.dma_write_reply(PAGE, 7)),
    "wrote more": (wire.DMA_WRITE, wire.dma_write_reply(PAGE, 9)),
    "wrote nothing": (wire.DMA_WRITE, wire.dma_write_reply(PAGE, 0)),
}


@pytest.mark.parametrize(("command", "body"), WRONG.values(), ids=WRONG.keys())
async def test_a_reply_of_the_wrong_length_fails_the_access(
    private: RawClient, command: int, body: bytes
) -> None:
    await private.answer(await one_request(private, command), body)
    assert await finished(private) == FAILED
    request = await one_request(private, wire.DMA_READ)
    await answer_dma(private, request, bytearray(PAGE))
    await serve_dma(private, bytearray(2 * PAGE), 1)
    assert await finished(private) == DONE


@pytest.mark.parametrize("body", [b"", struct.pack("=QI", PAGE, 8)], ids=["no body", "count of 4 bytes"])
async def test_a_write_reply_may_be_as_real_clients_send_it(private: RawClient, body: bytes) -> None:
    """QEMU sends no body; the specification's table has a count of 4 bytes."""
    await private.answer(await one_request(private, wire.DMA_WRITE), body)
    assert await finished(private) == DONE


async def test_a_reply_to_the_other_command_fails_the_access(private: RawClient) -> None:
    request = await one_request(private, wire.DMA_READ)
    body = wire.dma_write_reply(0, 8)
    await private.send(wire.message(wire.DMA_WRITE, body, flags=wire.REPLY, message_id=request.message_id))
    assert await finished(private) == FAILED


async def test_a_second_reply_is_dropped(private: RawClient) -> None:
    request = await one_request(private, wire.DMA_READ)
    for data in (b"12345678", b"again..."):
        await private.answer(request, wire.dma_read_reply(0, data))
    assert dma_fields(await private.receive())[2] == b"12345678"


async def test_no_command_waits_for_the_clients_answer(private: RawClient) -> None:
    """QEMU holds its lock for each of these, and answers DMA only without it."""
    request = await one_request(private, wire.DMA_READ)
    for command in (wire.REGION_READ, wire.REGION_WRITE, wire.SET_IRQS, wire.GET_INFO, wire.WRITE_MULTI):
        assert (await private.call(command, wire.VALID[command])).ok is not None
    assert await read_word(private, STATUS) == BUSY
    assert (await private.call(wire.DMA_UNMAP, wire.dma_unmap(0, 16 * PAGE))).ok
    assert (await private.call(wire.RESET)).ok == b""
    await private.answer(request, wire.dma_read_reply(0, b"too late"))
    await private.expect_alive()


async def test_replies_go_out_before_the_dma_of_the_same_batch(private: RawClient) -> None:
    read = wire.message(wire.REGION_READ, wire.region_read(0, STATUS, 4), message_id=1)
    ring = wire.message(wire.REGION_WRITE, wire.region_write(0, 0xFF8, bytes(4)), message_id=2)
    length = wire.message(wire.REGION_WRITE, wire.region_write(0, 0xFF0, b"\x08\0\0\0"), message_id=3)
    await private.send(length + ring + read)
    order = [(await private.receive()).command for _ in range(4)]
    assert order == [wire.REGION_WRITE, wire.REGION_WRITE, wire.REGION_READ, wire.DMA_READ]


async def test_reset_cuts_the_dma_and_late_replies_are_dropped(private: RawClient) -> None:
    first = await one_request(private, wire.DMA_READ)
    assert (await private.call(wire.RESET)).ok == b""
    assert await read_word(private, STATUS) == 0
    await enable_bus_master(private)
    second = await one_request(private, wire.DMA_READ)
    assert second.message_id != first.message_id, "the first id is still owed a reply"
    await private.answer(first, wire.dma_read_reply(0, b"obsolete"))
    assert await read_word(private, STATUS) == BUSY
    await private.answer(second, wire.dma_read_reply(0, b"the new!"))
    assert dma_fields(await private.receive())[2] == b"the new!"


async def test_a_client_that_never_answers_dma_is_served_all_the_same(private: RawClient) -> None:
    ids = set()
    for _ in range(100):
        ids.add((await one_request(private, wire.DMA_READ)).message_id)
        assert (await private.call(wire.RESET)).ok == b""
        await enable_bus_master(private)
    assert len(ids) == 100
    assert await read_word(private, STATUS) == 0


@pytest.mark.parametrize("answer", ["data", "error"])
async def test_unmap_while_a_task_waits(private: RawClient, answer: str) -> None:
    request = await one_request(private, wire.DMA_READ)
    assert (await private.call(wire.DMA_UNMAP, wire.dma_unmap(0, 16 * PAGE))).ok
    if answer == "data":
        await private.answer(request, wire.dma_read_reply(0, b"12345678"))
    else:
        await private.answer(request, error=errno.EFAULT)
    assert await finished(private) == FAILED, "where it would write, nothing is mapped any more"


async def test_another_region_in_place_of_the_one_a_task_waits_for(private: RawClient) -> None:
    with GuestRam() as ram:
        ram.add(0, 16 * PAGE)
        request = await one_request(private, wire.DMA_READ)
        assert (await private.call(wire.DMA_UNMAP, wire.dma_unmap(0, 16 * PAGE))).ok
        await map_ram(private, ram.ranges[0])
        await private.answer(request, wire.dma_read_reply(0, b"12345678"))
        assert await finished(private) == DONE
        assert ram.read(PAGE, 8) == b"12345678"


@pytest.mark.parametrize("command", [wire.DMA_READ, wire.DMA_WRITE])
async def test_a_client_that_leaves_with_dma_under_way(scratch: Served, command: int) -> None:
    """The next client finds the device as it was; the work is begun anew once that uses the device."""
    async with connect(scratch.path, negotiated=False) as raw:
        await prepare_private(raw)
        await one_request(raw, command)
    async with connect(scratch.path) as raw:
        await map_private(raw, 0, 16 * PAGE)
        await raw.expect_alive()
        await raw.command(wire.REGION_READ, wire.region_read(0, STATUS, 4))
        assert (await raw.receive()).ok[16:] == struct.pack("<I", BUSY)
        await serve_dma(raw, bytearray(16 * PAGE), 2)
        assert await finished(raw) == DONE


async def test_dma_waits_until_the_new_client_has_set_itself_up(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        await prepare_private(raw)
        await one_request(raw, wire.DMA_READ)
    set_up = (wire.GET_INFO, wire.GET_REGION_INFO, wire.GET_REGION_IO_FDS, wire.GET_IRQ_INFO, wire.SET_IRQS)
    async with connect(scratch.path) as raw:
        await map_private(raw, 0, 16 * PAGE)
        for command in set_up:
            assert (await raw.call(command, wire.VALID[command])).ok is not None
        for command, body in wire.MIGRATION.items():
            await raw.call(command, body)
        await raw.expect_alive()
        await raw.command(wire.REGION_READ, wire.region_read(0, STATUS, 4))
        assert [(await raw.receive()).command for _ in range(2)] == [wire.REGION_READ, wire.DMA_READ]
