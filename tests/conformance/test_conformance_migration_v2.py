# SPDX-License-Identifier: BSD-3-Clause
"""The v2 specification's rules of migration, by its headings: device features, states, data."""

import errno
import itertools
import re
import struct
from collections.abc import Callable, Sequence

import pytest
from sealed import FOREIGN

from conformance import wire
from conformance.driving import PAGE, answer_dma, enable_bus_master, finished, map_private, start_copy
from conformance.engines import Serve, Served
from conformance.holdings import expect_holdings, holdings
from conformance.models import OneWay
from conformance.moving import (
    GET,
    LOGGING_REPORT,
    LOGGING_START,
    LOGGING_STOP,
    MIG_STATE,
    MIGRATION,
    PIECE,
    PROBE,
    SAVING,
    SET,
    STATES,
    S,
    data_read,
    data_write,
    feature,
    get_state,
    is_busy,
    read_stream,
    read_words,
    ring,
    set_state,
    write_stream,
    write_words,
)
from conformance.raw import RawClient, connect
from vfio_user.device_models.scratch import Scratch

MiB = 1 << 20
METHODS = {
    MIGRATION: (GET,),
    MIG_STATE: (GET, SET),
    LOGGING_START: (SET,),
    LOGGING_STOP: (SET,),
    LOGGING_REPORT: (GET,),
}
"""Specification: "Device Features"; what each can do."""


async def saved_state(raw: RawClient, word: bytes = b"moved") -> bytes:
    """A state with a word in it; the device runs again, and the word is gone."""
    await write_words(raw, word)
    await set_state(raw, S.STOP_COPY)
    data = await read_stream(raw)
    await set_state(raw, S.RUNNING)
    await write_words(raw, bytes(len(word)))
    return data


# "VFIO_USER_DEVICE_FEATURE": argsz and flags


@pytest.mark.parametrize("argsz", range(8))
@pytest.mark.parametrize("flags", [GET | MIGRATION, SET | MIG_STATE, PROBE | MIGRATION])
async def test_argsz_below_the_fixed_part_is_refused(raw: RawClient, flags: int, argsz: int) -> None:
    data = struct.pack("=II", S.STOP, 0) if flags & SET else b""
    assert (await feature(raw, flags, data, argsz)).errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


@pytest.mark.parametrize("bit", range(19, 32))
async def test_unknown_flags_are_refused(raw: RawClient, bit: int) -> None:
    for flags in (GET | MIGRATION, PROBE | MIGRATION):
        assert (await feature(raw, flags | 1 << bit)).errno == errno.EINVAL


async def test_get_and_set_are_mutually_exclusive(raw: RawClient) -> None:
    state = struct.pack("=II", S.STOP, 0)
    assert (await feature(raw, GET | SET | MIG_STATE, state)).errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


@pytest.mark.parametrize("number", METHODS)
async def test_one_of_get_set_and_probe_has_to_be_asked_for(raw: RawClient, number: int) -> None:
    assert (await feature(raw, number)).errno == errno.EINVAL


@pytest.mark.parametrize("number", METHODS)
@pytest.mark.parametrize("methods", [(), (GET,), (SET,), (GET, SET)])
async def test_a_probe_succeeds_if_all_of_the_methods_are_there(
    raw: RawClient, number: int, methods: Sequence[int]
) -> None:
    """The reply is the request; "data is not used for probing"."""
    for data in (b"", b"not used for probing"):
        flags = PROBE | number | sum(methods)
        answer = await feature(raw, flags, data)
        if set(methods) <= set(METHODS[number]):
            assert answer.ok == struct.pack("=II", 8 + len(data), flags) + data
        else:
            assert answer.errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


@pytest.mark.parametrize("number", METHODS)
async def test_a_method_that_a_feature_does_not_have_is_refused(raw: RawClient, number: int) -> None:
    for method in {GET, SET} - set(METHODS[number]):
        assert (await feature(raw, method | number, bytes(24))).errno == errno.EINVAL


@pytest.mark.parametrize("number", [0, 3, 4, 5, 9, 10, 11, 0x7FFF, 0xFFFF])
async def test_an_unknown_feature_is_enotty_whatever_is_asked(raw: RawClient, number: int) -> None:
    for flags in (GET, SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET):
        assert (await feature(raw, flags | number, bytes(16))).errno == errno.ENOTTY
    await raw.expect_alive()


