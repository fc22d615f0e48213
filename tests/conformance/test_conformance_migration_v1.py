# SPDX-License-Identifier: BSD-3-Clause
"""v1's rules of migration: the comment on `struct vfio_device_migration_info` in linux/vfio.h of 5.8 to 5.17,
and "VFIO Device Migration Info" of the specification of that time. Quotations are from the first.
"""

import errno
import itertools
import mmap
import random
import struct

import pytest

from conformance import wire
from conformance.driving import finished
from conformance.engines import Serve, Served
from conformance.moving import (
    DATA,
    DATA_SIZE,
    DEVICE_STATE,
    FIELDS,
    OFFSET,
    PENDING,
    PIECE,
    REGION,
    REGION_SIZE,
    RESERVED,
    SIZE,
    V1_ERROR,
    V1_PRE_COPY,
    V1_RESUMING,
    V1_RUNNING,
    V1_SAVING,
    V1_STOP,
    S,
    data_read,
    get_state,
    is_busy,
    iterate,
    map_data,
    read_data,
    read_field,
    read_stream,
    read_words,
    resume_v1,
    ring,
    set_state,
    set_v1,
    write_field,
    write_stream,
    write_words,
)
from conformance.raw import RawClient, connect, connect_next
from vfio_user.device_models.scratch import Scratch

MiB = 1 << 20
TYPE, SPARSE = 2, 1


async def saved_parts(raw: RawClient, word: bytes = b"moved") -> list[bytes]:
    """The iterations of stop-and-copy; the device runs again, and the word is gone."""
    await write_words(raw, word)
    await set_v1(raw, V1_SAVING)
    parts = await iterate(raw)
    await set_v1(raw, V1_RUNNING)
    await write_words(raw, bytes(len(word)))
    return parts


async def write_data(raw: RawClient, data: bytes, offset: int = DATA) -> None:
    assert (await raw.call(wire.REGION_WRITE, wire.region_write(REGION, offset, data))).ok


async def read_error(raw: RawClient, offset: int, size: int) -> int:
    return (await raw.call(wire.REGION_READ, wire.region_read(REGION, offset, size))).errno


async def write_error(raw: RawClient, offset: int, data: bytes) -> int:
    return (await raw.call(wire.REGION_WRITE, wire.region_write(REGION, offset, data))).errno


# The region: "device specific regions", the type capability, the sparse mmap capability


def capabilities(reply: bytes) -> dict[int, bytes]:
    found, place = {}, struct.unpack_from("=I", reply, 12)[0]
    while place:
        number, version, following = struct.unpack_from("=HHI", reply, place)
        assert version == 1
        found[number] = reply[place + 8 : following or len(reply)]
        place = following
    return found


async def test_the_region_is_announced_by_its_type(raw: RawClient) -> None:
    answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(REGION, 4096))
    argsz, flags, index, _, size, offset = struct.unpack_from("=IIIIQQ", answer.ok)
    assert (argsz, index, size, offset) == (len(answer.ok), REGION, REGION_SIZE, 0)
    assert flags == 1 | 2 | 4 | 8, "readable, writable, mappable, with capabilities"
    assert capabilities(answer.ok) == {
        TYPE: struct.pack("=II", 3, 1),
        SPARSE: struct.pack("=IIQQ", 1, 0, DATA, DATA_SIZE),
    }
    assert len(answer.fds) == 1


async def test_a_client_that_takes_no_descriptors_is_shown_the_type_alone(scratch: Served) -> None:
    async with connect(scratch.path, negotiated=False) as raw:
        await raw.negotiate({"max_msg_fds": 0})
        answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(REGION, 4096))
        assert struct.unpack_from("=II", answer.ok)[1] == 1 | 2 | 8
        assert capabilities(answer.ok) == {TYPE: struct.pack("=II", 3, 1)}
        assert answer.fds == ()
        parts = await saved_parts(raw)
        await set_v1(raw, V1_RESUMING)
        await resume_v1(raw, parts)
        await set_v1(raw, V1_RUNNING)


