# SPDX-License-Identifier: BSD-3-Clause
"""The hot messages with `struct`: the same bytes as layouts.py gives (Hypothesis compares them), 10-70
times faster. A VMM that sets up or moves a guest sends thousands of DMA_MAP, DMA_UNMAP and SET_IRQS: hot too.

HEADER, REGION_ACCESS, DMA_ACCESS and MIG_DATA cover header and fixed body in one, so that a server's loop
needs one `unpack_from` and one `pack` for each message:

    message_id, command, size, flags, error, offset, region, count = REGION_ACCESS.unpack_from(buffer, start)
    message_id, command, size, flags, error, address, count = DMA_ACCESS.unpack_from(buffer, start)
    message_id, command, size, flags, error, argsz, count = MIG_DATA.unpack_from(buffer, start)

The payload follows at offset 32 of the message (MIG_DATA: 24). `parse` and `build_parts` work on bodies of
every kind of message: the hot ones through codec_bodies.py, all others through layouts.py.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeVar, cast

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.codec_bodies import BUILDERS, READERS, unpack
from vfio_user.protocol.constants import (
    ERROR_REPLY_FLAGS,
    FLAG_NO_REPLY,
    HEADER_SIZE,
    MIG_DATA_SIZE,
    TYPE_COMMAND,
    TYPE_REPLY,
    Command,
)
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError

# "=": byte order of the host, no padding (specification: "Protocol Specification").
HEADER: Final = struct.Struct("=HHIII")
REGION_ACCESS: Final = struct.Struct("=HHIIIQII")
DMA_ACCESS: Final = struct.Struct("=HHIIIQQ")
MIG_DATA: Final = struct.Struct("=HHIIIII")

ACCESS_SIZE: Final = REGION_ACCESS.size
"""Header and fixed body of the region and DMA access messages: the payload's offset in the message."""

T = TypeVar("T", bound=m.Message)


def pack_header(message_id: int, command: int, size: int, flags: int = TYPE_COMMAND, error: int = 0) -> bytes:
    """`size` counts the header too. LocalProtocolError when a number does not fit."""
    return _pack(HEADER, message_id, command, size, flags, error)


def pack_error(message_id: int, command: int, errno: int) -> bytes:
    """The whole error reply: a header alone (specification: "Header")."""
    return _pack(HEADER, message_id, command, HEADER_SIZE, ERROR_REPLY_FLAGS, errno)


def pack_region_read(message_id: int, offset: int, region: int, count: int) -> bytes:
    return _pack(REGION_ACCESS, message_id, Command.REGION_READ, ACCESS_SIZE, 0, 0, offset, region, count)


def pack_region_read_reply(message_id: int, offset: int, region: int, data: m.Payload) -> bytes:
    count = len(data)
    size = ACCESS_SIZE + count
    head = _pack(REGION_ACCESS, message_id, Command.REGION_READ, size, TYPE_REPLY, 0, offset, region, count)
    return head + data


def pack_region_write(
    message_id: int, offset: int, region: int, data: m.Payload, *, no_reply: bool = False
) -> bytes:
    count = len(data)
    size, flags = ACCESS_SIZE + count, FLAG_NO_REPLY if no_reply else TYPE_COMMAND
    head = _pack(REGION_ACCESS, message_id, Command.REGION_WRITE, size, flags, 0, offset, region, count)
    return head + data


def pack_region_write_reply(message_id: int, offset: int, region: int, count: int) -> bytes:
    numbers = (message_id, Command.REGION_WRITE, ACCESS_SIZE, TYPE_REPLY, 0, offset, region, count)
    return _pack(REGION_ACCESS, *numbers)


def pack_dma_read(message_id: int, address: int, count: int) -> bytes:
    return _pack(DMA_ACCESS, message_id, Command.DMA_READ, ACCESS_SIZE, 0, 0, address, count)


def pack_dma_read_reply(message_id: int, address: int, data: m.Payload) -> bytes:
    count = len(data)
    size = ACCESS_SIZE + count
    return _pack(DMA_ACCESS, message_id, Command.DMA_READ, size, TYPE_REPLY, 0, address, count) + data


def pack_dma_write(message_id: int, address: int, data: m.Payload, *, no_reply: bool = False) -> bytes:
    count = len(data)
    size, flags = ACCESS_SIZE + count, FLAG_NO_REPLY if no_reply else TYPE_COMMAND
    return _pack(DMA_ACCESS, message_id, Command.DMA_WRITE, size, flags, 0, address, count) + data


def pack_dma_write_reply(message_id: int, address: int, count: int) -> bytes:
    return _pack(DMA_ACCESS, message_id, Command.DMA_WRITE, ACCESS_SIZE, TYPE_REPLY, 0, address, count)


def pack_mig_data_read(message_id: int, count: int) -> bytes:
    numbers = (message_id, Command.MIG_DATA_READ, MIG_DATA.size, 0, 0, MIG_DATA_SIZE + count, count)
    return _pack(MIG_DATA, *numbers)


def pack_mig_data_read_reply_head(message_id: int, count: int) -> bytes:
    """What comes before the `count` bytes of data."""
    size = MIG_DATA.size + count
    numbers = (message_id, Command.MIG_DATA_READ, size, TYPE_REPLY, 0, MIG_DATA_SIZE + count, count)
    return _pack(MIG_DATA, *numbers)


def unpack_header(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int]:
    """message_id, command, size, flags, error. RemoteProtocolError when fewer than 16 bytes are there."""
    return cast(tuple[int, int, int, int, int], unpack(HEADER, "Header", data, start))


def unpack_region_access(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int, int, int, int]:
    """message_id, command, size, flags, error, offset, region, count."""
    return cast(Any, unpack(REGION_ACCESS, "RegionAccess", data, start))  # type: ignore[no-any-return]


def unpack_dma_access(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int, int, int]:
    """message_id, command, size, flags, error, address, count."""
    return cast(Any, unpack(DMA_ACCESS, "DmaAccess", data, start))  # type: ignore[no-any-return]


def _pack(layout: struct.Struct, *numbers: int) -> bytes:
    try:
        return layout.pack(*numbers)
    except struct.error as error:
        raise LocalProtocolError(f"message of command {int(numbers[1])}: {error}") from None


def parse(kind: type[T], body: m.Payload) -> T:
    """As `layouts.parse`."""
    reader = READERS.get(kind)
    if reader is None:
        return layouts.parse(kind, body)
    try:
        return kind(*reader(kind.__name__, memoryview(body)))
    except LocalProtocolError as error:
        raise RemoteProtocolError(error.reason, error.errno) from None


def build_parts(value: m.Message) -> tuple[m.Payload, ...]:
    """As `layouts.build_parts`: the fixed part, then a bulk payload as it is."""
    builder = BUILDERS.get(type(value))
    if builder is None:
        return layouts.build_parts(value)
    try:
        return builder(value)
    except struct.error as error:
        raise LocalProtocolError(f"{type(value).__name__}: {error}") from None
