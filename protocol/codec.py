# SPDX-License-Identifier: BSD-3-Clause
"""The hot messages with `struct`: the same bytes as layouts.py gives (Hypothesis compares them), 20-70
times faster.

HEADER, REGION_ACCESS and DMA_ACCESS cover header and fixed body in one, so that a server's loop needs one
`unpack_from` and one `pack` for each message:

    message_id, command, size, flags, error, offset, region, count = REGION_ACCESS.unpack_from(buffer, start)
    message_id, command, size, flags, error, address, count = DMA_ACCESS.unpack_from(buffer, start)

The payload follows at offset 32 of the message. `parse` and `build_parts` work on bodies of every kind of
message: the hot ones here, all others through layouts.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast

from vfio_user.protocol import layouts
from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    ERROR_REPLY_FLAGS,
    FLAG_NO_REPLY,
    HEADER_SIZE,
    MAX_WRITE_MULTI_DATA,
    TYPE_COMMAND,
    TYPE_REPLY,
    Command,
    DirtyPagesFlags,
)
from vfio_user.protocol.errors import LocalProtocolError, RemoteProtocolError

# "=": byte order of the host, no padding (specification: "Protocol Specification").
HEADER: Final = struct.Struct("=HHIII")
REGION_ACCESS: Final = struct.Struct("=HHIIIQII")
DMA_ACCESS: Final = struct.Struct("=HHIIIQQ")
REGION_ACCESS_BODY: Final = struct.Struct("=QII")
DMA_ACCESS_BODY: Final = struct.Struct("=QQ")
WRITE_MULTI_HEAD: Final = struct.Struct("=Q")
WRITE_MULTI_ENTRY: Final = struct.Struct("=QII8s")
IRQ_SET_BODY: Final = struct.Struct("=IIIII")
MIG_DATA_BODY: Final = struct.Struct("=II")
FEATURE_BODY: Final = struct.Struct("=II")
DIRTY_PAGES_BODY: Final = struct.Struct("=II")
DIRTY_RANGE_BODY: Final = struct.Struct("=IIQQQQ")

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


def unpack_header(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int]:
    """message_id, command, size, flags, error. RemoteProtocolError when fewer than 16 bytes are there."""
    return cast(tuple[int, int, int, int, int], _unpack(HEADER, "Header", data, start))


def unpack_region_access(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int, int, int, int]:
    """message_id, command, size, flags, error, offset, region, count."""
    return cast(Any, _unpack(REGION_ACCESS, "RegionAccess", data, start))  # type: ignore[no-any-return]


def unpack_dma_access(data: m.Payload, start: int = 0) -> tuple[int, int, int, int, int, int, int]:
    """message_id, command, size, flags, error, address, count."""
    return cast(Any, _unpack(DMA_ACCESS, "DmaAccess", data, start))  # type: ignore[no-any-return]


def _pack(layout: struct.Struct, *numbers: int) -> bytes:
    try:
        return layout.pack(*numbers)
    except struct.error as error:
        raise LocalProtocolError(f"message of command {int(numbers[1])}: {error}") from None


def _unpack(layout: struct.Struct, name: str, data: m.Payload, start: int = 0) -> tuple[Any, ...]:
    try:
        return layout.unpack_from(data, start)
    except struct.error:
        raise RemoteProtocolError(f"{name}: {len(data) - start} bytes, not {layout.size}") from None


def _payload(name: str, body: memoryview, count: int, head: int, field: str = "count") -> memoryview:
    if len(body) != head + count:
        raise RemoteProtocolError(f"{name}.{field}: {count}, but {len(body) - head} bytes follow")
    return body[head:]


# Bodies: one row for each hot message, the class with how to read and how to write it.
_Parser = Callable[[str, memoryview], tuple[Any, ...]]


def _read_region(name: str, body: memoryview) -> tuple[Any, ...]:
    return _unpack(REGION_ACCESS_BODY, name, body)


def _read_region_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    offset, region, count = _unpack(REGION_ACCESS_BODY, name, body)
    return offset, region, _payload(name, body, count, REGION_ACCESS_BODY.size)


def _read_dma(name: str, body: memoryview) -> tuple[Any, ...]:
    return _unpack(DMA_ACCESS_BODY, name, body)


def _read_dma_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    address, count = _unpack(DMA_ACCESS_BODY, name, body)
    return address, _payload(name, body, count, DMA_ACCESS_BODY.size)


def _read_mig_data(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, size = _unpack(MIG_DATA_BODY, name, body)
    return size, argsz


def _read_mig_data_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, size = _unpack(MIG_DATA_BODY, name, body)
    return _payload(name, body, size, MIG_DATA_BODY.size, "size"), argsz


def _read_feature(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, flags = _unpack(FEATURE_BODY, name, body)
    return flags, body[FEATURE_BODY.size :], argsz


def _read_dirty_pages(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, flags = _unpack(DIRTY_PAGES_BODY, name, body)
    if flags != DirtyPagesFlags.GET_BITMAP:
        return flags, None, argsz
    iova, size, *bitmap = _unpack(DIRTY_RANGE_BODY, name, body)[2:]
    return flags, m.BitmapRange(iova, size, m.Bitmap(*bitmap)), argsz


def _build_dirty_pages_reply(value: m.DirtyPagesReply) -> tuple[m.Payload, ...]:
    if not value.flags and not value.argsz:
        return ()
    if value.range is None:
        return (DIRTY_PAGES_BODY.pack(value.argsz, value.flags),)
    place, bitmap = (value.range.iova, value.range.size), value.range.bitmap
    return DIRTY_RANGE_BODY.pack(value.argsz, value.flags, *place, bitmap.pgsize, bitmap.size), value.data


def _read_writes(name: str, body: memoryview) -> tuple[Any, ...]:
    (count,) = _unpack(WRITE_MULTI_HEAD, name, body)
    end = WRITE_MULTI_HEAD.size + WRITE_MULTI_ENTRY.size * count
    if end > len(body):
        raise RemoteProtocolError(f"{name}.wr_cnt: {count} writes do not fit in {len(body)} bytes")
    return (tuple(map(_write, WRITE_MULTI_ENTRY.iter_unpack(body[WRITE_MULTI_HEAD.size : end]))),)


def _write(entry: tuple[int, int, int, bytes]) -> m.RegionWrite:
    offset, region, count, data = entry
    if count > MAX_WRITE_MULTI_DATA:
        raise RemoteProtocolError(f"RegionWriteMultiRequest.writes.count: {count} is more than 8")
    return m.RegionWrite(offset, region, data[:count])


def _build_writes(value: m.RegionWriteMultiRequest) -> tuple[m.Payload, ...]:
    entries = (WRITE_MULTI_ENTRY.pack(w.offset, w.region, len(w.data), w.data) for w in value.writes)
    return (WRITE_MULTI_HEAD.pack(len(value.writes)) + b"".join(entries),)


_PARSERS: Mapping[type[m.Structure], _Parser] = {
    m.RegionReadRequest: _read_region,
    m.RegionReadReply: _read_region_payload,
    m.RegionWriteRequest: _read_region_payload,
    m.RegionWriteReply: _read_region,
    m.DmaReadRequest: _read_dma,
    m.DmaReadReply: _read_dma_payload,
    m.DmaWriteRequest: _read_dma_payload,
    m.RegionWriteMultiRequest: _read_writes,
    m.MigDataReadRequest: _read_mig_data,
    m.MigDataReadReply: _read_mig_data_payload,
    m.MigDataWriteRequest: _read_mig_data_payload,
    m.DeviceFeatureRequest: _read_feature,
    m.DirtyPagesRequest: _read_dirty_pages,
}

_REGION, _DMA, _MIG = REGION_ACCESS_BODY.pack, DMA_ACCESS_BODY.pack, MIG_DATA_BODY.pack
_BUILDERS: Mapping[type[m.Structure], Callable[[Any], tuple[m.Payload, ...]]] = {
    m.RegionReadRequest: lambda v: (_REGION(v.offset, v.region, v.count),),
    m.RegionReadReply: lambda v: (_REGION(v.offset, v.region, len(v.data)), v.data),
    m.RegionWriteRequest: lambda v: (_REGION(v.offset, v.region, len(v.data)), v.data),
    m.RegionWriteReply: lambda v: (_REGION(v.offset, v.region, v.count),),
    m.DmaReadRequest: lambda v: (_DMA(v.address, v.count),),
    m.DmaReadReply: lambda v: (_DMA(v.address, len(v.data)), v.data),
    m.DmaWriteRequest: lambda v: (_DMA(v.address, len(v.data)), v.data),
    m.RegionWriteMultiRequest: _build_writes,
    m.MigDataReadRequest: lambda v: (_MIG(v.argsz, v.size),),
    m.MigDataReadReply: lambda v: (_MIG(v.argsz, v.size), v.data, *v.more),
    m.MigDataWriteRequest: lambda v: (_MIG(v.argsz, len(v.data)), v.data),
    m.DeviceFeatureReply: lambda v: (FEATURE_BODY.pack(v.argsz, v.flags), v.data),
    m.DirtyPagesReply: _build_dirty_pages_reply,
}


def parse(kind: type[T], body: m.Payload) -> T:
    """As `layouts.parse`."""
    parser = _PARSERS.get(kind)
    if parser is None:
        return layouts.parse(kind, body)
    try:
        return kind(*parser(kind.__name__, memoryview(body)))
    except LocalProtocolError as error:
        raise RemoteProtocolError(error.reason, error.errno) from None


def build_parts(value: m.Message) -> tuple[m.Payload, ...]:
    """As `layouts.build_parts`: the fixed part, then a bulk payload as it is."""
    builder = _BUILDERS.get(type(value))
    if builder is None:
        return layouts.build_parts(value)
    try:
        return builder(value)
    except struct.error as error:
        raise LocalProtocolError(f"{type(value).__name__}: {error}") from None