async def test_the_reply_to_get_has_the_data_and_its_length(raw: RawClient) -> None:
    reply = (await feature(raw, GET | MIGRATION)).ok
    assert struct.unpack("=IIQ", reply) == (16, GET | MIGRATION, 7)


async def test_the_reply_to_set_is_the_request(raw: RawClient) -> None:
    data = struct.pack("=II", S.STOP, 0x12345678)
    reply = (await feature(raw, SET | MIG_STATE, data, argsz=100)).ok
    assert reply == struct.pack("=II", 16, SET | MIG_STATE) + data


# "Message sizes"


@pytest.mark.parametrize("number", [MIGRATION, MIG_STATE])
async def test_a_reply_to_get_that_does_not_fit_tells_the_size_that_is_needed(
    raw: RawClient, number: int
) -> None:
    for argsz in range(8, 16):
        reply = (await feature(raw, GET | number, argsz=argsz)).ok
        assert reply == struct.pack("=II", 16, GET | number)
    assert len((await feature(raw, GET | number, argsz=16)).ok) == 16


async def test_a_set_whose_reply_does_not_fit_is_not_done(raw: RawClient) -> None:
    for argsz in range(8, 16):
        assert (
            await feature(raw, SET | MIG_STATE, struct.pack("=II", S.STOP, 0), argsz)
        ).errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


# "VFIO_DEVICE_FEATURE_MIGRATION"


async def test_a_device_that_cannot_be_moved_has_no_such_feature(serve: Serve) -> None:
    async with connect(serve(OneWay).path) as raw:
        for number, flags in itertools.product((MIGRATION, MIG_STATE), (GET, SET, PROBE)):
            assert (await feature(raw, flags | number, bytes(8))).errno == errno.ENOTTY
        assert (await data_read(raw, 8)).errno == errno.ENOTSUP
        assert (await data_write(raw, b"data")).errno == errno.ENOTSUP
        assert struct.unpack("=IIII", (await raw.call(wire.GET_INFO, wire.get_info())).ok) == (16, 3, 9, 5)


# "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"


async def test_a_device_starts_in_running(raw: RawClient) -> None:
    assert await get_state(raw) is S.RUNNING


async def test_there_is_no_data_fd(raw: RawClient) -> None:
    reply = (await feature(raw, GET | MIG_STATE)).ok
    assert reply == struct.pack("=IIIi", 16, GET | MIG_STATE, S.RUNNING, -1)


@pytest.mark.parametrize("state", [S.ERROR, 8, 9, 0x7FFFFFFF, 0xFFFFFFFF])
async def test_error_and_what_is_no_state_cannot_be_asked_for(raw: RawClient, state: int) -> None:
    assert (await set_state(raw, state)).errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


@pytest.mark.parametrize("length", range(8))
async def test_a_state_that_is_cut_short_is_refused(raw: RawClient, length: int) -> None:
    data = struct.pack("=II", S.STOP, 0)[:length]
    assert (await feature(raw, SET | MIG_STATE, data)).errno == errno.EINVAL
    assert await get_state(raw) is S.RUNNING


# "Direct State Transitions", "Complex State Transitions"

BLOCKED = {(S.STOP_COPY, S.PRE_COPY), (S.STOP_COPY, S.PRE_COPY_P2P)}


@pytest.mark.parametrize("wanted", STATES)
@pytest.mark.parametrize("now", STATES)
async def test_every_state_leads_to_every_other_but_stop_copy_to_pre_copy(
    raw: RawClient, now: S, wanted: S
) -> None:
    data = await saved_state(raw)
    assert (await set_state(raw, now)).ok
    if now is S.RESUMING:
        await write_stream(raw, data)
    answer = await set_state(raw, wanted)
    if (now, wanted) in BLOCKED:
        assert answer.errno == errno.EINVAL
        assert await get_state(raw) is now
    else:
        assert answer.ok
        assert await get_state(raw) is wanted


