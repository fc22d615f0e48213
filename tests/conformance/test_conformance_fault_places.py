# SPDX-License-Identifier: BSD-3-Clause
"""A model whose callback raises, for each kind of callback: the client gets EIO, the log has the traceback,
and the next request works. Register accesses, tasks and timers are in test_conformance_faults.
"""

import errno

import pytest

from conformance import wire
from conformance.driving import read_word, write_word
from conformance.engines import Serve, Served
from conformance.models import Armed
from conformance.moving import (
    DEVICE_STATE,
    OFFSET,
    PENDING,
    REGION,
    SIZE,
    V1_RESUMING,
    V1_RUNNING,
    V1_SAVING,
    S,
    data_read,
    iterate,
    read_stream,
    resume_v1,
    set_state,
    set_v1,
    write_field,
    write_stream,
)
from conformance.raw import Answer, RawClient, connect, connect_next

WORD = 0
SAVING, RESTORING = ("save", "log", "take"), ("apply", "restored", "adopt")
"""Places of `Faulty`. What "load" raises is said of the state, which is refused: test_faulty_migration."""


def serve_armed(serve: Serve, place: str) -> Served:
    return serve(Armed, f"fail={place}-once", "memory=4K")


def expect_fault(served: Served, answer: Answer, place: str) -> None:
    assert answer.errno == errno.EIO
    assert served.log().count("Traceback") == 1
    assert f"{place} fails on demand" in served.log()


async def test_a_reset_that_raises(serve: Serve) -> None:
    served = serve_armed(serve, "reset")
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        expect_fault(served, await raw.call(wire.RESET), "reset")
        assert await read_word(raw, WORD) == 7
        assert (await raw.call(wire.RESET)).ok == b""
        assert await read_word(raw, WORD) == 0


async def test_a_write_to_the_configuration_space_that_raises(serve: Serve) -> None:
    served = serve_armed(serve, "config")
    body = wire.region_write(wire.CONFIG, wire.COMMAND_REGISTER, wire.BUS_MASTER)
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        expect_fault(served, await raw.call(wire.REGION_WRITE, body), "config")
        assert (await raw.call(wire.REGION_WRITE, body)).ok
        assert await read_word(raw, WORD) == 7


# v1


async def save_v1(raw: RawClient) -> Answer:
    """Begin to save, and read up to the first error."""
    answer = await write_field(raw, DEVICE_STATE, V1_SAVING)
    for field in (PENDING, OFFSET, SIZE):
        if not answer.error:
            answer = await raw.call(wire.REGION_READ, wire.region_read(REGION, *field))
    return answer


@pytest.mark.parametrize("place", [*SAVING, "pending"])
async def test_saving_by_v1_that_raises(serve: Serve, place: str) -> None:
    served = serve_armed(serve, place)
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        expect_fault(served, await save_v1(raw), place)
        await set_v1(raw, V1_RUNNING)
        assert await read_word(raw, WORD) == 7
        await set_v1(raw, V1_SAVING)
        assert await iterate(raw)


@pytest.mark.parametrize("place", RESTORING)
async def test_restoring_by_v1_that_raises(serve: Serve, place: str) -> None:
    served = serve_armed(serve, place)
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        await set_v1(raw, V1_SAVING)
        parts = await iterate(raw)
        await set_v1(raw, V1_RUNNING)
        await write_word(raw, WORD, 8)
        await set_v1(raw, V1_RESUMING)
        await resume_v1(raw, parts)
        expect_fault(served, await write_field(raw, DEVICE_STATE, V1_RUNNING), place)
        await raw.expect_alive()
    async with connect_next(served.path) as raw:
        assert await read_word(raw, WORD) == 8
        await set_v1(raw, V1_RESUMING)
        await resume_v1(raw, parts)
        await set_v1(raw, V1_RUNNING)
        assert await read_word(raw, WORD) == 7


# v2


async def save_v2(raw: RawClient) -> Answer:
    answer = await set_state(raw, S.STOP_COPY)
    return answer if answer.error else await data_read(raw, 10_000)


@pytest.mark.parametrize("place", SAVING)
async def test_saving_by_v2_that_raises(serve: Serve, place: str) -> None:
    served = serve_armed(serve, place)
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        expect_fault(served, await save_v2(raw), place)
        assert (await set_state(raw, S.RUNNING)).ok
        assert await read_word(raw, WORD) == 7
        assert (await set_state(raw, S.STOP_COPY)).ok
        assert await read_stream(raw)


@pytest.mark.parametrize("place", RESTORING)
async def test_restoring_by_v2_that_raises(serve: Serve, place: str) -> None:
    served = serve_armed(serve, place)
    async with connect(served.path) as raw:
        await write_word(raw, WORD, 7)
        assert (await set_state(raw, S.STOP_COPY)).ok
        data = await read_stream(raw)
        assert (await set_state(raw, S.RUNNING)).ok
        await write_word(raw, WORD, 8)
        assert (await set_state(raw, S.RESUMING)).ok
        await write_stream(raw, data)
        expect_fault(served, await set_state(raw, S.RUNNING), place)
        await raw.expect_alive()
    async with connect_next(served.path) as raw:
        assert await read_word(raw, WORD) == 8
        assert (await set_state(raw, S.RESUMING)).ok
        await write_stream(raw, data)
        assert (await set_state(raw, S.RUNNING)).ok
        assert await read_word(raw, WORD) == 7
