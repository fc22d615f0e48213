# SPDX-License-Identifier: BSD-3-Clause
"""Specification: "VFIO_USER_DEVICE_GET_IRQ_INFO", "VFIO_USER_DEVICE_SET_IRQS"; linux/vfio.h."""

import errno
import os
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import pytest
import trio

from conformance import wire
from conformance.driving import switch_interrupts, write_word
from conformance.engines import Serve, Served
from conformance.models import Vectors
from conformance.patience import in_time
from conformance.raw import RawClient, connect
from conformance.wire import DATA_BOOL, DATA_EVENTFD, DATA_NONE, INTX, MASK, MSI, MSIX, TRIGGER, UNMASK

LEVEL, NOTIFY = 0, 4


@pytest.fixture
def vectors(serve: Serve) -> Served:
    return serve(Vectors)


@pytest.fixture
async def board(vectors: Served) -> AsyncIterator[RawClient]:
    """A client of a device with INTx, 4 MSI and 8 MSI-X vectors."""
    async with connect(vectors.path) as raw:
        yield raw


@contextmanager
def eventfds(count: int = 1, flags: int = os.EFD_NONBLOCK) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_CLOEXEC | flags) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def take(fd: int) -> int:
    """The count of an eventfd, which is 0 afterwards."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def counts(fds: Sequence[int]) -> list[int]:
    return [take(fd) for fd in fds]


async def set_irqs(
    raw: RawClient,
    index: int,
    flags: int,
    start: int = 0,
    count: int = 1,
    *,
    data: bytes = b"",
    fds: Sequence[int] = (),
) -> None:
    body = wire.set_irqs(index, flags, start, count, data)
    assert (await raw.call(wire.SET_IRQS, body, fds=fds)).ok == b""


async def enable(raw: RawClient, index: int, fds: Sequence[int], start: int = 0) -> None:
    """Begin to use vectors, as a driver and its VMM do."""
    if index != INTX:
        await switch_interrupts(raw, index, True)
    await set_irqs(raw, index, DATA_EVENTFD | TRIGGER, start, len(fds), fds=fds)


async def disable(raw: RawClient, index: int) -> None:
    await switch_interrupts(raw, index, False)
    await set_irqs(raw, index, DATA_NONE | TRIGGER, 0, 0)


async def signalled(fd: int) -> int:
    with in_time():
        await trio.lowlevel.wait_readable(fd)
    return take(fd)


# DEVICE_GET_IRQ_INFO

EVENTFD, MASKABLE, AUTOMASKED, NORESIZE = 1, 2, 4, 8


@pytest.mark.parametrize(
    ("index", "count", "flags"),
    [(INTX, 1, EVENTFD | MASKABLE | AUTOMASKED), (MSI, 4, EVENTFD), (MSIX, 8, EVENTFD), (3, 0, 0), (4, 0, 0)],
)
async def test_irq_info(board: RawClient, index: int, count: int, flags: int) -> None:
    reply = (await board.call(wire.GET_IRQ_INFO, wire.get_irq_info(index))).ok
    argsz, found, answered, vectors = struct.unpack("=IIII", reply)
    assert (argsz, answered, vectors) == (16, index, count)
    assert found & flags == flags


# INTx


async def test_intx_masks_itself_and_fires_again_on_unmask_while_the_level_is_high(board: RawClient) -> None:
    with eventfds() as fds:
        await enable(board, INTX, fds)
        await write_word(board, LEVEL, 1)
        await write_word(board, LEVEL, 0)
        await write_word(board, LEVEL, 1)
        assert counts(fds) == [1], "masked since the first"
        await set_irqs(board, INTX, DATA_NONE | UNMASK)
        assert counts(fds) == [1], "the level is still high"
        await write_word(board, LEVEL, 0)
        await set_irqs(board, INTX, DATA_NONE | UNMASK)
        assert counts(fds) == [0]
        await write_word(board, LEVEL, 1)
        assert counts(fds) == [1]


async def test_intx_is_unmasked_by_its_resample_eventfd(board: RawClient) -> None:
    with eventfds(2) as fds:
        await enable(board, INTX, fds[:1])
        await set_irqs(board, INTX, DATA_EVENTFD | UNMASK, fds=fds[1:])
        await write_word(board, LEVEL, 1)
        for _ in range(3):
            assert await signalled(fds[0]) == 1
            os.eventfd_write(fds[1], 1)
        assert await signalled(fds[0]) == 1
        await write_word(board, LEVEL, 0)
        os.eventfd_write(fds[1], 1)
        await board.expect_alive()
        assert counts(fds) == [0, 0]


async def test_intx_is_masked_by_a_mask_eventfd(board: RawClient) -> None:
    with eventfds(2) as fds:
        await enable(board, INTX, fds[:1])
        await set_irqs(board, INTX, DATA_EVENTFD | MASK, fds=fds[1:])
        os.eventfd_write(fds[1], 1)
        with in_time():
            while take(fds[1]):
                os.eventfd_write(fds[1], 1)
                await board.expect_alive()
        await write_word(board, LEVEL, 1)
        assert counts(fds) == [0, 0]


async def test_a_resample_eventfd_can_be_taken_away(board: RawClient) -> None:
    with eventfds(2) as fds:
        await enable(board, INTX, fds[:1])
        await set_irqs(board, INTX, DATA_EVENTFD | UNMASK, fds=fds[1:])
        await set_irqs(board, INTX, DATA_EVENTFD | UNMASK)
        await write_word(board, LEVEL, 1)
        os.eventfd_write(fds[1], 1)
        await board.expect_alive()
        assert counts(fds) == [1, 1], "nobody has read it"


async def test_intx_that_is_masked_fires_when_it_is_unmasked(board: RawClient) -> None:
    with eventfds() as fds:
        await enable(board, INTX, fds)
        await set_irqs(board, INTX, DATA_NONE | MASK)
        await write_word(board, LEVEL, 1)
        assert counts(fds) == [0]
        await set_irqs(board, INTX, DATA_NONE | UNMASK)
        assert counts(fds) == [1]


async def test_a_level_that_was_high_before_fires_when_an_eventfd_is_given(board: RawClient) -> None:
    await write_word(board, LEVEL, 1)
    with eventfds() as fds:
        await enable(board, INTX, fds)
        await board.expect_alive()
        assert counts(fds) == [1]


async def test_the_next_client_gets_the_interrupt_of_a_level_that_is_high(vectors: Served) -> None:
    with eventfds(2) as fds:
        async with connect(vectors.path) as raw:
            await enable(raw, INTX, fds[:1])
            await write_word(raw, LEVEL, 1)
            assert counts(fds) == [1, 0]
        async with connect(vectors.path) as raw:
            await enable(raw, INTX, fds[1:])
            await write_word(raw, 8, 0)  # it begins to use the device
            assert counts(fds) == [0, 1], "the mask belonged to the first connection"


# MSI and MSI-X


@pytest.mark.parametrize(("index", "count"), [(MSI, 4), (MSIX, 8)])
async def test_each_vector_has_its_eventfd(board: RawClient, index: int, count: int) -> None:
    with eventfds(count) as fds:
        await enable(board, index, fds)
        for vector in (0, count - 1, 1, 1):
            await write_word(board, NOTIFY, vector)
        assert counts(fds) == [1, 2, *[0] * (count - 3), 1]


async def test_msi_and_msix_are_kept_apart(board: RawClient) -> None:
    with eventfds(4) as msi, eventfds(8) as msix:
        await enable(board, MSI, msi)
        await enable(board, MSIX, msix)
        await write_word(board, NOTIFY, 1)
        assert (counts(msi), counts(msix)) == ([0] * 4, [0, 1, *[0] * 6])
        await disable(board, MSIX)
        await write_word(board, NOTIFY, 1)
        assert (counts(msi), counts(msix)) == ([0, 1, 0, 0], [0] * 8)


@pytest.mark.parametrize("index", [MSI, MSIX])
async def test_vectors_are_used_by_a_client_that_never_writes_the_configuration_space(
    board: RawClient, index: int
) -> None:
    with eventfds(2) as fds:
        await set_irqs(board, index, DATA_EVENTFD | TRIGGER, 0, 2, fds=fds)
        await write_word(board, NOTIFY, 1)
        assert counts(fds) == [0, 1]


async def test_disabling_one_vector_disables_that_one(board: RawClient) -> None:
    with eventfds(8) as fds:
        await enable(board, MSIX, fds)
        await set_irqs(board, MSIX, DATA_EVENTFD | TRIGGER, 3, 1)
        for vector in range(8):
            await write_word(board, NOTIFY, vector)
        assert counts(fds) == [1, 1, 1, 0, 1, 1, 1, 1]
        await enable(board, MSIX, fds[3:4], 3)
        assert counts(fds) == [0, 0, 0, 1, 0, 0, 0, 0], "it was pending"


async def test_count_zero_disables_the_index(board: RawClient) -> None:
    with eventfds(8) as fds:
        await enable(board, MSIX, fds)
        await set_irqs(board, MSIX, DATA_NONE | TRIGGER, 0, 0)
        body = wire.set_irqs(MSIX, DATA_NONE | TRIGGER, 0, 8)
        assert (await board.call(wire.SET_IRQS, body)).errno == errno.EINVAL, "no eventfd to trigger"
        assert counts(fds) == [0] * 8


async def test_a_new_eventfd_takes_the_place_of_the_old(board: RawClient) -> None:
    with eventfds(2) as fds:
        await enable(board, MSIX, fds[:1], 5)
        await enable(board, MSIX, fds[1:], 5)
        await write_word(board, NOTIFY, 5)
        assert counts(fds) == [0, 1]


async def test_vectors_can_be_added_to_those_in_use(board: RawClient) -> None:
    with eventfds(8) as fds:
        await enable(board, MSIX, fds[:2])
        await enable(board, MSIX, fds[2:], 2)
        await set_irqs(board, MSIX, DATA_NONE | TRIGGER, 0, 8)
        assert counts(fds) == [1] * 8


async def test_a_masked_vector_is_pending_and_fires_once_when_unmasked(board: RawClient) -> None:
    with eventfds(8) as fds:
        await enable(board, MSIX, fds)
        await set_irqs(board, MSIX, DATA_NONE | MASK, 2, 2)
        for vector in (2, 2, 4):
            await write_word(board, NOTIFY, vector)
        assert counts(fds) == [0, 0, 0, 0, 1, 0, 0, 0]
        await set_irqs(board, MSIX, DATA_NONE | UNMASK, 0, 8)
        assert counts(fds) == [0, 0, 1, 0, 0, 0, 0, 0]


async def test_booleans_choose_the_vectors(board: RawClient) -> None:
    with eventfds(8) as fds:
        await enable(board, MSIX, fds)
        await set_irqs(board, MSIX, DATA_BOOL | TRIGGER, 1, 4, data=b"\1\0\xff\0")
        assert counts(fds) == [0, 1, 0, 1, 0, 0, 0, 0]
        await set_irqs(board, MSIX, DATA_BOOL | MASK, 0, 2, data=b"\0\1")
        for vector in range(2):
            await write_word(board, NOTIFY, vector)
        assert counts(fds[:2]) == [1, 0]


async def test_one_eventfd_may_serve_several_vectors(board: RawClient) -> None:
    with eventfds() as fds:
        await enable(board, MSIX, fds * 8)
        for vector in range(8):
            await write_word(board, NOTIFY, vector)
        assert counts(fds) == [8]


# What a client may get wrong

U32 = 0xFFFFFFFF
BAD = {
    "index": (5, DATA_NONE | TRIGGER, 0, 1, 0),
    "index of all bits": (U32, DATA_NONE | TRIGGER, 0, 0, 0),
    "start": (MSIX, DATA_EVENTFD | TRIGGER, 8, 1, 1),
    "count": (MSIX, DATA_EVENTFD | TRIGGER, 0, 9, 9),
    "start and count": (MSIX, DATA_NONE | MASK, 7, 2, 0),
    "wrap": (MSIX, DATA_NONE | MASK, 2, U32, 0),
    "start of all bits": (MSIX, DATA_NONE | MASK, U32, 1, 0),
    "index without vectors": (wire.ERR, DATA_EVENTFD | TRIGGER, 0, 1, 1),
    "no data flag": (MSIX, TRIGGER, 0, 1, 0),
    "two data flags": (MSIX, DATA_NONE | DATA_EVENTFD | TRIGGER, 0, 1, 0),
    "no action": (MSIX, DATA_NONE, 0, 1, 0),
    "two actions": (MSIX, DATA_NONE | MASK | UNMASK, 0, 1, 0),
    "unknown flag": (MSIX, DATA_NONE | MASK | 1 << 6, 0, 1, 0),
    "no flags": (MSIX, 0, 0, 1, 0),
    "fewer descriptors": (MSIX, DATA_EVENTFD | TRIGGER, 0, 3, 2),
    "more descriptors": (MSIX, DATA_EVENTFD | TRIGGER, 0, 1, 2),
    "descriptors without the flag": (MSIX, DATA_NONE | TRIGGER, 0, 1, 1),
    "count 0 with descriptors": (MSIX, DATA_EVENTFD | TRIGGER, 0, 0, 1),
    "count 0, mask": (MSIX, DATA_NONE | MASK, 0, 0, 0),
    "count 0 from 1 on": (MSIX, DATA_NONE | TRIGGER, 1, 0, 0),
    "booleans missing": (MSIX, DATA_BOOL | TRIGGER, 0, 8, 0),
    "very many booleans missing": (MSIX, DATA_BOOL | TRIGGER, 0, U32, 0),
}


@pytest.mark.parametrize(("index", "flags", "start", "count", "extra"), BAD.values(), ids=BAD.keys())
async def test_a_request_that_cannot_be_is_refused_and_changes_nothing(
    board: RawClient, index: int, flags: int, start: int, count: int, extra: int
) -> None:
    with eventfds(8) as fds, eventfds(9) as others:
        await enable(board, MSIX, fds)
        body = wire.set_irqs(index, flags, start, count)
        assert (await board.call(wire.SET_IRQS, body, fds=others[:extra])).errno == errno.EINVAL
        for vector in range(8):
            await write_word(board, NOTIFY, vector)
        assert counts(fds) == [1] * 8
        assert counts(others) == [0] * 9


async def test_a_descriptor_that_is_no_eventfd_is_refused(board: RawClient) -> None:
    body = wire.set_irqs(MSIX, DATA_EVENTFD | TRIGGER, 0, 2)
    pipe = os.pipe()
    try:
        with eventfds() as fds:
            answer = await board.call(wire.SET_IRQS, body, fds=[fds[0], pipe[1]])
            assert answer.errno == errno.EINVAL
    finally:
        for fd in pipe:
            os.close(fd)


async def test_an_eventfd_that_is_full_does_not_hold_the_server_up(board: RawClient) -> None:
    with eventfds(flags=0) as fds:
        await enable(board, MSIX, fds)
        os.eventfd_write(fds[0], (1 << 64) - 2)
        for _ in range(3):
            await write_word(board, NOTIFY, 0)
        await board.expect_alive()


async def test_a_client_that_reads_the_resample_eventfd_first_does_not_hold_the_server_up(
    board: RawClient,
) -> None:
    with eventfds() as fds, eventfds(flags=0) as resample:
        await enable(board, INTX, fds)
        await set_irqs(board, INTX, DATA_EVENTFD | UNMASK, fds=resample)
        for _ in range(100):
            os.eventfd_write(resample[0], 1)
            os.eventfd_read(resample[0])
            await board.expect_alive()
