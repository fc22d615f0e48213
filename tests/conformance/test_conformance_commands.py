# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "Commands", "Header", "Message sizes", and the commands that are not about memory."""

import errno
import struct
from collections.abc import Callable

import pytest

from conformance import wire
from conformance.engines import Serve, Served
from conformance.models import LARGE, OneWay
from conformance.raw import RawClient, connect
from vfio_user.device_models.catalog import MODELS, load_model

U64 = (1 << 64) - 1
RAISES = 0x04  # the register of the faulty device that does


# "Commands": each is answered


async def test_every_command_that_a_server_has_to_know_works(raw: RawClient) -> None:
    for command, body in wire.VALID.items():
        assert (await raw.call(command, body)).ok is not None


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"faulty"}))
async def test_every_model_answers_every_command(serve: Serve, model: str) -> None:
    async with connect(serve(load_model(model)).path) as raw:
        for command, body in wire.VALID.items():
            assert (await raw.call(command, body)).ok is not None
        for command, body in wire.MIGRATION.items():
            assert (await raw.call(command, body)).flags & wire.REPLY
        await raw.expect_alive()


@pytest.mark.parametrize("command", [0, 19, 20, 255, 0xFFFF])
async def test_an_unknown_command_is_refused_and_the_connection_stays(raw: RawClient, command: int) -> None:
    """The specification names no errno for it."""
    assert (await raw.call(command, b"any body")).errno in (errno.ENOSYS, errno.EINVAL)
    await raw.expect_alive()


REFUSED = {
    wire.DMA_MAP: wire.dma_map(0, 0x1000, flags=0x80),
    wire.DMA_UNMAP: wire.dma_unmap(0x10000, 0x1000),
    wire.GET_INFO: wire.get_info(0),
    wire.GET_REGION_INFO: wire.get_region_info(0xFFFF),
    wire.SET_IRQS: wire.set_irqs(wire.INTX, 0, 0, 0),
    wire.REGION_READ: wire.region_read(0, 0, 5000),
    wire.REGION_WRITE: wire.region_write(0, 4096, b"word"),
    99: b"body",
}


@pytest.mark.parametrize("command", REFUSED)
async def test_an_error_reply_is_the_header_alone(raw: RawClient, command: int) -> None:
    answer = await raw.call(command, REFUSED[command])
    assert (answer.flags, answer.body) == (wire.REPLY | wire.ERROR, b"")


async def test_the_reply_to_an_access_that_fails_is_the_header_alone(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        for command, body in (
            (wire.REGION_READ, wire.region_read(0, RAISES, 4)),
            (wire.REGION_WRITE, wire.region_write(0, RAISES, b"word")),
        ):
            answer = await raw.call(command, body)
            assert (answer.flags, answer.body) == (wire.REPLY | wire.ERROR, b"")


@pytest.mark.parametrize("command", [wire.DMA_READ, wire.DMA_WRITE])
async def test_a_command_of_the_other_direction_is_refused(raw: RawClient, command: int) -> None:
    assert (await raw.call(command, struct.pack("=QQ", 0x1000, 0))).errno == errno.EINVAL
    await raw.expect_alive()


# "Header"


async def test_a_message_id_may_be_used_again_at_once(raw: RawClient) -> None:
    request = wire.message(wire.GET_INFO, wire.get_info(), message_id=7)
    await raw.send(request * 3)
    assert [(await raw.receive()).message_id for _ in range(3)] == [7, 7, 7]


@pytest.mark.parametrize("command", [*wire.VALID, *wire.MIGRATION, wire.DMA_READ, 0, 99])
async def test_no_reply_is_never_answered(raw: RawClient, command: int) -> None:
    body = {**wire.VALID, **wire.MIGRATION}.get(command, b"")
    await raw.command(command, body, flags=wire.NO_REPLY)
    await raw.command(command, b"\xff", flags=wire.NO_REPLY)
    await raw.expect_alive()


async def test_a_posted_write_is_done_before_a_later_read(raw: RawClient) -> None:
    await raw.command(wire.REGION_WRITE, wire.region_write(0, 8, b"posted"), flags=wire.NO_REPLY)
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 8, 6))).ok[16:] == b"posted"


