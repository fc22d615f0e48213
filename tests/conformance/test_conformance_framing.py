# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "Header", "Command Concurrency"; how bytes and file descriptors become messages."""

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from conformance import wire
from conformance.engines import Served
from conformance.raw import RawClient, connect

EVENTFD = wire.DATA_EVENTFD | wire.TRIGGER
SIZE_LIMIT = (1 << 20) + 4096


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


async def fires(raw: RawClient, fd: int, index: int = wire.INTX) -> bool:
    """Whether the server has this eventfd for vector 0 of the index."""
    await raw.call(wire.SET_IRQS, wire.set_irqs(index, wire.DATA_NONE | wire.TRIGGER, 0, 1))
    try:
        return os.eventfd_read(fd) == 1
    except BlockingIOError:
        return False


async def send_slowly(raw: RawClient, pieces: Sequence[bytes]) -> None:
    for piece in pieces:
        await raw.send(piece)
        await raw.taken()


# Messages in pieces


async def test_a_message_may_come_byte_by_byte(raw: RawClient) -> None:
    request = wire.message(wire.REGION_WRITE, wire.region_write(0, 0, b"slow"))
    await send_slowly(raw, [bytes([byte]) for byte in request])
    assert (await raw.receive()).ok
    assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4))).ok[16:] == b"slow"


@pytest.mark.parametrize("cut", [1, 8, 15, 16, 17, 31, 32, 33, 35])
async def test_a_message_may_come_in_two_parts(raw: RawClient, cut: int) -> None:
    request = wire.message(wire.REGION_WRITE, wire.region_write(0, 0, b"part"))
    await send_slowly(raw, [request[:cut], request[cut:]])
    assert (await raw.receive()).ok


async def test_many_messages_may_come_in_one_send(raw: RawClient) -> None:
    count = 500
    requests = [wire.message(wire.REGION_READ, wire.region_read(0, 0, 8), message_id=i) for i in range(count)]
    await raw.send(b"".join(requests))
    assert [(await raw.receive()).message_id for _ in range(count)] == list(range(count))


async def test_replies_come_in_the_order_of_the_commands(raw: RawClient) -> None:
    commands = [wire.REGION_READ, wire.GET_INFO, wire.REGION_WRITE, 99, wire.RESET, wire.REGION_READ]
    requests = [wire.message(number, wire.VALID.get(number, b"")) for number in commands]
    await raw.send(b"".join(requests))
    assert [(await raw.receive()).command for _ in commands] == commands


@pytest.mark.parametrize("cut", range(1, 64, 3))
async def test_messages_that_are_cut_anywhere_are_joined_again(raw: RawClient, cut: int) -> None:
    data = wire.message(wire.REGION_WRITE, wire.region_write(0, 0, b"12345678"))
    data += wire.message(wire.REGION_READ, wire.region_read(0, 0, 8), message_id=2)
    data += wire.message(wire.GET_INFO, wire.get_info(), message_id=3)
    await send_slowly(raw, [data[i : i + cut] for i in range(0, len(data), cut)])
    answers = [await raw.receive() for _ in range(3)]
    assert [answer.command for answer in answers] == [wire.REGION_WRITE, wire.REGION_READ, wire.GET_INFO]
    assert answers[1].ok[16:] == b"12345678"


async def test_a_huge_message_that_is_refused_does_not_disturb_the_next_one(raw: RawClient) -> None:
    body = wire.region_write(0, 0, bytes(1 << 20))
    assert (await raw.call(wire.REGION_WRITE, body)).errno == errno.EINVAL
    await raw.send(wire.message(99, bytes(SIZE_LIMIT - 16)) + wire.message(wire.GET_INFO, wire.get_info()))
    assert (await raw.receive()).errno in (errno.ENOSYS, errno.EINVAL)
    assert (await raw.receive()).ok


@pytest.mark.parametrize("size", [0, 1, 15, SIZE_LIMIT + 1, 1 << 31, 0xFFFFFFFF])
async def test_a_size_that_cannot_be_ends_the_connection(raw: RawClient, size: int) -> None:
    await raw.send(wire.HEADER.pack(1, wire.GET_INFO, size, 0, 0) + wire.get_info())
    await raw.expect_closed()


async def test_what_came_before_a_broken_header_is_answered(raw: RawClient) -> None:
    broken = wire.HEADER.pack(2, wire.GET_INFO, 3, 0, 0)
    good = wire.message(wire.GET_INFO, wire.get_info(), message_id=1)
    read = wire.message(wire.REGION_READ, wire.region_read(0, 0, 4), message_id=5)
    await raw.send(good + read + broken)
    assert [(await raw.receive()).message_id for _ in range(2)] == [1, 5]
    await raw.expect_closed()


