# SPDX-License-Identifier: BSD-3-Clause
"""How a client moves a device, in raw messages: v2's features and data, v1's region. By hand, as wire.py."""

import mmap
import struct
from collections.abc import Sequence
from enum import IntEnum

from conformance import wire
from conformance.driving import BUSY, DOORBELL, STATUS
from conformance.raw import Answer, RawClient

exact_replies = True
"""Whether `get_state` and `read_stream` mind more than what they give; off for an engine that is known to
reply with something else, for which there are tests."""

PIECE = 16 << 10
"""What a UNIX socket of Linux delivers at once, however busy the machine: one buffer of the kernel.
libvfio-user needs it (the limit "framing")."""

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, MIG_STATE, LOGGING_START, LOGGING_STOP, LOGGING_REPORT = 1, 2, 6, 7, 8

REGION, REGION_SIZE = 9, (1 << 20) + 4096
"""The migration region of a device that has no regions of its own past the standard ones."""
DEVICE_STATE, RESERVED, PENDING, OFFSET, SIZE = (0, 4), (4, 4), (8, 8), (16, 8), (24, 8)
"""Fields of struct vfio_device_migration_info: offset and width."""
FIELDS = (DEVICE_STATE, RESERVED, PENDING, OFFSET, SIZE)
DATA, DATA_SIZE = 4096, 1 << 20
V1_STOP, V1_RUNNING, V1_SAVING, V1_PRE_COPY, V1_RESUMING, V1_ERROR = 0b000, 0b001, 0b010, 0b011, 0b100, 0b110


class S(IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


STATES = [state for state in S if state is not S.ERROR]
SAVING = (S.STOP_COPY, S.PRE_COPY, S.PRE_COPY_P2P)


# v2


async def feature(raw: RawClient, flags: int, data: bytes = b"", argsz: int | None = None) -> Answer:
    room = 4096 if argsz is None else argsz
    return await raw.call(wire.DEVICE_FEATURE, struct.pack("=II", room, flags) + data)


async def set_state(raw: RawClient, *states: int) -> Answer:
    """Ask for one state after the other; the last answer."""
    for state in states:
        answer = await feature(raw, SET | MIG_STATE, struct.pack("=II", state, 0))
    return answer


async def get_state(raw: RawClient) -> S:
    reply = (await feature(raw, GET | MIG_STATE)).ok
    argsz, flags, state, data_fd = struct.unpack("=IIIi", reply)
    assert (argsz, flags, data_fd) == (16, GET | MIG_STATE, -1) or not exact_replies
    return S(state)


async def data_read(raw: RawClient, size: int, argsz: int | None = None) -> Answer:
    return await raw.call(wire.MIG_DATA_READ, struct.pack("=II", 8 + size if argsz is None else argsz, size))


async def read_stream(raw: RawClient, size: int = 1 << 16) -> bytes:
    """All that there is: reads of `size` bytes until one is short."""
    data = b""
    while True:
        reply = (await data_read(raw, size)).ok
        argsz, count = struct.unpack_from("=II", reply)
        assert argsz == 8 + count
        assert argsz == len(reply) or not exact_replies
        data += reply[8:argsz]
        if count < size:
            return data


async def data_write(raw: RawClient, data: bytes) -> Answer:
    return await raw.call(wire.MIG_DATA_WRITE, struct.pack("=II", 8 + len(data), len(data)) + data)


async def write_stream(raw: RawClient, data: bytes, size: int = 1 << 16) -> None:
    for place in range(0, len(data), size):
        assert (await data_write(raw, data[place : place + size])).ok == b""


# v1


async def read_field(raw: RawClient, field: tuple[int, int]) -> int:
    reply = (await raw.call(wire.REGION_READ, wire.region_read(REGION, *field))).ok
    return int.from_bytes(reply[16:], "little")


async def write_field(raw: RawClient, field: tuple[int, int], value: int) -> Answer:
    data = value.to_bytes(field[1], "little")
    return await raw.call(wire.REGION_WRITE, wire.region_write(REGION, field[0], data))


async def set_v1(raw: RawClient, *values: int) -> None:
    for value in values:
        assert (await write_field(raw, DEVICE_STATE, value)).ok
        assert await read_field(raw, DEVICE_STATE) == value


async def read_data(raw: RawClient, size: int, offset: int = DATA) -> bytes:
    return (await raw.call(wire.REGION_READ, wire.region_read(REGION, offset, size))).ok[16:]


async def iterate(raw: RawClient) -> list[bytes]:
    """Iterations until pending_bytes is 0; the data of each."""
    parts = []
    while await read_field(raw, PENDING):
        assert await read_field(raw, OFFSET) == DATA
        parts.append(await read_data(raw, await read_field(raw, SIZE)))
    return parts


async def resume_v1(raw: RawClient, parts: Sequence[bytes]) -> None:
    """Write the parts, each with its size; the device is resuming."""
    for part in parts:
        offset = await read_field(raw, OFFSET)
        await write_words(raw, part, offset, REGION)
        assert (await write_field(raw, SIZE, len(part))).ok


async def map_data(raw: RawClient) -> mmap.mmap:
    """The data area as the client maps it."""
    answer = await raw.call(wire.GET_REGION_INFO, wire.get_region_info(REGION, 4096))
    assert len(answer.fds) == 1
    return mmap.mmap(answer.fds[0], DATA_SIZE, offset=DATA)


# The scratch device


async def write_words(raw: RawClient, data: bytes, offset: int = 0, region: int = 0) -> None:
    """In pieces, each in a message of its own."""
    for place in range(0, len(data), PIECE):
        body = wire.region_write(region, offset + place, data[place : place + PIECE])
        assert (await raw.call(wire.REGION_WRITE, body)).ok


async def read_words(raw: RawClient, size: int, offset: int = 0, region: int = 0) -> bytes:
    return (await raw.call(wire.REGION_READ, wire.region_read(region, offset, size))).ok[16:]


async def ring(raw: RawClient) -> None:
    """Start a copy of no bytes: it is busy until the device has run once."""
    await write_words(raw, bytes(4), DOORBELL)


async def is_busy(raw: RawClient) -> bool:
    return bool((await read_words(raw, 4, STATUS))[0] & BUSY)
