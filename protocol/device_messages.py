# SPDX-License-Identifier: BSD-3-Clause
"""Messages that set a device up: 1 to 8 and 13."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_user.protocol import constants as c
from vfio_user.protocol.values import (
    UNSET,
    Bitmap,
    IoeventfdShadow,
    Message,
    Payload,
    RegionCapability,
    SubRegion,
    fill,
    fill_unset,
    require,
    widths,
)

# Plain numbers: `&` with an enum costs more than a microsecond.
_WITH_BITMAP, _WITH_BOOLS = int(c.DmaUnmapFlags.GET_DIRTY_BITMAP), int(c.IrqSetFlags.DATA_BOOL)
_EXACTLY_ONE = ((int(c.IRQ_SET_DATA_TYPE_MASK), "DATA"), (int(c.IRQ_SET_ACTION_TYPE_MASK), "ACTION"))


# 1 VERSION: `data` is the JSON text with its NUL, or nothing; capabilities.py reads and writes it.
@dataclass(frozen=True, slots=True)
class VersionRequest(Message):
    major: int
    minor: int
    data: Payload = b""
    WIDTHS = widths(u16="major minor")


@dataclass(frozen=True, slots=True)
class VersionReply(Message):
    major: int
    minor: int
    data: Payload = b""
    WIDTHS = widths(u16="major minor")


# 2 DMA_MAP
@dataclass(frozen=True, slots=True)
class DmaMapRequest(Message):
    """`offset` is that of the region in the file whose descriptor travels with the message."""

    flags: int
    offset: int
    address: int
    size: int
    argsz: int = c.DMA_MAP_SIZE
    WIDTHS = widths(u32="flags argsz", u64="offset address size")


@dataclass(frozen=True, slots=True)
class DmaMapReply(Message):
    pass


# 3 DMA_UNMAP
@dataclass(frozen=True, slots=True)
class DmaUnmapRequest(Message):
    """`bitmap` is there exactly when `flags` has GET_DIRTY_BITMAP."""

    flags: int
    address: int
    size: int
    bitmap: Bitmap | None = None
    argsz: int = UNSET
    WIDTHS = widths(u32="flags argsz", u64="address size")

    def __post_init__(self) -> None:
        whole = c.DMA_UNMAP_SIZE + (c.BITMAP_SIZE + self.bitmap.size if self.bitmap else 0)
        fill_unset(self, "argsz", min(whole, 0xFFFFFFFF))
        Message.__post_init__(self)
        wanted = bool(self.flags & _WITH_BITMAP)
        require(wanted == (self.bitmap is not None), self, "bitmap must go with GET_DIRTY_BITMAP")


@dataclass(frozen=True, slots=True)
class DmaUnmapReply(Message):
    """The request again; `data` is the dirty bitmap, little-endian, bit n is page n of the range."""

    flags: int
    address: int
    size: int
    bitmap: Bitmap | None = None
    data: Payload = b""
    argsz: int = 0
    WIDTHS = widths(u32="flags argsz", u64="address size")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        wanted = bool(self.flags & _WITH_BITMAP)
        require(wanted == (self.bitmap is not None), self, "bitmap must go with GET_DIRTY_BITMAP")
        size = self.bitmap.size if self.bitmap else 0
        require(len(self.data) == size, self, f"data has {len(self.data)} bytes, bitmap.size says {size}")
        fill(self, "argsz", c.DMA_UNMAP_SIZE + (c.BITMAP_SIZE + size if self.bitmap else 0))


# 4 DEVICE_GET_INFO
@dataclass(frozen=True, slots=True)
class DeviceGetInfoRequest(Message):
    argsz: int = c.DEVICE_INFO_SIZE
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0
    WIDTHS = widths(u32="argsz flags num_regions num_irqs")


@dataclass(frozen=True, slots=True)
class DeviceGetInfoReply(Message):
    flags: int
    num_regions: int
    num_irqs: int
    argsz: int = c.DEVICE_INFO_SIZE
    WIDTHS = widths(u32="argsz flags num_regions num_irqs")


# 5 DEVICE_GET_REGION_INFO
@dataclass(frozen=True, slots=True)
class DeviceGetRegionInfoRequest(Message):
    index: int
    argsz: int = c.REGION_INFO_SIZE
    flags: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0
    WIDTHS = widths(u32="argsz flags index cap_offset", u64="size offset")


@dataclass(frozen=True, slots=True)
class DeviceGetRegionInfoReply(Message):
    """`offset` is what the client gives to mmap(). The CAPS flag is set when there are capabilities."""

    flags: int
    index: int
    size: int
    offset: int = 0
    capabilities: tuple[RegionCapability, ...] = ()
    argsz: int = 0
    WIDTHS = widths(u32="argsz flags index", u64="size offset")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        if self.capabilities:
            object.__setattr__(self, "flags", self.flags | c.RegionInfoFlags.CAPS)
        fill(self, "argsz", c.REGION_INFO_SIZE + sum(cap.wire_size for cap in self.capabilities))


# 6 DEVICE_GET_REGION_IO_FDS
@dataclass(frozen=True, slots=True)
class DeviceGetRegionIoFdsRequest(Message):
    index: int
    argsz: int = c.REGION_IO_FDS_SIZE
    flags: int = 0
    count: int = 0
    WIDTHS = widths(u32="argsz flags index count")


@dataclass(frozen=True, slots=True)
class DeviceGetRegionIoFdsReply(Message):
    """`count` sub-regions; `sub_regions` holds them all, or none when the request's argsz was too small."""

    index: int
    sub_regions: tuple[SubRegion, ...] = ()
    count: int = 0
    argsz: int = 0
    flags: int = 0
    WIDTHS = widths(u32="argsz flags index count")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        fill(self, "count", len(self.sub_regions))
        require(len(self.sub_regions) in (0, self.count), self, f"count is {self.count}")
        fill(self, "argsz", c.REGION_IO_FDS_SIZE + self.stride * self.count)

    @property
    def stride(self) -> int:
        """Bytes per entry: all are long when one is a shadow."""
        shadow = any(isinstance(sub_region, IoeventfdShadow) for sub_region in self.sub_regions)
        return c.SUB_REGION_SHADOW_SIZE if shadow else c.SUB_REGION_SIZE


