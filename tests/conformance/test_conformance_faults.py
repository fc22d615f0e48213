# SPDX-License-Identifier: BSD-3-Clause
"""Device models that fail: the client gets EIO, the log the traceback, and the server goes on."""

import errno
import os

import pytest
import trio

from conformance import wire
from conformance.driving import (
    PAGE,
    enable_bus_master,
    map_private,
    post,
    read_word,
    switch_interrupts,
    write_word,
)
from conformance.engines import Serve, Served
from conformance.models import Nonsense
from conformance.patience import in_time
from conformance.raw import RawClient, connect
from vfio_user.device_models.faulty import (
    CANCEL_ITSELF,
    DMA_READ,
    DMA_WRITE,
    ENDLESS,
    RAISE,
    STORM,
    STORM_INTX,
    STORM_MSI,
    Faulty,
)

WORD, RAISES, WRONG_SIZE, START, ADDRESS, LENGTH = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x18
DONE, DMA_ERRORS, TURNS, STOP, TIMER_RAISES = 0x1C, 0x20, 0x24, 0x28, 0x2C


async def expect_io_error(raw: RawClient, command: int, body: bytes = b"") -> None:
    assert (await raw.call(command, body)).errno == errno.EIO
    await raw.expect_alive()


async def logged(served: Served, text: str, times: int = 1) -> None:
    """Wait until the server has logged it."""
    with in_time():
        while served.log().count(text) < times:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


async def count(raw: RawClient, register: int, least: int) -> None:
    """Wait until a counting register has reached a number."""
    with in_time():
        while await read_word(raw, register) < least:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("size", [4, 8])
async def test_a_handler_that_raises(faulty: Served, warm: bool, size: int) -> None:
    async with connect(faulty.path) as raw:
        if warm:
            assert await read_word(raw, WORD) == 0
        await expect_io_error(raw, wire.REGION_READ, wire.region_read(0, RAISES, size))
        await expect_io_error(raw, wire.REGION_WRITE, wire.region_write(0, RAISES, bytes(size)))
        await write_word(raw, WORD, 7)
        assert await read_word(raw, WORD) == 7
    assert faulty.log().count("Traceback") == 2
    assert "fails on demand" in faulty.log()


