# SPDX-License-Identifier: BSD-3-Clause
"""The two lists that construct alone cannot declare: a chain of capabilities, an array of unions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from construct import Construct, Default, Int16un, Int32un, Int64un, Padding, Struct

from vfio_user.protocol import constants as c
from vfio_user.protocol import values as m
from vfio_user.protocol.layout_parts import (
    MAX_ROWS,
    AnyAdapter,
    Nested,
    count_of,
    fields_of,
    require,
    rows_of,
)

CAPABILITY_HEADER = Struct("id" / Int16un, "version" / Int16un, "next" / Int32un)
SPARSE_MMAP_AREA = Nested(m.SparseMmapArea, Struct("offset" / Int64un, "size" / Int64un))
SPARSE_MMAP = Nested(
    m.SparseMmapCapability,
    Struct(
        "nr_areas" / count_of("areas", Int32un), Padding(4), "areas" / rows_of("nr_areas", SPARSE_MMAP_AREA)
    ),
)
REGION_TYPE = Nested(m.TypeCapability, Struct("type" / Int32un, "subtype" / Int32un))
_CAPABILITIES: dict[tuple[int, int], Construct[Any, Any]] = {
    (c.RegionInfoCap.SPARSE_MMAP, 1): SPARSE_MMAP,
    (c.RegionInfoCap.TYPE, 1): REGION_TYPE,
}
_CAPABILITY_IDS: dict[type[m.Structure], tuple[int, int]] = {
    m.SparseMmapCapability: (c.RegionInfoCap.SPARSE_MMAP, 1),
    m.TypeCapability: (c.RegionInfoCap.TYPE, 1),
}


class CapabilityChain(AnyAdapter):
    """The list behind a region info structure (specification: "VFIO cap header format"). `next` counts
    from the structure's start and must grow, so that a chain cannot loop."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> tuple[m.RegionCapability, ...]:
        capabilities: list[m.RegionCapability] = []
        start = context["cap_offset"]
        while start:
            require(start >= c.REGION_INFO_SIZE, "capabilities", f"offset {start} is inside the structure")
            header = CAPABILITY_HEADER.parse(obj[start - c.REGION_INFO_SIZE :])
            end = header.next or c.REGION_INFO_SIZE + len(obj)
            require(end >= start + 8, "capabilities", f"next {header.next} does not follow {start}")
            capabilities.append(self._capability(header, obj[start - 24 : end - c.REGION_INFO_SIZE]))
            start = header.next
        return tuple(capabilities)

    def _capability(self, header: Any, data: bytes) -> m.RegionCapability:
        known = _CAPABILITIES.get((header.id, header.version))
        if known is None:
            return m.OtherCapability(header.id, header.version, data)
        return cast(m.RegionCapability, known.parse(data))

    def _encode(self, obj: tuple[m.RegionCapability, ...], context: Any, path: Any) -> bytes:
        offset, parts = c.REGION_INFO_SIZE, []
        for capability in obj:
            offset += capability.wire_size
            following = offset if capability is not obj[-1] else 0
            parts.append(self._one(capability, following))
        return b"".join(parts)

    def _one(self, capability: m.RegionCapability, following: int) -> bytes:
        if isinstance(capability, m.OtherCapability):
            key, data = (capability.id, capability.version), capability.data
        else:
            key = _CAPABILITY_IDS[type(capability)]
            data = _CAPABILITIES[key].build(capability)
        return CAPABILITY_HEADER.build({"id": key[0], "version": key[1], "next": following}) + data


_SUB_REGION_HEAD = (
    "offset" / Int64un,
    "size" / Int64un,
    "fd_index" / Int32un,
    "type" / Int32un,
    "flags" / Int32un,
)
IOEVENTFD = Struct(*_SUB_REGION_HEAD, Padding(4), "datamatch" / Int64un)
IOREGIONFD = Struct(*_SUB_REGION_HEAD, Padding(4), "user_data" / Int64un)
IOEVENTFD_SHADOW = Struct(
    *_SUB_REGION_HEAD,
    "shadow_mem_fd_index" / Default(Int32un, 0),
    "shadow_offset" / Default(Int64un, 0),
    "datamatch" / Int64un,
)
SUB_REGION_TYPES: dict[type[m.Structure], c.IoFdType] = {
    m.Ioeventfd: c.IoFdType.IOEVENTFD,
    m.Ioregionfd: c.IoFdType.IOREGIONFD,
    m.IoeventfdShadow: c.IoFdType.IOEVENTFD_SHADOW,
}


class SubRegions(AnyAdapter):
    """The array of GET_REGION_IO_FDS. Entries are (argsz - 16) / count bytes apart. Long entries are
    libvfio-user's: there datamatch comes after the shadow fields, in plain ioeventfds too."""

    def _decode(self, obj: bytes, context: Any, path: Any) -> tuple[m.SubRegion, ...]:
        if not obj or not context["count"]:
            return ()
        count = context["count"]
        stride = (context["argsz"] - c.REGION_IO_FDS_SIZE) // count
        require(stride >= c.SUB_REGION_SIZE, "argsz", f"{context['argsz']} for {count} sub-regions")
        require(count <= MAX_ROWS and stride * count <= len(obj), "count", f"{count} in {len(obj)} bytes")
        return tuple(self._entry(obj[i * stride : (i + 1) * stride]) for i in range(count))

    def _entry(self, data: bytes) -> m.SubRegion:
        number = Struct(*_SUB_REGION_HEAD).parse(data).type
        kinds = [kind for kind, value in SUB_REGION_TYPES.items() if value == number]
        require(bool(kinds), "type", f"unknown sub-region type {number}")
        parsed = self._struct(kinds[0], len(data)).parse(data)
        values = {field.name: parsed[field.name] for field in fields(cast(Any, kinds[0]))}
        return cast(m.SubRegion, kinds[0](**values))

    def _struct(self, kind: type[m.Structure], stride: int) -> Construct[Any, Any]:
        if kind is m.Ioregionfd:
            return IOREGIONFD
        return IOEVENTFD_SHADOW if stride >= c.SUB_REGION_SHADOW_SIZE else IOEVENTFD

    def _encode(self, obj: tuple[m.SubRegion, ...], context: Any, path: Any) -> bytes:
        shadow = any(isinstance(sub_region, m.IoeventfdShadow) for sub_region in obj)
        stride = c.SUB_REGION_SHADOW_SIZE if shadow else c.SUB_REGION_SIZE
        return b"".join(self._one(sub_region, stride) for sub_region in obj)

    def _one(self, sub_region: m.SubRegion, stride: int) -> bytes:
        wire = fields_of(sub_region) | {"type": SUB_REGION_TYPES[type(sub_region)]}
        return self._struct(type(sub_region), stride).build(wire).ljust(stride, b"\0")