@pytest.mark.parametrize("kind", range(2, 16))
async def test_a_message_type_that_does_not_exist_is_refused(raw: RawClient, kind: int) -> None:
    await raw.command(wire.GET_INFO, wire.get_info(), flags=kind)
    assert (await raw.receive()).errno == errno.EINVAL
    await raw.expect_alive()


async def test_the_error_field_of_a_command_is_reserved_and_ignored(raw: RawClient) -> None:
    header = wire.HEADER.pack(9, wire.RESET, wire.HEADER.size, 0, 0xDEAD)
    await raw.send(header)
    assert (await raw.receive()).ok == b""


@pytest.mark.parametrize("flags", [wire.REPLY, wire.REPLY | wire.ERROR, wire.REPLY | wire.NO_REPLY])
@pytest.mark.parametrize("command", [wire.DMA_READ, wire.DMA_WRITE, wire.VERSION, wire.GET_INFO, 99])
async def test_a_reply_that_nobody_waits_for_is_dropped(raw: RawClient, command: int, flags: int) -> None:
    await raw.send(wire.message(command, bytes(32), flags=flags))
    await raw.expect_alive()


@pytest.mark.parametrize("command", wire.VALID)
async def test_a_body_that_is_cut_short_is_refused(raw: RawClient, command: int) -> None:
    for length in range(len(wire.VALID[command])):
        answer = await raw.call(command, wire.VALID[command][:length])
        assert answer.errno == errno.EINVAL, f"{length} bytes"
    await raw.expect_alive()


# Commands before "VFIO_USER_VERSION"


@pytest.mark.parametrize("command", wire.VALID)
async def test_a_command_before_version_is_refused(scratch: Served, command: int) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        assert (await raw.call(command, wire.VALID[command])).errno == errno.EINVAL
        await raw.negotiate()
        assert (await raw.call(wire.GET_REGION_INFO, wire.get_region_info(0))).ok


# "Message sizes": argsz

ARGSZ: dict[int, tuple[Callable[[int], bytes], int]] = {
    wire.GET_INFO: (wire.get_info, 16),
    wire.GET_REGION_INFO: (lambda argsz: wire.get_region_info(0, argsz), 32),
    wire.GET_REGION_IO_FDS: (lambda argsz: wire.get_region_io_fds(0, argsz), 16),
    wire.GET_IRQ_INFO: (lambda argsz: wire.get_irq_info(0, argsz), 16),
}


@pytest.mark.parametrize("command", ARGSZ)
async def test_argsz_below_the_fixed_part_is_refused(raw: RawClient, command: int) -> None:
    body, size = ARGSZ[command]
    for argsz in (0, 1, size - 1):
        assert (await raw.call(command, body(argsz))).errno == errno.EINVAL
    await raw.expect_alive()


@pytest.mark.parametrize("command", ARGSZ)
async def test_a_larger_argsz_is_answered_with_the_size_needed(raw: RawClient, command: int) -> None:
    body, size = ARGSZ[command]
    for argsz in (size, size + 1, 4096, 0xFFFFFFFF):
        reply = (await raw.call(command, body(argsz))).ok
        assert len(reply) == size
        assert struct.unpack_from("=I", reply) == (size,)


# "VFIO_USER_DEVICE_GET_INFO", "..._GET_REGION_INFO", "..._GET_IRQ_INFO"


async def test_the_device_is_a_pci_device_that_can_be_reset(raw: RawClient) -> None:
    reply = (await raw.call(wire.GET_INFO, wire.get_info())).ok
    assert struct.unpack("=IIII", reply) == (16, 3, 10, 5), "the last region is that of migration"