@pytest.mark.parametrize("state", STATES)
async def test_the_device_works_in_running_and_pre_copy_only(raw: RawClient, state: S) -> None:
    """Accesses are taken in every state, and do not wake the device."""
    data = await saved_state(raw)
    await set_state(raw, state)
    await ring(raw)
    if state in (S.RUNNING, S.PRE_COPY):
        await finished(raw)
    for _ in range(3):
        assert await is_busy(raw) == (state not in (S.RUNNING, S.PRE_COPY))
    assert await get_state(raw) is state
    if state is S.RESUMING:
        await write_stream(raw, data)
    await set_state(raw, S.RUNNING)
    await finished(raw)


async def test_a_transition_is_complete_before_the_reply(raw: RawClient) -> None:
    """No DMA follows the reply to STOP, though the copy has not ended."""
    memory = bytearray(64 * PAGE)
    await map_private(raw, 0, len(memory))
    await enable_bus_master(raw)
    await start_copy(raw, 0, 32 * PAGE, 16 * PAGE)
    request = await raw.receive()
    assert request.command == wire.DMA_READ
    await raw.command(wire.DEVICE_FEATURE, struct.pack("=IIII", 16, SET | MIG_STATE, S.STOP, 0))
    assert (await raw.receive()).ok
    await raw.answer(request, wire.dma_read_reply(0, bytes(16 * PAGE)))
    await raw.expect_alive()
    assert await is_busy(raw)
    await raw.command(wire.DEVICE_FEATURE, struct.pack("=IIII", 16, SET | MIG_STATE, S.RUNNING, 0))
    while (message := await raw.receive()).command != wire.DMA_WRITE:
        if message.command == wire.DMA_READ:
            await answer_dma(raw, message, memory)
    await answer_dma(raw, message, memory)
    await finished(raw)


async def test_resuming_to_stop_fails_when_the_data_is_incomplete(raw: RawClient) -> None:
    data = await saved_state(raw)
    await set_state(raw, S.RESUMING)
    await write_stream(raw, data[:-1])
    assert (await set_state(raw, S.STOP)).errno == errno.EINVAL
    assert await get_state(raw) is S.ERROR


async def test_reset_is_the_way_out_of_error(raw: RawClient) -> None:
    assert (await set_state(raw, S.RESUMING, S.RUNNING)).errno == errno.EINVAL
    for state in S:
        assert (await set_state(raw, state)).errno == errno.EINVAL
        assert await get_state(raw) is S.ERROR
    assert (await raw.call(wire.RESET)).ok == b""
    assert await get_state(raw) is S.RUNNING
    await ring(raw)
    await finished(raw)


async def test_a_state_that_was_refused_leaves_the_device_as_it_was(raw: RawClient) -> None:
    data = bytearray(await saved_state(raw))
    await write_words(raw, b"kept")
    data[-1] ^= 1
    await set_state(raw, S.RESUMING)
    assert (await data_write(raw, bytes(data))).errno == errno.EINVAL
    assert await get_state(raw) is S.ERROR
    assert await read_words(raw, 4) == b"kept"


async def test_the_source_goes_on_after_a_migration_that_was_given_up(raw: RawClient) -> None:
    await ring(raw)
    await finished(raw)
    for walk in ((S.PRE_COPY,), (S.PRE_COPY, S.STOP_COPY), (S.STOP_COPY,), (S.STOP,)):
        assert (await set_state(raw, *walk)).ok
        await ring(raw)
        assert (await set_state(raw, S.RUNNING)).ok
        await finished(raw)


async def test_the_state_arrives(serve: Serve) -> None:
    source, destination = serve(Scratch), serve(Scratch)
    async with connect(source.path) as raw, connect(destination.path) as other:
        data = await saved_state(raw, b"words that are moved")
        assert (await set_state(other, S.RESUMING)).ok
        await write_stream(other, data)
        assert (await set_state(other, S.RUNNING)).ok
        assert await read_words(other, 20) == b"words that are moved"


# "VFIO_USER_MIG_DATA_READ"


@pytest.mark.parametrize("state", [state for state in STATES if state not in SAVING])
async def test_data_is_read_in_the_saving_group_only(raw: RawClient, state: S) -> None:
    await set_state(raw, state)
    assert (await data_read(raw, 100)).errno == errno.EINVAL
    assert await get_state(raw) is state


@pytest.mark.parametrize("state", SAVING)
async def test_less_than_was_asked_for_means_that_there_is_no_more(raw: RawClient, state: S) -> None:
    await set_state(raw, state)
    assert await read_stream(raw)
    for _ in range(3):
        assert (await data_read(raw, 100)).ok == struct.pack("=II", 8, 0)