async def test_the_next_client_is_welcome_after_a_broken_header(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        await raw.send(bytes(16))
        await raw.expect_closed()
    async with connect(scratch.path) as raw:
        await raw.expect_alive()


# File descriptors


@pytest.mark.parametrize("place", range(0, 36, 5))
async def test_a_descriptor_may_come_with_any_byte_of_its_message(raw: RawClient, place: int) -> None:
    request = wire.message(wire.SET_IRQS, wire.set_irqs(wire.INTX, EVENTFD, 0, 1))
    with eventfds(1) as fds:
        if place:
            await raw.send(request[:place])
            await raw.taken()
        await raw.send(request[place : place + 1], fds)
        await raw.taken()
        await raw.send(request[place + 1 :])
        assert (await raw.receive()).ok == b""
        assert await fires(raw, fds[0])


async def test_descriptors_may_come_in_two_parts(raw: RawClient) -> None:
    """An eventfd with the header, a second one with the body."""
    request = wire.message(wire.DMA_MAP, wire.dma_map(0x1000, 0x1000))
    with eventfds(2) as fds:
        await raw.send(request[:16], fds[:1])
        await raw.taken()
        await raw.send(request[16:], fds[1:])
        assert (await raw.receive()).errno == errno.EINVAL
    await raw.expect_alive()


async def test_a_descriptor_in_a_batch_goes_to_the_message_that_takes_one(raw: RawClient) -> None:
    before = wire.message(wire.GET_INFO, wire.get_info(), message_id=1)
    taker = wire.message(wire.SET_IRQS, wire.set_irqs(wire.INTX, EVENTFD, 0, 1), message_id=2)
    after = wire.message(wire.REGION_READ, wire.region_read(0, 0, 4), message_id=3)
    with eventfds(1) as fds:
        await raw.send(before)
        await raw.send(taker + after, fds)
        assert [bool((await raw.receive()).ok) for _ in range(3)] == [True, False, True]
        assert await fires(raw, fds[0])


async def test_two_messages_with_a_descriptor_each_keep_them_apart(raw: RawClient) -> None:
    with eventfds(2) as fds:
        for index, fd in zip((wire.INTX, wire.MSI), fds, strict=True):
            await raw.command(wire.SET_IRQS, wire.set_irqs(index, EVENTFD, 0, 1), fds=[fd])
        for _ in fds:
            assert (await raw.receive()).ok == b""
        assert await fires(raw, fds[1], wire.MSI)
        assert await fires(raw, fds[0], wire.INTX)


@pytest.mark.parametrize("command", [*wire.VALID, *wire.MIGRATION, wire.VERSION, wire.DMA_READ, 99])
async def test_more_descriptors_than_a_command_takes_are_closed_and_refused(
    raw: RawClient, command: int
) -> None:
    """The fixture finds a descriptor that is not closed."""
    body = {**wire.VALID, **wire.MIGRATION}.get(command, b"")
    with eventfds(3) as fds:
        answer = await raw.call(command, body, fds=fds)
    assert answer.errno in (errno.EINVAL, errno.ENOSYS)
    await raw.expect_alive()


@pytest.mark.parametrize("command", [wire.GET_INFO, wire.SET_IRQS, wire.DMA_MAP, 99])
async def test_descriptors_of_a_command_without_reply_are_closed(raw: RawClient, command: int) -> None:
    with eventfds(3) as fds:
        await raw.command(command, b"", flags=wire.NO_REPLY, fds=fds)
    await raw.expect_alive()


async def test_descriptors_beside_a_reply_are_closed(raw: RawClient) -> None:
    with eventfds(2) as fds:
        await raw.send(wire.message(wire.DMA_READ, bytes(16), flags=wire.REPLY), fds)
    await raw.expect_alive()


async def test_as_many_descriptors_as_the_kernel_sends_are_closed(scratch: Served) -> None:
    with eventfds(253) as fds:
        async with connect(scratch.path) as raw:
            await raw.command(wire.GET_INFO, wire.get_info(), fds=fds)
            assert (await raw.receive()).errno == errno.EINVAL
            await raw.expect_alive()


async def test_more_than_our_max_msg_fds_are_refused(raw: RawClient) -> None:
    body = wire.set_irqs(wire.MSIX, EVENTFD, 0, 17)
    with eventfds(17) as fds:
        assert (await raw.call(wire.SET_IRQS, body, fds=fds)).errno == errno.EINVAL


async def test_descriptors_of_a_message_that_never_ends_are_closed(scratch: Served) -> None:
    request = wire.message(wire.SET_IRQS, wire.set_irqs(wire.INTX, EVENTFD, 0, 1))
    for length in (1, 15, 16, 20, len(request) - 1):
        async with connect(scratch.path) as raw:
            with eventfds(1) as fds:
                await raw.send(request[:length], fds)


async def test_descriptors_before_a_broken_header_are_closed(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        with eventfds(2) as fds:
            await raw.send(struct.pack("=HHIII", 1, wire.SET_IRQS, 3, 0, 0), fds)
        await raw.expect_closed()