async def test_a_small_argsz_is_told_what_is_needed(raw: RawClient) -> None:
    answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(REGION))
    assert struct.unpack_from("=I", answer.ok) == (80,)
    assert len(answer.ok) == 32


async def test_the_region_has_no_ioeventfds(raw: RawClient) -> None:
    reply = (await raw.call(wire.GET_REGION_IO_FDS, wire.get_region_io_fds(REGION))).ok
    assert struct.unpack("=IIII", reply) == (16, 0, REGION, 0)


# "Field accesses ... are only supported at their native width and alignment"


async def test_fields_are_accessed_at_their_width_only(raw: RawClient) -> None:
    for offset, width in itertools.product(range(33), (1, 2, 4, 8)):
        if (offset, width) in FIELDS:
            await read_field(raw, (offset, width))
        else:
            assert await read_error(raw, offset, width) == errno.EINVAL
            assert await write_error(raw, offset, bytes(width)) == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == V1_RUNNING


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 3), (0, 16), (0, 32), (28, 8), (32, 4), (100, 8), (4088, 8), (4092, 8), (4095, 1), (1, 4)],
)
async def test_between_registers_and_data_there_is_nothing(raw: RawClient, offset: int, size: int) -> None:
    for state in (V1_RUNNING, V1_SAVING):
        await set_v1(raw, state)
        assert await read_error(raw, offset, size) == errno.EINVAL
        assert await write_error(raw, offset, bytes(size)) == errno.EINVAL


@pytest.mark.parametrize("offset", [REGION_SIZE, REGION_SIZE - 3, 1 << 32, (1 << 64) - 1, (1 << 64) - 4])
async def test_outside_of_the_region(raw: RawClient, offset: int) -> None:
    assert await read_error(raw, offset, 4) == errno.EINVAL
    assert await write_error(raw, offset, b"four") == errno.EINVAL


# "device_state: (read/write)"

V1_STATES = {
    V1_STOP: (V1_STOP,),
    V1_RUNNING: (),
    V1_SAVING: (V1_SAVING,),
    V1_PRE_COPY: (V1_PRE_COPY,),
    V1_RESUMING: (V1_RESUMING,),
}
"""How to get there from running."""
LEGAL = {
    (V1_STOP, V1_RUNNING),
    (V1_RUNNING, V1_STOP),
    (V1_RUNNING, V1_SAVING),
    (V1_RUNNING, V1_PRE_COPY),
    (V1_RUNNING, V1_RESUMING),
    (V1_SAVING, V1_STOP),
    (V1_SAVING, V1_RUNNING),
    (V1_PRE_COPY, V1_SAVING),
    (V1_PRE_COPY, V1_RUNNING),  # as QEMU cancels
    (V1_RESUMING, V1_RUNNING),
    *((state, state) for state in V1_STATES),
}


async def test_running_is_the_default_state(raw: RawClient) -> None:
    assert await read_field(raw, DEVICE_STATE) == V1_RUNNING


@pytest.mark.parametrize("value", range(8))
@pytest.mark.parametrize("now", V1_STATES)
async def test_each_change_of_device_state(raw: RawClient, now: int, value: int) -> None:
    """An illegal one is refused "and the vendor driver should return the previous state"."""
    parts = await saved_parts(raw)
    await set_v1(raw, *V1_STATES[now])
    if now == V1_RESUMING:
        await resume_v1(raw, parts)
    answer = await write_field(raw, DEVICE_STATE, value)
    if (now, value) in LEGAL:
        assert answer.ok
        assert await read_field(raw, DEVICE_STATE) == value
    else:
        assert answer.errno == errno.EINVAL
        assert await read_field(raw, DEVICE_STATE) == now
    await raw.expect_alive()


@pytest.mark.parametrize("bit", range(3, 32))
async def test_bits_3_to_31_are_reserved(raw: RawClient, bit: int) -> None:
    assert (await write_field(raw, DEVICE_STATE, V1_RUNNING | 1 << bit)).errno == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == V1_RUNNING