async def test_regions_tell_their_size_and_rights(serve: Serve) -> None:
    async with connect(serve(OneWay).path) as raw:
        found = {}
        for index in range(9):
            reply = (await raw.call(wire.GET_REGION_INFO, wire.get_region_info(index))).ok
            _, flags, answered, _, size, _ = struct.unpack("=IIIIQQ", reply)
            assert answered == index
            found[index] = flags, size
        assert found == {0: (1, 4096), 1: (2, 4096), 2: (3, LARGE), 7: (3, 256)} | dict.fromkeys(
            (3, 4, 5, 6, 8), (0, 0)
        )


@pytest.mark.parametrize("index", [10, 11, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_a_region_index_out_of_range_is_refused(raw: RawClient, index: int) -> None:
    assert (await raw.call(wire.GET_REGION_INFO, wire.get_region_info(index))).errno == errno.EINVAL
    assert (await raw.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(index))).errno == errno.EINVAL
    assert (await raw.call(wire.REGION_READ, wire.region_read(index, 0, 4))).errno == errno.EINVAL
    assert (await raw.call(wire.REGION_WRITE, wire.region_write(index, 0, b"x"))).errno == errno.EINVAL


@pytest.mark.parametrize("index", [5, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_an_irq_index_out_of_range_is_refused(raw: RawClient, index: int) -> None:
    assert (await raw.call(wire.GET_IRQ_INFO, wire.get_irq_info(index))).errno == errno.EINVAL


# "VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE"


async def test_a_region_keeps_what_is_written(raw: RawClient) -> None:
    data = bytes(range(256)) * 15
    reply = (await raw.call(wire.REGION_WRITE, wire.region_write(0, 16, data))).ok
    assert reply == wire.region_read(0, 16, len(data))
    reply = (await raw.call(wire.REGION_READ, wire.region_read(0, 16, len(data)))).ok
    assert reply == wire.region_read(0, 16, len(data)) + data


OUTSIDE = [(4096, 1), (4095, 2), (0, 4097), (0, 0xFFFFFFFF), (U64, 1), (U64, 0xFFFFFFFF), (1 << 63, 8)]


@pytest.mark.parametrize(("offset", "count"), OUTSIDE)
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
async def test_an_access_outside_a_region_is_refused(
    raw: RawClient, offset: int, count: int, warm: bool
) -> None:
    if warm:
        assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, offset, count))).errno == errno.EINVAL
    data = bytes(min(count, 5000))
    assert (await raw.call(wire.REGION_WRITE, wire.region_write(0, offset, data))).errno == errno.EINVAL
    await raw.expect_alive()


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
async def test_a_region_that_is_not_there_or_goes_one_way_is_refused(serve: Serve, warm: bool) -> None:
    async with connect(serve(OneWay).path) as raw:
        if warm:
            assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok
        assert (await raw.call(wire.REGION_WRITE, wire.region_write(0, 0, b"x"))).errno == errno.EPERM
        assert (await raw.call(wire.REGION_READ, wire.region_read(1, 0, 4))).errno == errno.EPERM
        assert (await raw.call(wire.REGION_READ, wire.region_read(5, 0, 4))).errno == errno.EINVAL
        assert (await raw.call(wire.REGION_WRITE, wire.region_write(5, 0, b"x"))).errno == errno.EINVAL


@pytest.mark.parametrize("announced", [0, 3, 5, 4096, 0xFFFFFFFF])
async def test_a_count_that_does_not_fit_the_data_is_refused(raw: RawClient, announced: int) -> None:
    body = struct.pack("=QII", 0, 0, announced) + b"data"
    assert (await raw.call(wire.REGION_WRITE, body)).errno == errno.EINVAL
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok[16:] == bytes(4)


