# SPDX-License-Identifier: BSD-3-Clause
"""Every structure on the wire, declared once: the specification in code, and the oracle of codec.py.

A `Layout` joins a construct declaration with the value class that has fields of the same names. Fields of
the wire that a value does not have (reserved ones, counts of what follows) are computed here. All numbers
are in the byte order of the host (specification: "Protocol Specification"). A body may be longer than its
structure, as libvfio-user's sample client sends some; the rest is ignored. A *payload* must have exactly
the announced length.

No construct exception leaves this module: what cannot be parsed raises `RemoteProtocolError`, what cannot
be built `LocalProtocolError`, both with EINVAL and a reason that names structure and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

from construct import (
    Bytes,
    Computed,
    ConstructError,
    ExprAdapter,
    GreedyBytes,
    If,
    IfThenElse,
    Int16un,
    Int32un,
    Int64un,
    Optional,
    Padding,
    Rebuild,
    Select,
    Struct,
    len_,
    this,
)

from vfio_user.protocol import constants as c
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from vfio_user.protocol.layout_lists import CapabilityChain, SubRegions
from vfio_user.protocol.layout_parts import Layout, Nested, count_of, rows_of

T = TypeVar("T", bound=m.Structure)

HEADER = Struct(
    "message_id" / Int16un, "command" / Int16un, "size" / Int32un, "flags" / Int32un, "error" / Int32un
)
VERSION = Struct("major" / Int16un, "minor" / Int16un)
EMPTY = Struct()
DMA_MAP = Struct(
    "argsz" / Int32un, "flags" / Int32un, "offset" / Int64un, "address" / Int64un, "size" / Int64un
)
BITMAP = Nested(m.Bitmap, Struct("pgsize" / Int64un, "size" / Int64un))
DMA_UNMAP = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "address" / Int64un,
    "size" / Int64un,
    "bitmap" / If(this.flags & int(c.DmaUnmapFlags.GET_DIRTY_BITMAP), BITMAP),
)
DEVICE_INFO = Struct("argsz" / Int32un, "flags" / Int32un, "num_regions" / Int32un, "num_irqs" / Int32un)

REGION_INFO = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "index" / Int32un,
    "cap_offset" / Int32un,
    "size" / Int64un,
    "offset" / Int64un,
)
REGION_INFO_REPLY = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "index" / Int32un,
    "cap_offset" / Rebuild(Int32un, lambda context: c.REGION_INFO_SIZE if context.capabilities else 0),
    "size" / Int64un,
    "offset" / Int64un,
    "capabilities" / CapabilityChain(GreedyBytes),
)

REGION_IO_FDS = Struct("argsz" / Int32un, "flags" / Int32un, "index" / Int32un, "count" / Int32un)
REGION_IO_FDS_REPLY = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "index" / Int32un,
    "count" / Int32un,
    "sub_regions" / SubRegions(GreedyBytes),
)
IRQ_INFO = Struct("argsz" / Int32un, "flags" / Int32un, "index" / Int32un, "count" / Int32un)
IRQ_SET = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "index" / Int32un,
    "start" / Int32un,
    "count" / Int32un,
    "data"
    / IfThenElse(
        this.flags & int(c.IrqSetFlags.DATA_BOOL),
        ExprAdapter(Bytes(this.count), lambda raw, _: tuple(map(bool, raw)), lambda bools, _: bytes(bools)),
        Computed(()),
    ),
)
REGION_ACCESS = Struct("offset" / Int64un, "region" / Int32un, "count" / Int32un)
DMA_ACCESS = Struct("address" / Int64un, "count" / Int64un)
# The specification's table gives the reply's count 4 bytes, libvfio-user sends 8, QEMU no body at all.
DMA_WRITE_REPLY = Struct("address" / Int64un, "count" / Select(Int64un, Int32un))
BITMAP_RANGE = Nested(m.BitmapRange, Struct("iova" / Int64un, "size" / Int64un, "bitmap" / BITMAP))
DIRTY_PAGES = Struct(
    "argsz" / Int32un,
    "flags" / Int32un,
    "range" / If(this.flags == int(c.DirtyPagesFlags.GET_BITMAP), BITMAP_RANGE),
)
DIRTY_PAGES_REPLY = Struct("argsz" / Int32un, "flags" / Int32un, "range" / Optional(BITMAP_RANGE))
REGION_WRITE_ENTRY = Nested(
    m.RegionWrite,
    Struct(
        "offset" / Int64un,
        "region" / Int32un,
        "count" / count_of("data", Int32un, c.MAX_WRITE_MULTI_DATA),
        "data"
        / ExprAdapter(
            Bytes(c.MAX_WRITE_MULTI_DATA),
            lambda data, context: data[: context["count"]],
            lambda data, _: bytes(data).ljust(c.MAX_WRITE_MULTI_DATA, b"\0"),
        ),
    ),
)
REGION_WRITE_MULTI = Struct(
    "wr_cnt" / Rebuild(Int64un, len_(this.writes)), "writes" / rows_of("wr_cnt", REGION_WRITE_ENTRY)
)
REGION_WRITE_MULTI_REPLY = Struct("wr_cnt" / Int64un)
DEVICE_FEATURE = Struct("argsz" / Int32un, "flags" / Int32un)
FEATURE_MIGRATION = Struct("flags" / Int64un)
FEATURE_MIG_STATE = Struct("device_state" / Int32un, "data_fd" / Int32un)
DMA_LOGGING_RANGE = Nested(m.DmaLoggingRange, Struct("iova" / Int64un, "length" / Int64un))
DMA_LOGGING_CONTROL = Struct(
    "page_size" / Int64un,
    "num_ranges" / count_of("ranges", Int32un),
    Padding(4),
    "ranges" / rows_of("num_ranges", DMA_LOGGING_RANGE),
)
DMA_LOGGING_REPORT = Struct("iova" / Int64un, "length" / Int64un, "page_size" / Int64un)
MIG_DATA = Struct("argsz" / Int32un, "size" / Int32un)

_ALL = (
    Layout(m.Header, HEADER),
    Layout(m.VersionRequest, VERSION, payload="data"),
    Layout(m.VersionReply, VERSION, payload="data"),
    Layout(m.DmaMapRequest, DMA_MAP),
    Layout(m.DmaMapReply, EMPTY),
    Layout(m.DmaUnmapRequest, DMA_UNMAP),
    Layout(m.DmaUnmapReply, DMA_UNMAP, payload="data"),
    Layout(m.DeviceGetInfoRequest, DEVICE_INFO),
    Layout(m.DeviceGetInfoReply, DEVICE_INFO),
    Layout(m.DeviceGetRegionInfoRequest, REGION_INFO),
    Layout(m.DeviceGetRegionInfoReply, REGION_INFO_REPLY),
    Layout(m.DeviceGetRegionIoFdsRequest, REGION_IO_FDS),
    Layout(m.DeviceGetRegionIoFdsReply, REGION_IO_FDS_REPLY),
    Layout(m.DeviceGetIrqInfoRequest, IRQ_INFO),
    Layout(m.DeviceGetIrqInfoReply, IRQ_INFO),
    Layout(m.DeviceSetIrqsRequest, IRQ_SET),
    Layout(m.DeviceSetIrqsReply, EMPTY),
    Layout(m.RegionReadRequest, REGION_ACCESS),
    Layout(m.RegionReadReply, REGION_ACCESS, payload="data", length="count"),
    Layout(m.RegionWriteRequest, REGION_ACCESS, payload="data", length="count"),
    Layout(m.RegionWriteReply, REGION_ACCESS),
    Layout(m.DmaReadRequest, DMA_ACCESS),
    Layout(m.DmaReadReply, DMA_ACCESS, payload="data", length="count"),
    Layout(m.DmaWriteRequest, DMA_ACCESS, payload="data", length="count"),
    Layout(m.DmaWriteReply, DMA_WRITE_REPLY, optional=True),
    Layout(m.DeviceResetRequest, EMPTY),
    Layout(m.DeviceResetReply, EMPTY),
    Layout(m.DirtyPagesRequest, DIRTY_PAGES),
    Layout(m.DirtyPagesReply, DIRTY_PAGES_REPLY, payload="data", optional=True),
    Layout(m.RegionWriteMultiRequest, REGION_WRITE_MULTI),
    Layout(m.RegionWriteMultiReply, REGION_WRITE_MULTI_REPLY),
    Layout(m.DeviceFeatureRequest, DEVICE_FEATURE, payload="data"),
    Layout(m.DeviceFeatureReply, DEVICE_FEATURE, payload="data"),
    Layout(m.FeatureMigration, FEATURE_MIGRATION),
    Layout(m.FeatureMigState, FEATURE_MIG_STATE),
    Layout(m.DmaLoggingControl, DMA_LOGGING_CONTROL),
    Layout(m.DmaLoggingReport, DMA_LOGGING_REPORT, payload="bitmap"),
    Layout(m.MigDataReadRequest, MIG_DATA),
    # libvfio-user sends as many bytes as were asked for, however few the data has.
    Layout(m.MigDataReadReply, MIG_DATA, payload="data", length="size", padded=True),
    Layout(m.MigDataWriteRequest, MIG_DATA, payload="data", length="size"),
    Layout(m.MigDataWriteReply, EMPTY),
)

LAYOUTS: Mapping[type[m.Structure], Layout] = {layout.kind: layout for layout in _ALL}


def parse(kind: type[T], body: m.Payload) -> T:
    """The body of a message, or the data of a feature, as a value.

    A payload in the value is a view of `body`, not a copy. RemoteProtocolError when it does not parse.
    """
    try:
        return cast(T, LAYOUTS[kind].parse(memoryview(body)))
    except ProtocolError as error:
        reason = error.reason if kind.__name__ in error.reason else f"{kind.__name__}.{error.reason}"
        raise RemoteProtocolError(reason) from None
    except (ConstructError, OverflowError) as error:
        raise RemoteProtocolError(_explain(kind, error)) from None


def build_parts(value: m.Structure) -> tuple[m.Payload, ...]:
    """The bytes of a value; a bulk payload is a part of its own, not copied."""
    try:
        return LAYOUTS[type(value)].build(value)
    except (ConstructError, OverflowError) as error:
        raise LocalProtocolError(_explain(type(value), error)) from None


def build(value: m.Structure) -> bytes:
    return b"".join(build_parts(value))


def _explain(kind: type[m.Structure], error: Exception) -> str:
    """`DmaMapRequest.size: stream read less …`: construct's path, without its own decoration."""
    path = getattr(error, "path", None) or ""
    field = ".".join(part for part in path.split(" -> ") if part not in ("(parsing)", "(building)", ""))
    reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
    return f"{kind.__name__}.{field or 'body'}: {reason}"