@pytest.mark.parametrize("state", [V1_STOP, V1_SAVING])
async def test_the_device_is_stopped_before_the_write_returns(raw: RawClient, state: int) -> None:
    """ "When the device state is changed to _STOP, driver should stop the device before write() returns"."""
    await set_v1(raw, state)
    await ring(raw)
    for _ in range(3):
        assert await is_busy(raw)
    await set_v1(raw, V1_RUNNING)
    await finished(raw)


async def test_what_a_device_that_was_moved_away_owes_is_not_done_for_the_next_client(
    scratch: Served,
) -> None:
    async with connect(scratch.path) as raw:
        await set_v1(raw, V1_SAVING)
        await ring(raw)
    async with connect(scratch.path) as raw:
        assert await read_field(raw, DEVICE_STATE) == V1_STOP
        for _ in range(3):
            assert await is_busy(raw)
        await raw.call(wire.RESET)
        assert not await is_busy(raw)
        assert await read_field(raw, DEVICE_STATE) == V1_RUNNING


async def test_the_registers_do_not_make_a_device_run_that_nobody_has_used(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        await set_v1(raw, V1_RESUMING)
    async with connect(scratch.path) as raw:
        assert await read_field(raw, DEVICE_STATE) == V1_RUNNING
        await set_v1(raw, V1_RESUMING)
        await raw.call(wire.RESET)
    async with connect(scratch.path) as raw:
        for field in FIELDS:
            assert (await raw.call(wire.REGION_READ, wire.region_read(REGION, *field))).flags & wire.REPLY
        assert (await set_state(raw, S.STOP)).ok
        assert await read_field(raw, DEVICE_STATE) == V1_STOP


async def test_the_state_is_written_with_several_writes_at_once(raw: RawClient) -> None:
    writes = [(0, 0, b"word"), (REGION, 0, struct.pack("=I", V1_SAVING)), (REGION, 0, struct.pack("=I", 7))]
    assert (await raw.call(wire.WRITE_MULTI, wire.write_multi(writes))).ok == struct.pack("=Q", 2)
    assert await read_field(raw, DEVICE_STATE) == V1_SAVING


# "1. During normal shutdown", "2. ... saves state or suspends", "3. In live migration", "4.", "5."


async def test_a_normal_shutdown(raw: RawClient) -> None:
    await set_v1(raw, V1_STOP)


async def test_saving_from_running(raw: RawClient) -> None:
    await set_v1(raw, V1_SAVING)
    assert await iterate(raw)
    await set_v1(raw, V1_STOP)


async def test_live_migration(serve: Serve) -> None:
    """From running to pre-copy, to stop-and-copy, to stop; resuming at the destination, and running."""
    source, destination = serve(Scratch, "memory=4M"), serve(Scratch, "memory=4M")
    async with connect(source.path) as raw, connect(destination.path) as other:
        await write_words(raw, b"\1" * MiB, 2 * MiB, region=2)
        await set_v1(raw, V1_PRE_COPY)
        parts = await iterate(raw)
        await write_words(raw, b"\2" * 100, 2 * MiB, region=2)
        parts += await iterate(raw)
        await write_words(raw, b"words")
        await set_v1(raw, V1_SAVING)
        parts += await iterate(raw)
        await set_v1(raw, V1_STOP)
        await set_v1(other, V1_RESUMING)
        await resume_v1(other, parts)
        await set_v1(other, V1_RUNNING)
        assert await read_words(other, 5) == b"words"
        assert await read_words(other, MiB, 2 * MiB, region=2) == b"\2" * 100 + b"\1" * (MiB - 100)
        await ring(other)
        await finished(other)


async def test_pre_copy_has_data_from_the_start(raw: RawClient) -> None:
    """ "Vendor drivers must support the pre-copy state even ... where no data is provided". libvfio-user's
    sample client counts on some."""
    await set_v1(raw, V1_PRE_COPY)
    assert len(await iterate(raw)) == 1


async def test_not_all_data_has_to_be_consumed_before_the_next_state(raw: RawClient) -> None:
    """ "regardless of the number of pending bytes"."""
    await set_v1(raw, V1_PRE_COPY)
    assert await read_field(raw, PENDING)
    await set_v1(raw, V1_SAVING)
    parts = await iterate(raw)
    await set_v1(raw, V1_RUNNING, V1_RESUMING)
    await resume_v1(raw, parts)
    await set_v1(raw, V1_RUNNING)


async def test_a_migration_that_is_cancelled_in_pre_copy(raw: RawClient) -> None:
    await set_v1(raw, V1_PRE_COPY)
    await iterate(raw)
    await set_v1(raw, V1_RUNNING)
    await ring(raw)
    await finished(raw)
    parts = await saved_parts(raw)
    await set_v1(raw, V1_RESUMING)
    await resume_v1(raw, parts)
    await set_v1(raw, V1_RUNNING)


async def test_the_source_goes_on_after_stop_and_copy(raw: RawClient) -> None:
    await set_v1(raw, V1_SAVING)
    await iterate(raw)
    await ring(raw)
    await set_v1(raw, V1_RUNNING)
    await finished(raw)


# "reserved", "pending_bytes: (read only)", "data_offset: (read only)", "data_size: (read/write)"


@pytest.mark.parametrize("state", V1_STATES)
async def test_reads_of_reserved_return_zero_and_writes_are_ignored(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    assert (await write_field(raw, RESERVED, 0xFFFFFFFF)).ok
    assert await read_field(raw, RESERVED) == 0
    assert await read_field(raw, DEVICE_STATE) == state


@pytest.mark.parametrize("state", V1_STATES)
async def test_pending_bytes_and_data_offset_are_read_only(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    for field in (PENDING, OFFSET):
        assert (await write_field(raw, field, 4096)).errno == errno.EINVAL


@pytest.mark.parametrize("state", [V1_STOP, V1_RUNNING, V1_SAVING, V1_PRE_COPY])
async def test_data_size_is_written_while_resuming_only(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    for size in (0, 8):
        assert (await write_field(raw, SIZE, size)).errno == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == state


@pytest.mark.parametrize("state", [V1_STOP, V1_RUNNING, V1_RESUMING])
async def test_nothing_is_pending_where_nothing_is_saved(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    assert await read_field(raw, PENDING) == 0
    assert await read_field(raw, SIZE) == 0


@pytest.mark.parametrize("state", V1_STATES)
async def test_data_offset_is_never_zero_and_page_aligned(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    await read_field(raw, PENDING)
    assert await read_field(raw, OFFSET) == DATA


# "The sequence to be followed while in pre-copy state and stop-and-copy state"

SAVING_STATES = pytest.mark.parametrize("state", [V1_SAVING, V1_PRE_COPY])


@SAVING_STATES
async def test_a_repeated_reads_of_pending_bytes_have_no_side_effects(raw: RawClient, state: int) -> None:
    await set_v1(raw, state)
    assert len({await read_field(raw, PENDING) for _ in range(5)}) == 1


@SAVING_STATES
async def test_a_pending_bytes_of_zero_ends_the_iterations(raw: RawClient, state: int) -> None:
    await set_v1(raw, state)
    await iterate(raw)
    for _ in range(3):
        assert await read_field(raw, PENDING) == 0
    assert await read_field(raw, OFFSET) == DATA
    assert await read_field(raw, SIZE) == 0


@SAVING_STATES
async def test_b_data_offset_is_read_after_pending_bytes(raw: RawClient, state: int) -> None:
    await set_v1(raw, state)
    assert await read_error(raw, *OFFSET) == errno.EINVAL
    await read_field(raw, PENDING)
    assert await read_field(raw, OFFSET) == DATA


@SAVING_STATES
async def test_c_data_size_is_read_after_data_offset(raw: RawClient, state: int) -> None:
    await set_v1(raw, state)
    assert await read_error(raw, *SIZE) == errno.EINVAL
    await read_field(raw, PENDING)
    assert await read_error(raw, *SIZE) == errno.EINVAL
    await read_field(raw, OFFSET)
    assert await read_field(raw, SIZE) > 0


@SAVING_STATES
async def test_c_offset_and_size_stay_when_they_are_read_more_than_once(raw: RawClient, state: int) -> None:
    await set_v1(raw, state)
    await read_field(raw, PENDING)
    seen = {(await read_field(raw, OFFSET), await read_field(raw, SIZE)) for _ in range(4)}
    assert len(seen) == 1


@SAVING_STATES
async def test_d_data_is_there_from_data_offset_to_data_size_and_no_further(
    raw: RawClient, state: int
) -> None:
    await set_v1(raw, state)
    await read_field(raw, PENDING)
    assert await read_error(raw, DATA, 1) == errno.EINVAL
    await read_field(raw, OFFSET)
    size = await read_field(raw, SIZE)
    whole = await read_data(raw, size)
    assert await read_data(raw, size) == whole
    assert await read_data(raw, 10, DATA + 5) == whole[5:15]
    assert b"".join([await read_data(raw, 1, DATA + place) for place in range(16)]) == whole[:16]
    for offset, count in ((DATA, size + 1), (DATA + size, 1), (DATA + size - 1, 2), (DATA - 1, 2)):
        assert await read_error(raw, offset, count) == errno.EINVAL


@SAVING_STATES
async def test_d_data_may_be_mapped(raw: RawClient, state: int) -> None:
    with await map_data(raw) as mapped:
        await set_v1(raw, state)
        await read_field(raw, PENDING)
        await read_field(raw, OFFSET)
        size = await read_field(raw, SIZE)
        assert mapped[:size] == await read_data(raw, size)


async def test_f_pending_bytes_tells_that_the_data_has_been_read(serve: Serve) -> None:
    async with connect(serve(Scratch, "memory=4M").path) as raw:
        await write_words(raw, bytes(range(1, 129)) * 8192, MiB, region=2)
        await set_v1(raw, V1_SAVING)
        parts = await iterate(raw)
        assert len(parts) == 2
        assert len(parts[0]) == DATA_SIZE
        await set_v1(raw, V1_STOP, V1_RUNNING, V1_SAVING)
        assert await iterate(raw) == parts
        await set_v1(raw, V1_STOP)
        await set_state(raw, S.STOP_COPY)
        assert await read_stream(raw, MiB) == b"".join(parts), "v1's chunks joined are v2's bytes"


async def taken_with_a_change(raw: RawClient, order: str) -> list[bytes]:
    """What a client has read that goes from pre-copy to stop-and-copy in the middle of an iteration. In the
    order that is said, it asks for `o`, data_offset, and `s`, data_size, reads `h`, half of the data, and
    `r`, the rest of it or all, and goes on (`|`); what it has not read to the end, it leaves.
    """
    await set_v1(raw, V1_PRE_COPY)
    await read_field(raw, PENDING)
    size, parts = 0, [b""]
    for what in order:
        if what == "o":
            assert await read_field(raw, OFFSET) == DATA
        elif what == "s":
            size = await read_field(raw, SIZE)
        elif what == "|":
            await set_v1(raw, V1_SAVING)
        else:
            begin, end = len(parts[0]), size // 2 if what == "h" else size
            parts[0] += await read_data(raw, end - begin, DATA + begin)
    left = parts if order.endswith("r") or "r|" in order else []
    return [*left, *await iterate(raw)]


READ_BEFORE, READ_AFTER = ("osr|", "oshr|"), ("os|r", "osh|r", "os|hr")
NEVER_READ = ("|", "o|", "os|", "osh|", "os|h", "o|o")


@pytest.mark.parametrize("order", [*READ_BEFORE, *READ_AFTER, *NEVER_READ])
@pytest.mark.parametrize("memory", ["0", "256K"])
async def test_nothing_is_lost_or_twice_when_the_state_changes_within_an_iteration(
    serve: Serve, memory: str, order: str
) -> None:
    """ "The user application can transition from the _SAVING|_RUNNING (pre-copy state) to the _SAVING
    (stop-and-copy) state regardless of the number of pending bytes." Data is read whole or not at all."""
    async with connect(serve(Scratch, f"memory={memory}").path) as raw:
        noise = random.Random(1).randbytes(256 << 10) if memory != "0" else b""
        await write_words(raw, noise, region=2)
        await write_words(raw, b"moved")
        parts = await taken_with_a_change(raw, order)
        await set_v1(raw, V1_RUNNING)
        await write_words(raw, bytes(len(noise)), region=2)
        await write_words(raw, bytes(5))
        await set_v1(raw, V1_RESUMING)
        await resume_v1(raw, parts)
        await set_v1(raw, V1_RUNNING)
        assert await read_words(raw, 5) == b"moved"
        for place in range(0, len(noise), PIECE):
            assert await read_words(raw, PIECE, place, region=2) == noise[place : place + PIECE]


@SAVING_STATES
async def test_data_that_was_not_read_to_its_end_is_offered_again(raw: RawClient, state: int) -> None:
    """Without a change of state as well: the read of pending_bytes would say that it was read."""
    await set_v1(raw, state)
    pending = await read_field(raw, PENDING)
    for _ in range(3):
        assert await read_field(raw, OFFSET) == DATA
        size = await read_field(raw, SIZE)
        await read_data(raw, size - 1)
        assert await read_field(raw, PENDING) >= pending > 0
    parts = await iterate(raw)
    assert len(parts[0]) == size


async def test_data_that_was_taken_is_not_offered_again_after_a_change_of_state(raw: RawClient) -> None:
    """The state changes after the data was read and before pending_bytes."""
    await set_v1(raw, V1_PRE_COPY)
    await read_field(raw, PENDING)
    await read_field(raw, OFFSET)
    first = await read_data(raw, await read_field(raw, SIZE))
    await set_v1(raw, V1_SAVING)
    parts = [first, *await iterate(raw)]
    await set_v1(raw, V1_RUNNING, V1_RESUMING)
    await resume_v1(raw, parts)
    await set_v1(raw, V1_RUNNING)


@pytest.mark.parametrize("state", [V1_STOP, V1_RUNNING])
async def test_there_is_no_data_outside_of_a_session(raw: RawClient, state: int) -> None:
    await saved_parts(raw)
    await set_v1(raw, *V1_STATES[state])
    assert await read_error(raw, DATA, 1) == errno.EINVAL
    assert await write_error(raw, DATA, b"x") == errno.EINVAL


async def test_data_cannot_be_written_while_saving(raw: RawClient) -> None:
    await set_v1(raw, V1_SAVING)
    assert await write_error(raw, DATA, b"x") == errno.EINVAL


# "The sequence to be followed while _RESUMING device state"


async def test_the_data_is_written_trapped_and_in_parts(raw: RawClient) -> None:
    data = b"".join(await saved_parts(raw))
    await set_v1(raw, V1_RESUMING)
    for place in range(0, len(data), 3000):
        part = data[place : place + 3000]
        offset = await read_field(raw, OFFSET)
        await write_data(raw, part[:1000], offset)
        await write_data(raw, part[1000:], offset + 1000)
        assert await read_data(raw, len(part)) == part
        assert (await write_field(raw, SIZE, len(part))).ok
    await set_v1(raw, V1_RUNNING)
    assert await read_words(raw, 5) == b"moved"


async def test_the_data_is_written_through_a_mapping(raw: RawClient) -> None:
    data = b"".join(await saved_parts(raw))
    with await map_data(raw) as mapped:
        await set_v1(raw, V1_RESUMING)
        for place in range(0, len(data), 5000):
            part = data[place : place + 5000]
            assert await read_field(raw, OFFSET) == DATA
            mapped[: len(part)] = part
            assert (await write_field(raw, SIZE, len(part))).ok
            mapped[:] = bytes([0xEE]) * len(mapped)  # what was taken has been taken
        await set_v1(raw, V1_RUNNING)
    assert await read_words(raw, 5) == b"moved"


@pytest.mark.parametrize("size", [DATA_SIZE + 1, DATA_SIZE + 4096, 1 << 32, (1 << 64) - 1])
async def test_a_data_size_larger_than_the_data_area_is_refused(raw: RawClient, size: int) -> None:
    parts = await saved_parts(raw)
    await set_v1(raw, V1_RESUMING)
    assert (await write_field(raw, SIZE, size)).errno == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == V1_RESUMING
    await resume_v1(raw, parts)
    await set_v1(raw, V1_RUNNING)


async def test_a_data_size_of_zero_says_nothing(raw: RawClient) -> None:
    parts = await saved_parts(raw)
    await set_v1(raw, V1_RESUMING)
    assert (await write_field(raw, SIZE, 0)).ok
    await resume_v1(raw, parts)
    assert (await write_field(raw, SIZE, 0)).ok
    await set_v1(raw, V1_RUNNING)


async def test_the_whole_data_area_can_be_written_and_not_a_byte_more(raw: RawClient) -> None:
    await set_v1(raw, V1_RESUMING)
    await write_data(raw, bytes(4096), REGION_SIZE - 4096)
    assert await write_error(raw, REGION_SIZE - 4095, bytes(4096)) == errno.EINVAL


# "If an error occurs during the above sequences", "VFIO_DEVICE_STATE_ERROR"


async def test_a_bad_stream_is_refused_where_it_is_written(raw: RawClient) -> None:
    await write_words(raw, b"kept")
    await set_v1(raw, V1_RESUMING)
    await write_data(raw, b"nonsense" * 10)
    assert (await write_field(raw, SIZE, 80)).errno == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == V1_ERROR
    assert await read_words(raw, 4) == b"kept"


async def test_an_incomplete_stream_is_refused_where_the_device_is_to_run(raw: RawClient) -> None:
    data = b"".join(await saved_parts(raw))
    await set_v1(raw, V1_RESUMING)
    await resume_v1(raw, [data[:-1]])
    assert (await write_field(raw, DEVICE_STATE, V1_RUNNING)).errno == errno.EINVAL
    assert await read_field(raw, DEVICE_STATE) == V1_ERROR


async def test_parts_in_another_order_are_refused(serve: Serve) -> None:
    """ "The user application should write data in the same order as the data is received"."""
    async with connect(serve(Scratch, "memory=4M").path) as raw:
        await write_words(raw, b"\1" * MiB, region=2)
        await write_words(raw, b"\1" * MiB, MiB, region=2)
        parts = await saved_parts(raw)
        assert len(parts) == 3
        await set_v1(raw, V1_RESUMING)
        await write_data(raw, parts[1])
        assert (await write_field(raw, SIZE, len(parts[1]))).errno == errno.EINVAL
        assert await read_field(raw, DEVICE_STATE) == V1_ERROR


async def test_the_way_out_of_the_error_state_is_a_reset(raw: RawClient) -> None:
    await set_v1(raw, V1_RESUMING)
    assert (await write_field(raw, DEVICE_STATE, V1_RUNNING)).errno == errno.EINVAL
    for value in range(8):
        assert (await write_field(raw, DEVICE_STATE, value)).errno == errno.EINVAL
        assert await read_field(raw, DEVICE_STATE) == V1_ERROR
    for field in (PENDING, SIZE):
        assert await read_field(raw, field) == 0
    assert (await raw.call(wire.RESET)).ok == b""
    assert await read_field(raw, DEVICE_STATE) == V1_RUNNING
    await ring(raw)
    await finished(raw)


@pytest.mark.parametrize("state", V1_STATES)
async def test_reset_leads_to_running_from_every_state(raw: RawClient, state: int) -> None:
    await set_v1(raw, *V1_STATES[state])
    await read_field(raw, PENDING)
    await read_field(raw, OFFSET)
    assert (await raw.call(wire.RESET)).ok == b""
    assert await read_field(raw, DEVICE_STATE) == V1_RUNNING
    assert await read_error(raw, DATA, 1) == errno.EINVAL
    await ring(raw)
    await finished(raw)


# Clients that vanish, and what they have mapped


@pytest.mark.parametrize("state", V1_STATES)
async def test_a_client_that_vanishes_leaves_the_device_to_the_next(scratch: Served, state: int) -> None:
    async with connect(scratch.path) as raw:
        parts = await saved_parts(raw)
        await write_words(raw, b"kept")
        await set_v1(raw, *V1_STATES[state])
        await read_field(raw, PENDING)
        await read_field(raw, OFFSET)
        if state == V1_RESUMING:
            await write_data(raw, parts[0])
    async with connect_next(scratch.path) as raw:
        stands = state in (V1_STOP, V1_SAVING)  # it may have been moved away
        assert await read_field(raw, DEVICE_STATE) == (V1_STOP if stands else V1_RUNNING)
        assert await read_error(raw, DATA, 1) == errno.EINVAL
        assert await read_words(raw, 4) == b"kept"
        await set_v1(raw, V1_RUNNING)
        parts = await saved_parts(raw)
        await set_v1(raw, V1_RESUMING)
        await resume_v1(raw, parts)
        await set_v1(raw, V1_RUNNING)


@pytest.mark.parametrize("state", [V1_PRE_COPY, V1_RESUMING])
async def test_who_waits_while_a_client_vanishes_is_served(scratch: Served, state: int) -> None:
    async with connect(scratch.path) as raw:
        await set_v1(raw, state)
        async with connect(scratch.path, negotiated=False) as waiting:
            raw.shut()
            await waiting.negotiate()
            assert await read_field(waiting, DEVICE_STATE) == V1_RUNNING


async def test_a_mapping_that_was_kept_shows_nothing_of_the_next_client(scratch: Served) -> None:
    async with connect(scratch.path) as raw:
        mapped = await map_data(raw)
    with mapped:
        async with connect_next(scratch.path) as raw:
            parts = await saved_parts(raw)
            assert parts[0]
        assert mapped[:] == bytes(DATA_SIZE)


async def test_who_has_mapped_the_data_cannot_shrink_it(raw: RawClient) -> None:
    answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(REGION, 4096))
    with pytest.raises(PermissionError), mmap.mmap(answer.fds[0], 4096) as whole:
        whole.resize(0)


# Both editions on one device


@pytest.mark.parametrize("way", ["v1 to v2", "v2 to v1"])
async def test_saved_over_one_and_restored_over_the_other(serve: Serve, way: str) -> None:
    source, destination = serve(Scratch, "memory=4M"), serve(Scratch, "memory=4M")
    async with connect(source.path) as raw, connect(destination.path) as other:
        await write_words(raw, b"words")
        await write_words(raw, b"\7" * MiB, 3 * MiB, region=2)
        if way == "v1 to v2":
            await set_v1(raw, V1_SAVING)
            data = b"".join(await iterate(raw))
            await set_state(other, S.RESUMING)
            await write_stream(other, data, MiB)
            assert (await set_state(other, S.RUNNING)).ok
        else:
            await set_state(raw, S.STOP_COPY)
            data = await read_stream(raw, MiB)
            await set_v1(other, V1_RESUMING)
            await resume_v1(other, [data[place : place + MiB] for place in range(0, len(data), MiB)])
            await set_v1(other, V1_RUNNING)
        assert await read_words(other, 5) == b"words"
        assert await read_words(other, MiB, 3 * MiB, region=2) == b"\7" * MiB


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (S.STOP, V1_STOP),
        (S.RUNNING, V1_RUNNING),
        (S.STOP_COPY, V1_SAVING),
        (S.RESUMING, V1_RESUMING),
        (S.RUNNING_P2P, V1_RUNNING),
        (S.PRE_COPY, V1_PRE_COPY),
        (S.PRE_COPY_P2P, V1_PRE_COPY),
    ],
)
async def test_a_state_of_one_edition_shows_in_the_other(raw: RawClient, state: S, shown: int) -> None:
    await set_state(raw, state)
    assert await read_field(raw, DEVICE_STATE) == shown
    if state is not S.RESUMING:
        assert (await write_field(raw, DEVICE_STATE, V1_RUNNING)).ok
        assert await get_state(raw) is S.RUNNING


async def test_a_session_of_the_other_edition_begins_anew(raw: RawClient) -> None:
    """Data that v1 has prepared does not outlive a session that v2 ends."""
    await set_v1(raw, V1_PRE_COPY)
    await read_field(raw, PENDING)
    await read_field(raw, OFFSET)
    await set_state(raw, S.RUNNING, S.STOP_COPY)
    assert await read_error(raw, DATA, 1) == errno.EINVAL
    data = (await data_read(raw, 8)).ok[8:]
    assert data == b"vfiouser"