@pytest.mark.parametrize("size", [1, 7, 100, 4096, 65536, MiB])
async def test_the_data_is_a_stream_whatever_the_reads(raw: RawClient, size: int) -> None:
    await write_words(raw, b"stream")
    await set_state(raw, S.STOP_COPY)
    whole = await read_stream(raw, MiB)
    await set_state(raw, S.STOP, S.STOP_COPY)
    if size == 1:  # every byte by itself would take a while
        first = b"".join([(await data_read(raw, 1)).ok[8:] for _ in range(300)])
        assert first == whole[:300]
    else:
        assert await read_stream(raw, size) == whole


async def test_a_reply_is_as_long_as_its_data(raw: RawClient) -> None:
    await set_state(raw, S.STOP_COPY)
    reply = (await data_read(raw, MiB)).ok
    argsz, size = struct.unpack_from("=II", reply)
    assert size < MiB
    assert argsz == len(reply) == 8 + size


async def test_no_bytes_are_less_than_none_asked_for(raw: RawClient) -> None:
    await set_state(raw, S.STOP_COPY)
    assert (await data_read(raw, 0)).ok == struct.pack("=II", 8, 0)
    assert len(await read_stream(raw)) > 100


@pytest.mark.parametrize("argsz", [0, 7, 8, 107])
async def test_a_reply_longer_than_argsz_is_refused_and_nothing_is_lost(raw: RawClient, argsz: int) -> None:
    """A shorter one would say that this is the end."""
    await set_state(raw, S.STOP_COPY)
    assert (await data_read(raw, 100, argsz)).errno == errno.EINVAL
    first = await read_stream(raw)
    await set_state(raw, S.STOP, S.STOP_COPY)
    assert await read_stream(raw) == first
    assert (await data_read(raw, 0, 0)).errno == errno.EINVAL


