# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "Socket Disconnection Behavior": clients come, wait, leave, vanish, or do not read."""

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from conformance import wire
from conformance.driving import PAGE, enable_bus_master, read_word, write_word
from conformance.engines import Serve, Served
from conformance.holdings import expect_holdings, holdings
from conformance.models import Mappable, OneWay
from conformance.patience import in_time
from conformance.raw import Answer, RawClient, connect
from vfio_user.client.memory import GuestRam

MEGABYTE = 1 << 20


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Reconnect


async def test_the_device_keeps_its_state_for_the_next_client(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        await write_word(raw, 0x40, 0xCAFE)
        await enable_bus_master(raw)
    async with connect(scratch.path) as raw:
        assert await read_word(raw, 0x40) == 0xCAFE
        assert (await raw.call(wire.REGION_READ, wire.region_read(wire.CONFIG, 4, 2))).ok[16:] == (
            wire.BUS_MASTER
        )


async def test_memory_and_eventfds_go_with_their_client(scratch: Served) -> None:
    before = holdings(scratch.pid)
    with GuestRam() as ram, contextlib.ExitStack() as stack:
        memory = ram.add(0, 4 * PAGE)
        assert memory.fd is not None
        events = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
        for event in events:
            stack.callback(os.close, event)
        at_rest = holdings(scratch.pid)  # with ours, where it is this process
        async with connect(scratch.path) as raw:
            assert (await raw.call(wire.DMA_MAP, wire.dma_map(0, 4 * PAGE), fds=[memory.fd])).ok == b""
            for flags in (wire.DATA_EVENTFD | wire.TRIGGER, wire.DATA_EVENTFD | wire.UNMASK):
                body = wire.set_irqs(wire.INTX, flags, 0, 1)
                assert (await raw.call(wire.SET_IRQS, body, fds=[events[0]])).ok == b""
            assert sum(holdings(scratch.pid).values()) >= sum(at_rest.values()) + 3
        await expect_holdings(scratch.pid, at_rest)
        async with connect(scratch.path) as raw:
            assert (await raw.call(wire.DMA_UNMAP, wire.dma_unmap(0, 4 * PAGE))).errno
            assert (await raw.call(wire.DMA_MAP, wire.dma_map(0, 4 * PAGE))).ok == b""
    await expect_holdings(scratch.pid, before)


async def test_a_hundred_clients_one_after_another(scratch: Served) -> None:
    for i in range(100):
        async with connect(scratch.path) as raw:
            await write_word(raw, 0x10, i)
    assert scratch.counted("clients_served") == 100


async def test_the_negotiation_of_one_client_is_not_that_of_the_next(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        await raw.negotiate({"max_data_xfer_size": 16, "max_dma_maps": 1})
    async with connect(scratch.path) as raw:
        assert (await raw.call(wire.REGION_READ, wire.region_read(0, 0, 4096))).ok
        for i in range(3):
            assert (await raw.call(wire.DMA_MAP, wire.dma_map(i * PAGE, PAGE))).ok == b""


async def test_a_second_client_waits_until_the_first_has_left(scratch: Served) -> None:
    async with (
        connect(scratch.path) as first,
        connect(scratch.path, negotiated=False) as waiting,
    ):
        await waiting.command(wire.VERSION, wire.version({}))
        await first.expect_alive()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            os.read(waiting.socket.fileno(), 1)
        first.shut()
        assert (await waiting.receive()).ok
        await waiting.expect_alive()


async def test_a_client_that_left_while_it_waited_is_no_trouble(scratch: Served) -> None:
    async with connect(scratch.path) as first:
        for _ in range(3):
            async with connect(scratch.path, negotiated=False):
                pass
        await first.expect_alive()
    async with connect(scratch.path) as raw:
        await raw.expect_alive()


# Clients that vanish

SESSION = [
    (wire.VERSION, wire.version({})),
    (wire.DMA_MAP, wire.dma_map(0, 16 * PAGE)),
    (wire.GET_REGION_INFO, wire.get_region_info(0)),
    (wire.SET_IRQS, wire.set_irqs(wire.INTX, wire.DATA_EVENTFD | wire.TRIGGER, 0, 1)),
    (wire.REGION_WRITE, wire.region_write(wire.CONFIG, 4, wire.BUS_MASTER)),
    (wire.REGION_WRITE, wire.region_write(0, 0xFE0, struct.pack("<QQI", 0, PAGE, 64))),
    (wire.REGION_WRITE, wire.region_write(0, 0xFF8, bytes(4))),
    (wire.REGION_READ, wire.region_read(0, 0, 4096)),
    (wire.DMA_UNMAP, wire.dma_unmap(0, 16 * PAGE)),
    (wire.RESET, b""),
]
STREAM = b"".join(wire.message(command, body) for command, body in SESSION)


@pytest.mark.parametrize("answers", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("shared", [False, True], ids=["message", "mapped"])
async def test_a_client_may_vanish_after_any_byte(scratch: Served, shared: bool, answers: bool) -> None:
    """Each cut is followed by the next client at once; the fixture looks for what was left behind."""
    with GuestRam() as ram:
        memory = ram.add(0, 16 * PAGE)
        assert memory.fd is not None
        fds = [memory.fd] if shared else []
        map_at = len(wire.message(*SESSION[0]))
        for cut in range(1, len(STREAM), 7 if answers else 3):
            async with connect(scratch.path, negotiated=False) as raw:
                await raw.send(STREAM[: min(cut, map_at)])
                if cut > map_at:
                    # a header that is cut within its descriptors is test_conformance_framing's
                    await raw.send(STREAM[map_at:cut], fds if cut - map_at >= wire.HEADER.size else [])
                if answers and cut > map_at:
                    assert (await raw.receive()).ok
        async with connect(scratch.path) as raw:
            await raw.expect_alive()
            assert (await raw.call(wire.RESET)).ok == b""


async def test_a_client_that_stops_sending_is_over(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        raw.socket.shutdown(socket.SHUT_WR)
        await raw.expect_closed()
    async with connect(scratch.path) as raw:
        await raw.expect_alive()


async def test_a_client_that_stops_receiving_is_over(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        raw.socket.shutdown(socket.SHUT_RD)
        with pytest.raises(BrokenPipeError):
            await send_for_ever(raw)
    async with connect(scratch.path) as raw:
        await raw.expect_alive()


async def send_for_ever(raw: RawClient) -> None:
    while True:
        await raw.command(wire.GET_INFO, wire.get_info())


# Clients that do not read


async def send_all_it_takes(raw: RawClient, request: bytes, most: int) -> int:
    """Send until the server takes no more; how many requests it took, at most `most`."""
    for sent in range(most):
        with trio.move_on_after(0.25) as patience:
            await raw.socket.send(request)
        if patience.cancelled_caught:
            return sent
    return most


@pytest.mark.parametrize("count", [4096, 65536, MEGABYTE])
async def test_replies_that_nobody_reads_do_not_pile_up(serve: Serve, count: int) -> None:
    """A request of 32 bytes may ask for a megabyte: with 64 KiB of requests that would be 2 GiB."""
    served = serve(OneWay)
    requests = min(512 * MEGABYTE // count, 8192)
    async with connect(served.path) as raw:
        await raw.call(wire.REGION_READ, wire.region_read(2, 0, MEGABYTE))
        before = resident(served.pid)
        batch = wire.message(wire.REGION_READ, wire.region_read(2, 0, count)) * 512
        await send_all_it_takes(raw, batch, requests // 512 + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert resident(served.pid) - before < 48 * MEGABYTE
    async with connect(served.path) as raw:
        await raw.expect_alive()


async def test_a_client_that_reads_late_gets_every_reply(serve: Serve) -> None:
    total = 100
    async with connect(serve(OneWay).path) as raw:
        batch = [
            wire.message(wire.REGION_READ, wire.region_read(2, i, 65536), message_id=i) for i in range(total)
        ]
        batch.append(wire.message(wire.GET_INFO, wire.get_info(), message_id=total))
        await raw.send(b"".join(batch))
        await trio.testing.wait_all_tasks_blocked()
        assert [(await raw.receive()).message_id for _ in range(total + 1)] == list(range(total + 1))
        await raw.expect_alive()


async def test_descriptors_that_nobody_reads_do_not_pile_up(serve: Serve) -> None:
    served = serve(Mappable)
    request = wire.message(wire.GET_REGION_INFO, wire.get_region_info(0))
    async with connect(served.path) as raw:
        before = sum(holdings(served.pid).values())
        await send_all_it_takes(raw, request * 200, 50)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(holdings(served.pid).values()) - before < 100
    async with connect(served.path) as raw:
        await raw.expect_alive()


@contextlib.asynccontextmanager
async def stuffed(served: Served) -> AsyncIterator[RawClient]:
    """A client for whom more waits than the socket holds."""
    async with connect(served.path) as raw:
        batch = wire.message(wire.REGION_READ, wire.region_read(2, 0, MEGABYTE)) * 64
        await send_all_it_takes(raw, batch, 2)
        yield raw


async def test_who_does_not_read_does_not_hold_the_server_up(serve: Serve) -> None:
    served = serve(OneWay)
    async with stuffed(served) as raw:
        with in_time():
            assert await raw.socket.recv(1)  # it is in the middle of a reply
        assert served.counted("clients_served") == 1


async def test_who_does_not_read_may_leave_and_the_next_one_is_served(serve: Serve) -> None:
    served = serve(OneWay)
    for _ in range(3):
        async with stuffed(served):
            pass
    async with connect(served.path) as raw:
        await raw.expect_alive()


async def test_who_sends_a_broken_header_without_reading_is_dropped_once_it_reads(serve: Serve) -> None:
    """How many of its replies are still sent depends on what the socket held."""
    served = serve(OneWay)
    async with stuffed(served) as raw:
        await send_all_it_takes(raw, bytes(16), 1)
        replies: list[Answer] = []
        with pytest.raises((EOFError, ConnectionResetError)):
            await receive_all(raw, replies)
        assert 0 < len(replies) <= 128
        assert all(reply.ok for reply in replies)
    async with connect(served.path) as raw:
        await raw.expect_alive()


async def receive_all(raw: RawClient, replies: list[Answer]) -> None:
    while True:
        replies.append(await raw.receive())