async def test_a_handler_that_raises_in_one_of_several_writes(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        await expect_io_error(raw, wire.WRITE_MULTI, wire.write_multi([(0, RAISES, bytes(4))]))
    assert faulty.log().count("Traceback") == 1


async def test_a_posted_write_that_raises_is_not_answered(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        for _ in range(3):
            await post(raw, RAISES, bytes(4))
        assert await read_word(raw, WORD) == 0


async def test_the_rest_of_a_batch_is_served(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        places = [WORD, RAISES, WORD, RAISES, RAISES, WORD]
        reads = [wire.message(wire.REGION_READ, wire.region_read(0, place, 4)) for place in places]
        await raw.send(b"".join(reads))
        answers = [await raw.receive() for _ in places]
        assert [answer.error for answer in answers] == [0, 5, 0, 5, 5, 0]


@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
async def test_a_read_that_gives_a_wrong_number_of_bytes(faulty: Served, warm: bool) -> None:
    async with connect(faulty.path) as raw:
        if warm:
            assert await read_word(raw, WORD) == 0
        for size in (4, 8, 1):
            await expect_io_error(raw, wire.REGION_READ, wire.region_read(0, WRONG_SIZE, size))


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
async def test_a_read_that_gives_nonsense(serve: Serve, place: int, warm: bool) -> None:
    async with connect(serve(Nonsense).path) as raw:
        if warm:
            assert await read_word(raw, 0, region=1) == 0
        await expect_io_error(raw, wire.REGION_READ, wire.region_read(0, 8 * place, 4))
        await expect_io_error(raw, wire.REGION_READ, wire.region_read(0, 8 * place, 4097))
        await expect_io_error(raw, wire.REGION_WRITE, wire.region_write(0, 8 * place, b"x"))


async def test_a_task_that_raises(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        for _ in range(3):
            await write_word(raw, START, RAISE)
            await raw.expect_alive()
            await raw.expect_alive()
        await logged(faulty, "a task fails on demand")
    assert "Traceback" in faulty.log()


async def test_a_timer_that_raises(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        for _ in range(3):
            await write_word(raw, TIMER_RAISES, 1)
        await write_word(raw, START, CANCEL_ITSELF)
        await count(raw, DONE, 1)
        await logged(faulty, "timer of the device failed", 3)
    lines = faulty.log().splitlines()
    assert [line for line in lines if line.startswith(("ERROR", "WARNING", "Traceback"))] == [
        "ERROR vfio_user.device_models.host: a timer of the device failed: a timer fails on demand",
        "Traceback (most recent call last):",
    ] * 3


@pytest.mark.parametrize("number", range(5))
async def test_a_task_that_breaks_every_rule(serve: Serve, number: int) -> None:
    """It is cut by a reset, by the end of its client, and by the end of the server."""
    served = serve(Nonsense)
    for _ in range(2):
        async with connect(served.path) as raw:
            await write_word(raw, 0, number, region=1)
            for _ in range(3):
                await raw.expect_alive()
            assert (await raw.call(wire.RESET)).ok == b""
            await write_word(raw, 0, number, region=1)
            await raw.expect_alive()
    async with connect(served.path) as raw:
        await raw.expect_alive()
        with in_time():
            while "Traceback" not in served.log():
                await write_word(raw, 0, number, region=1)
                await trio.sleep(0.002)  # a server that is never idle need not have begun it
                assert (await raw.call(wire.RESET)).ok == b""


async def test_an_endless_task_does_not_keep_the_client_waiting(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        await write_word(raw, START, ENDLESS)
        for _ in range(20):
            turns = await read_word(raw, TURNS)
            await count(raw, TURNS, turns + 1)
        await write_word(raw, STOP, 0)
        turns = await read_word(raw, TURNS)
        await raw.expect_alive()
        assert await read_word(raw, TURNS) == turns


async def test_an_endless_task_rests_while_there_is_no_client(faulty: Served) -> None:
    async with connect(faulty.path) as raw:
        await write_word(raw, START, ENDLESS)
        await count(raw, TURNS, 10)
    before = os.times()
    await trio.sleep(0.1)
    after = os.times()
    assert after.user - before.user < 0.08
    async with connect(faulty.path) as raw:
        turns = await read_word(raw, TURNS)
        await count(raw, TURNS, turns + 10)
        await write_word(raw, STOP, 0)


@pytest.mark.parametrize("start", [DMA_READ, DMA_WRITE])
@pytest.mark.parametrize(
    ("address", "length"), [((1 << 64) - 8, 16), (0x10000, 4), (PAGE - 2, 4), (0, 0xFFFFFFFF), (1 << 63, 1)]
)
async def test_dma_to_where_nothing_is(faulty: Served, start: int, address: int, length: int) -> None:
    async with connect(faulty.path) as raw:
        await map_private(raw, 0, PAGE)
        await enable_bus_master(raw)
        await post(raw, ADDRESS, address.to_bytes(8, "little"))
        await post(raw, LENGTH, length.to_bytes(4, "little"))
        await post(raw, START, start.to_bytes(4, "little"))
        while True:  # what is mapped of the range may have been asked for
            await raw.command(wire.REGION_READ, wire.region_read(0, DMA_ERRORS, 4))
            while (message := await raw.receive()).command != wire.REGION_READ:
                await raw.answer(message, wire.dma_write_reply(*wire_range(message.body)))
            if message.ok[16:] == b"\1\0\0\0":
                break
        assert await read_word(raw, DONE) == 0


def wire_range(body: bytes) -> tuple[int, int]:
    return int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")


@pytest.mark.parametrize(("start", "index"), [(STORM_INTX, wire.INTX), (STORM_MSI, wire.MSI)])
async def test_an_interrupt_storm(faulty: Served, start: int, index: int) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        async with connect(faulty.path) as raw:
            body = wire.set_irqs(index, wire.DATA_EVENTFD | wire.TRIGGER, 0, 1)
            assert (await raw.call(wire.SET_IRQS, body, fds=[event])).ok == b""
            if index != wire.INTX:
                await switch_interrupts(raw, index, True)
            await write_word(raw, START, start)
            await count(raw, DONE, 1)
        assert os.eventfd_read(event) == (1 if index == wire.INTX else STORM)
    finally:
        os.close(event)


async def test_a_configuration_space_that_raises(serve: Serve) -> None:
    async with connect(serve(Faulty, "fail=region").path) as raw:
        await expect_io_error(raw, wire.REGION_READ, wire.region_read(0, WORD, 4))
        assert await read_word(raw, DONE) == 0


async def test_a_device_that_raises_when_unmasked(serve: Serve) -> None:
    """What the client asked for has been done: it gets no error."""
    served = serve(Faulty, "fail=unmask")
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        async with connect(served.path) as raw:
            body = wire.set_irqs(wire.MSIX, wire.DATA_EVENTFD | wire.TRIGGER, 0, 1)
            assert (await raw.call(wire.SET_IRQS, body, fds=[event])).ok == b""
            assert await read_word(raw, WORD) == 0
            body = wire.set_irqs(wire.MSIX, wire.DATA_NONE | wire.TRIGGER, 0, 1)
            assert (await raw.call(wire.SET_IRQS, body)).ok == b""
        assert os.eventfd_read(event) == 1
    finally:
        os.close(event)
    await logged(served, "unmask fails on demand")


async def test_a_device_whose_counters_raise(serve: Serve) -> None:
    served = serve(Faulty, "fail=counters")
    async with connect(served.path) as raw:
        assert await read_word(raw, WORD) == 0
    assert served.counted("clients_served") == 1, "the server's own figures are there"
    assert "counters fails on demand" in served.log()