async def test_more_than_max_data_xfer_size_is_refused_and_nothing_is_lost(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        await raw.negotiate({"max_data_xfer_size": 5000})
        await set_state(raw, S.STOP_COPY)
        for size in (MiB + 1, 0xFFFFFFF0, 0xFFFFFFFF):
            assert (await data_read(raw, size, 0xFFFFFFFF)).errno == errno.EINVAL
        data = await read_stream(raw, 5000)
        await set_state(raw, S.RESUMING)
        assert (await data_write(raw, bytes(MiB + 1))).errno == errno.EINVAL
        assert await get_state(raw) is S.RESUMING
        await write_stream(raw, data, 5000)
        assert (await set_state(raw, S.RUNNING)).ok


@pytest.mark.parametrize("length", range(8))
async def test_a_request_for_data_that_is_cut_short_is_refused(raw: RawClient, length: int) -> None:
    await set_state(raw, S.STOP_COPY)
    answer = await raw.call(wire.MIG_DATA_READ, struct.pack("=II", 108, 100)[:length])
    assert answer.errno == errno.EINVAL


async def test_pre_copy_sends_what_changes_and_the_end_sends_the_rest(serve: Serve) -> None:
    """ "PRE_COPY -> STOP_COPY: Continue to transfer migration data". A short read there means nothing now."""
    source, destination = serve(Scratch, "memory=4M"), serve(Scratch, "memory=4M")
    async with connect(source.path) as raw:
        for place in range(4):
            await write_words(raw, bytes([place + 1]) * MiB, place * MiB, region=2)
        await set_state(raw, S.PRE_COPY)
        first = await read_stream(raw, MiB)
        assert len(first) > 4 * MiB
        await write_words(raw, b"changed", 2 * MiB, region=2)
        second = await read_stream(raw, MiB)
        assert 4096 < len(second) < 8192
        assert await read_stream(raw) == b""
        await write_words(raw, b"at last", 3 * MiB, region=2)
        await set_state(raw, S.STOP_COPY)
        rest = await read_stream(raw, MiB)
        assert len(rest) < 20_000
        async with connect(destination.path) as other:
            await set_state(other, S.RESUMING)
            await write_stream(other, first + second + rest, PIECE)
            assert (await set_state(other, S.RUNNING)).ok
            assert await read_words(other, 9, 2 * MiB, region=2) == b"changed\3\3"
            assert await read_words(other, 9, 3 * MiB, region=2) == b"at last\4\4"
            assert await read_words(other, MiB, 0, region=2) == b"\1" * MiB


# "VFIO_USER_MIG_DATA_WRITE"


@pytest.mark.parametrize("state", [state for state in STATES if state is not S.RESUMING])
async def test_data_is_written_in_resuming_only(raw: RawClient, state: S) -> None:
    await set_state(raw, state)
    assert (await data_write(raw, b"vfiouser")).errno == errno.EINVAL
    assert await get_state(raw) is state


@pytest.mark.parametrize("size", [1, 13, 1000, 4096, MiB])
async def test_the_data_may_be_written_in_any_pieces(raw: RawClient, size: int) -> None:
    data = await saved_state(raw)
    await set_state(raw, S.RESUMING)
    if size == 1:  # every byte by itself would take a while
        await write_stream(raw, data[:300], 1)
        await write_stream(raw, data[300:])
    else:
        await write_stream(raw, data, size)
    assert (await set_state(raw, S.RUNNING)).ok
    assert await read_words(raw, 5) == b"moved"


async def test_there_is_no_reply_payload_and_argsz_does_not_matter(raw: RawClient) -> None:
    data = await saved_state(raw)
    await set_state(raw, S.RESUMING)
    for argsz, part in ((0, data[:10]), (8, data[10:20]), (0xFFFFFFFF, data[20:]), (8, b"")):
        answer = await raw.call(wire.MIG_DATA_WRITE, struct.pack("=II", argsz, len(part)) + part)
        assert answer.ok == b""
    assert (await set_state(raw, S.RUNNING)).ok


@pytest.mark.parametrize("announced", [0, 3, 5, 4096, 0xFFFFFFFF])
async def test_a_size_that_does_not_fit_the_data_is_refused(raw: RawClient, announced: int) -> None:
    data = await saved_state(raw)
    await set_state(raw, S.RESUMING)
    body = struct.pack("=II", 8, announced) + data[:4]
    assert (await raw.call(wire.MIG_DATA_WRITE, body)).errno == errno.EINVAL
    assert await get_state(raw) is S.RESUMING
    await write_stream(raw, data)
    assert (await set_state(raw, S.RUNNING)).ok


async def test_data_after_the_end_is_refused(raw: RawClient) -> None:
    data = await saved_state(raw)
    await set_state(raw, S.RESUMING)
    await write_stream(raw, data)
    assert (await data_write(raw, b"\0")).errno == errno.EINVAL
    assert await get_state(raw) is S.ERROR
    assert (await data_write(raw, data)).errno == errno.EINVAL
    assert await read_words(raw, 5) == bytes(5)


async def test_posted_writes_are_taken_and_a_bad_one_shows_in_the_state(raw: RawClient) -> None:
    data = await saved_state(raw)
    for part, state in ((data, S.RESUMING), (b"nonsense" * 2, S.ERROR)):
        await raw.call(wire.RESET)
        await set_state(raw, S.RESUMING)
        await raw.command(wire.MIG_DATA_WRITE, struct.pack("=II", 8, len(part)) + part, flags=wire.NO_REPLY)
        assert await get_state(raw) is state
    await raw.expect_alive()


async def test_a_truncated_corrupted_mixed_up_repeated_or_foreign_stream_is_refused(serve: Serve) -> None:
    scratch, larger = serve(Scratch), serve(Scratch, "memory=4K")
    async with connect(larger.path) as other:
        foreign = await saved_state(other)
    async with connect(scratch.path) as raw:
        await refuse_all(raw, scratch.log, foreign)


async def refuse_all(raw: RawClient, log: Callable[[], str], foreign: bytes) -> None:
    """The log must name what is wrong: a damaged digest would refuse any of them."""
    data = await saved_state(raw)
    half = len(data) // 2
    wrong = {
        data[:half]: f"it ends after {half} bytes",
        b"": "it ends after 0 bytes",
        data[:-20] + bytes([data[-20] ^ 4]) + data[-19:]: "field end: it counts",
        data[:-4] + bytes([data[-4] ^ 4]) + data[-3:]: "field digest: it does not match",
        data[half:] + data[:half]: "field magic: this is no saved state",
        data[:half] + data[:half] + data[half:]: "",
        data + data: f"{len(data)} bytes follow the end",
        foreign: "section bar2: this device has no such memory",
        **{make(data): reason for make, reason in FOREIGN.items()},
    }
    for stream, reason in wrong.items():
        before = len(log())
        await write_words(raw, b"kept")
        await set_state(raw, S.RESUMING)
        await raw.command(
            wire.MIG_DATA_WRITE, struct.pack("=II", 8, len(stream)) + stream, flags=wire.NO_REPLY
        )
        assert (await set_state(raw, S.RUNNING)).errno == errno.EINVAL, reason
        assert await get_state(raw) is S.ERROR, reason
        assert await read_words(raw, 4) == b"kept", reason
        (said,) = re.findall(r"the state cannot be restored: (.*)", log()[before:])
        assert reason in said
        await raw.call(wire.RESET)


# "VFIO_USER_DEVICE_RESET"


@pytest.mark.parametrize("state", STATES)
async def test_reset_leads_to_running_from_every_state(raw: RawClient, state: S) -> None:
    await write_words(raw, b"gone")
    assert (await set_state(raw, state)).ok
    assert (await raw.call(wire.RESET)).ok == b""
    assert await get_state(raw) is S.RUNNING
    assert await read_words(raw, 4) == bytes(4)
    await ring(raw)
    await finished(raw)
    assert (await data_read(raw, 10)).errno == errno.EINVAL
    assert (await data_write(raw, b"data")).errno == errno.EINVAL


# "Client Disconnection"


@pytest.mark.parametrize("state", STATES)
async def test_a_client_that_vanishes_leaves_the_device_to_the_next(scratch: Served, state: S) -> None:
    alone = holdings(scratch.pid)
    async with connect(scratch.path) as raw:
        data = await saved_state(raw)
        await write_words(raw, b"kept")
        assert (await set_state(raw, state)).ok
        await ring(raw)
        if state in SAVING:
            await data_read(raw, 1000)
        if state is S.RESUMING:
            await data_write(raw, data[:1000])
    await expect_holdings(scratch.pid, alone)  # it has seen that one leave
    async with connect(scratch.path) as raw:
        stands = state in (S.STOP, S.STOP_COPY)  # it may have been moved away
        assert await get_state(raw) is (S.STOP if stands else S.RUNNING)
        assert await read_words(raw, 4) == b"kept"
        await set_state(raw, S.RUNNING)
        await finished(raw)
        await set_state(raw, S.STOP_COPY)
        again = await read_stream(raw)
        await set_state(raw, S.RESUMING)
        await write_stream(raw, again)
        assert (await set_state(raw, S.RUNNING)).ok


async def test_who_waits_while_a_client_vanishes_is_served(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        assert (await set_state(raw, S.PRE_COPY)).ok
        async with connect(scratch.path, negotiated=False) as waiting:
            raw.shut()
            await waiting.negotiate()
            assert await get_state(waiting) is S.RUNNING


async def test_a_client_that_vanishes_in_error_leaves_a_device_that_works(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        await write_words(raw, b"kept")
        await set_state(raw, S.RESUMING, S.RUNNING)
        assert await get_state(raw) is S.ERROR
    async with connect(scratch.path) as raw:
        assert await get_state(raw) is S.RUNNING
        assert await read_words(raw, 4) == b"kept"


async def test_a_client_that_vanishes_with_replies_unread_takes_its_memory_along(serve: Serve) -> None:
    """What it was sent are views of the device's memory; the next restore takes that memory's place."""
    served = serve(Scratch, "memory=16M")
    async with connect(served.path) as raw:
        for place in range(16):
            await write_words(raw, b"\1" * MiB, place * MiB, region=2)
        await set_state(raw, S.STOP_COPY)
        for _ in range(12):
            await raw.command(wire.MIG_DATA_READ, struct.pack("=II", MiB + 8, MiB))
    async with connect(served.path) as raw:
        await set_state(raw, S.STOP_COPY)
        data = await read_stream(raw, MiB)
        await set_state(raw, S.RESUMING)
        await write_stream(raw, data, MiB)
        assert (await set_state(raw, S.RUNNING)).ok
        assert await read_words(raw, MiB, 15 * MiB, region=2) == b"\1" * MiB
