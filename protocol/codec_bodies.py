# SPDX-License-Identifier: BSD-3-Clause
"""The bodies of the hot messages with `struct`: one row for each, the class with how to read and to write it.

`codec.py` is the way in; what it says holds here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from vfio_user.protocol import messages as m
from vfio_user.protocol.constants import (
    DMA_UNMAP_SIZE,
    IRQ_SET_SIZE,
    MAX_WRITE_MULTI_DATA,
    DirtyPagesFlags,
    DmaUnmapFlags,
    IrqSetFlags,
)
from vfio_user.protocol.errors import RemoteProtocolError

REGION_ACCESS_BODY: Final = struct.Struct("=QII")
DMA_ACCESS_BODY: Final = struct.Struct("=QQ")
WRITE_MULTI_HEAD: Final = struct.Struct("=Q")
WRITE_MULTI_ENTRY: Final = struct.Struct("=QII8s")
IRQ_SET_BODY: Final = struct.Struct("=IIIII")
MIG_DATA_BODY: Final = struct.Struct("=II")
DMA_MAP_BODY: Final = struct.Struct("=IIQQQ")
DMA_UNMAP_BODY: Final = struct.Struct("=IIQQ")
BITMAP_BODY: Final = struct.Struct("=QQ")
FEATURE_BODY: Final = struct.Struct("=II")
DIRTY_PAGES_BODY: Final = struct.Struct("=II")
DIRTY_RANGE_BODY: Final = struct.Struct("=IIQQQQ")

_Reader = Callable[[str, memoryview], tuple[Any, ...]]
_WITH_BITMAP, _WITH_BOOLS = int(DmaUnmapFlags.GET_DIRTY_BITMAP), int(IrqSetFlags.DATA_BOOL)


def unpack(layout: struct.Struct, name: str, data: m.Payload, start: int = 0) -> tuple[Any, ...]:
    try:
        return layout.unpack_from(data, start)
    except struct.error:
        raise RemoteProtocolError(f"{name}: {len(data) - start} bytes, not {layout.size}") from None


def _payload(name: str, body: memoryview, count: int, head: int, field: str = "count") -> memoryview:
    if len(body) != head + count:
        raise RemoteProtocolError(f"{name}.{field}: {count}, but {len(body) - head} bytes follow")
    return body[head:]


def _read_region(name: str, body: memoryview) -> tuple[Any, ...]:
    return unpack(REGION_ACCESS_BODY, name, body)


def _read_region_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    offset, region, count = unpack(REGION_ACCESS_BODY, name, body)
    return offset, region, _payload(name, body, count, REGION_ACCESS_BODY.size)


def _read_dma(name: str, body: memoryview) -> tuple[Any, ...]:
    return unpack(DMA_ACCESS_BODY, name, body)


def _read_dma_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    address, count = unpack(DMA_ACCESS_BODY, name, body)
    return address, _payload(name, body, count, DMA_ACCESS_BODY.size)


def _read_nothing(name: str, body: memoryview) -> tuple[Any, ...]:
    return ()


def _read_dma_map(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, *fields = unpack(DMA_MAP_BODY, name, body)
    return *fields, argsz


def _read_dma_unmap(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, *fields = unpack(DMA_UNMAP_BODY, name, body)
    if not fields[0] & _WITH_BITMAP:
        return *fields, None, argsz
    return *fields, m.Bitmap(*unpack(BITMAP_BODY, name, body, DMA_UNMAP_SIZE)), argsz


def _read_dma_unmap_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    *fields, bitmap, argsz = _read_dma_unmap(name, body)
    head = DMA_UNMAP_SIZE + (BITMAP_BODY.size if bitmap is not None else 0)
    return *fields, bitmap, body[head:], argsz


def _build_dma_unmap(value: m.DmaUnmapRequest | m.DmaUnmapReply) -> tuple[m.Payload, ...]:
    head = DMA_UNMAP_BODY.pack(value.argsz, value.flags, value.address, value.size)
    if value.bitmap is not None:
        head += BITMAP_BODY.pack(value.bitmap.pgsize, value.bitmap.size)
    return (head, value.data) if isinstance(value, m.DmaUnmapReply) and value.data else (head,)


def _read_irq_set(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, flags, index, start, count = unpack(IRQ_SET_BODY, name, body)
    if not flags & _WITH_BOOLS:
        return flags, index, start, count, (), argsz
    data = body[IRQ_SET_SIZE : IRQ_SET_SIZE + count]
    return flags, index, start, count, tuple(map(bool, data)), argsz


def _build_irq_set(value: m.DeviceSetIrqsRequest) -> tuple[m.Payload, ...]:
    numbers = (value.argsz, value.flags, value.index, value.start, value.count)
    return (IRQ_SET_BODY.pack(*numbers) + bytes(value.data),)


def _read_mig_data(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, size = unpack(MIG_DATA_BODY, name, body)
    return size, argsz


def _read_mig_data_payload(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, size = unpack(MIG_DATA_BODY, name, body)
    return _payload(name, body, size, MIG_DATA_BODY.size, "size"), argsz


def _read_mig_data_padded(name: str, body: memoryview) -> tuple[Any, ...]:
    """What follows the data means nothing."""
    _, size = unpack(MIG_DATA_BODY, name, body)
    return _read_mig_data_payload(name, body[: MIG_DATA_BODY.size + size])


def _read_feature(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, flags = unpack(FEATURE_BODY, name, body)
    return flags, body[FEATURE_BODY.size :], argsz


def _read_dirty_pages(name: str, body: memoryview) -> tuple[Any, ...]:
    argsz, flags = unpack(DIRTY_PAGES_BODY, name, body)
    if flags != DirtyPagesFlags.GET_BITMAP:
        return flags, None, argsz
    iova, size, *bitmap = unpack(DIRTY_RANGE_BODY, name, body)[2:]
    return flags, m.BitmapRange(iova, size, m.Bitmap(*bitmap)), argsz


def _build_dirty_pages_reply(value: m.DirtyPagesReply) -> tuple[m.Payload, ...]:
    if not value.flags and not value.argsz:
        return ()
    if value.range is None:
        return (DIRTY_PAGES_BODY.pack(value.argsz, value.flags),)
    place, bitmap = (value.range.iova, value.range.size), value.range.bitmap
    return DIRTY_RANGE_BODY.pack(value.argsz, value.flags, *place, bitmap.pgsize, bitmap.size), value.data


def _read_writes(name: str, body: memoryview) -> tuple[Any, ...]:
    (count,) = unpack(WRITE_MULTI_HEAD, name, body)
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


READERS: Mapping[type[m.Structure], _Reader] = {
    m.DmaMapRequest: _read_dma_map,
    m.DmaMapReply: _read_nothing,
    m.DmaUnmapRequest: _read_dma_unmap,
    m.DmaUnmapReply: _read_dma_unmap_payload,
    m.DeviceSetIrqsRequest: _read_irq_set,
    m.DeviceSetIrqsReply: _read_nothing,
    m.RegionReadRequest: _read_region,
    m.RegionReadReply: _read_region_payload,
    m.RegionWriteRequest: _read_region_payload,
    m.RegionWriteReply: _read_region,
    m.DmaReadRequest: _read_dma,
    m.DmaReadReply: _read_dma_payload,
    m.DmaWriteRequest: _read_dma_payload,
    m.RegionWriteMultiRequest: _read_writes,
    m.MigDataReadRequest: _read_mig_data,
    m.MigDataReadReply: _read_mig_data_padded,
    m.MigDataWriteRequest: _read_mig_data_payload,
    m.DeviceFeatureRequest: _read_feature,
    m.DirtyPagesRequest: _read_dirty_pages,
}

_REGION, _DMA, _MIG = REGION_ACCESS_BODY.pack, DMA_ACCESS_BODY.pack, MIG_DATA_BODY.pack
BUILDERS: Mapping[type[m.Structure], Callable[[Any], tuple[m.Payload, ...]]] = {
    m.DmaMapRequest: lambda v: (DMA_MAP_BODY.pack(v.argsz, v.flags, v.offset, v.address, v.size),),
    m.DmaMapReply: lambda _: (),
    m.DmaUnmapRequest: _build_dma_unmap,
    m.DmaUnmapReply: _build_dma_unmap,
    m.DeviceSetIrqsRequest: _build_irq_set,
    m.DeviceSetIrqsReply: lambda _: (),
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
    m.DeviceFeatureReply: lambda v: (FEATURE_BODY.pack(v.argsz, v.flags), v.data, *v.more),
    m.DirtyPagesReply: _build_dirty_pages_reply,
}