async def test_more_than_max_data_xfer_size_is_refused(serve: Serve) -> None:
    async with connect(serve(OneWay).path, negotiated=False) as raw:
        # The server's own counts here; what the client can take is for DMA_READ and DMA_WRITE.
        await raw.negotiate({"max_data_xfer_size": 8192})
        most = 1 << 20
        assert len((await raw.call(wire.REGION_READ, wire.region_read(2, 0, most))).ok) == 16 + most
        assert (await raw.call(wire.REGION_READ, wire.region_read(2, 0, most + 1))).errno == errno.EINVAL
        written = await raw.call(wire.REGION_WRITE, wire.region_write(2, 0, bytes(most + 1)))
        assert written.errno == errno.EINVAL
        await raw.expect_alive()


async def test_a_megabyte_goes_in_one_message_each_way(serve: Serve) -> None:
    data = bytes(range(256)) * 4096
    async with connect(serve(OneWay).path) as raw:
        request = wire.message(wire.REGION_WRITE, wire.region_write(2, 4096, data))
        # No socket holds it: the server finds a part first. Here always, not only when it is the faster one.
        await raw.send(request[: len(request) // 8])
        await raw.taken()
        await raw.send(request[len(request) // 8 :])
        assert (await raw.receive()).ok
        assert (await raw.call(wire.REGION_READ, wire.region_read(2, 4096, len(data)))).ok[16:] == data


# "VFIO_USER_REGION_WRITE_MULTI"


async def test_writes_are_done_in_order_whether_or_not_the_capability_was_offered(raw: RawClient) -> None:
    writes = [(0, 0, b"aaaa"), (0, 2, b"bbbbbbbb"), (0, 3, b"c")]
    assert (await raw.call(wire.WRITE_MULTI, wire.write_multi(writes))).ok == struct.pack("=Q", 3)
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 10))).ok[16:] == b"aabcbbbbbb"


async def test_the_reply_counts_the_writes_that_were_done(raw: RawClient) -> None:
    writes = [(0, 0, b"done"), (0, 4096, b"out"), (0, 4, b"late")]
    assert (await raw.call(wire.WRITE_MULTI, wire.write_multi(writes))).ok == struct.pack("=Q", 1)
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 8))).ok[16:] == b"done\0\0\0\0"
    assert (await raw.call(wire.WRITE_MULTI, wire.write_multi(writes[1:]))).errno == errno.EINVAL


@pytest.mark.parametrize("count", [2, 1 << 32, U64, U64 // 24 + 1])
async def test_a_write_count_that_does_not_fit_is_refused(raw: RawClient, count: int) -> None:
    body = struct.pack("=Q", count) + wire.write_multi([(0, 0, b"once")])[8:]
    assert (await raw.call(wire.WRITE_MULTI, body)).errno == errno.EINVAL


async def test_one_write_has_at_most_eight_bytes(raw: RawClient) -> None:
    body = struct.pack("=QQII8s", 1, 0, 0, 9, b"12345678")
    assert (await raw.call(wire.WRITE_MULTI, body)).errno == errno.EINVAL


# "VFIO_USER_DEVICE_RESET"


async def test_reset_brings_registers_and_configuration_space_back(raw: RawClient) -> None:
    await raw.call(wire.REGION_WRITE, wire.region_write(0, 0, b"gone"))
    await raw.call(wire.REGION_WRITE, wire.region_write(wire.CONFIG, 4, wire.BUS_MASTER))
    assert (await raw.call(wire.RESET)).ok == b""
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok[16:] == bytes(4)
    assert (await raw.call(wire.REGION_READ, wire.region_read(wire.CONFIG, 4, 2))).ok[16:] == bytes(2)


async def test_a_full_bar_probe_gives_the_size_mask(raw: RawClient) -> None:
    for index, mask in ((0, 0xFFFFF000), (1, 0xFFFFF000), (2, 0), (5, 0)):
        place = 0x10 + 4 * index
        await raw.call(wire.REGION_WRITE, wire.region_write(wire.CONFIG, place, b"\xff" * 4))
        reply = (await raw.call(wire.REGION_READ, wire.region_read(wire.CONFIG, place, 4))).ok
        assert struct.unpack("=I", reply[16:]) == (mask,)