# 7 DEVICE_GET_IRQ_INFO
@dataclass(frozen=True, slots=True)
class DeviceGetIrqInfoRequest(Message):
    index: int
    argsz: int = c.IRQ_INFO_SIZE
    flags: int = 0
    count: int = 0
    WIDTHS = widths(u32="argsz flags index count")


@dataclass(frozen=True, slots=True)
class DeviceGetIrqInfoReply(Message):
    flags: int
    index: int
    count: int
    argsz: int = c.IRQ_INFO_SIZE
    WIDTHS = widths(u32="argsz flags index count")


# 8 DEVICE_SET_IRQS
@dataclass(frozen=True, slots=True)
class DeviceSetIrqsRequest(Message):
    """`data` has `count` values with DATA_BOOL and is empty otherwise; eventfds travel beside the body."""

    flags: int
    index: int
    start: int
    count: int
    data: tuple[bool, ...] = ()
    argsz: int = 0
    WIDTHS = widths(u32="argsz flags index start count")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        for mask, kind in _EXACTLY_ONE:
            one = (self.flags & mask).bit_count() == 1
            require(one, self, f"flags {self.flags:#x} must have exactly one {kind} flag")
        expected = self.count if self.flags & _WITH_BOOLS else 0
        require(len(self.data) == expected, self, f"data has {len(self.data)} values, not {expected}")
        fill(self, "argsz", c.IRQ_SET_SIZE + len(self.data))


@dataclass(frozen=True, slots=True)
class DeviceSetIrqsReply(Message):
    pass


# 13 DEVICE_RESET
@dataclass(frozen=True, slots=True)
class DeviceResetRequest(Message):
    pass


@dataclass(frozen=True, slots=True)
class DeviceResetReply(Message):
    pass
