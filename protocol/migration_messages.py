# SPDX-License-Identifier: BSD-3-Clause
"""Messages that move a device to another host: 14 (v1) and 16 to 18 (v2)."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_user.protocol import constants as c
from vfio_user.protocol.values import (
    UNSET,
    BitmapRange,
    Message,
    Payload,
    fill,
    fill_unset,
    require,
    widths,
)


# 14 DIRTY_PAGES (v1)
@dataclass(frozen=True, slots=True)
class DirtyPagesRequest(Message):
    """`range` is there exactly when `flags` is GET_BITMAP."""

    flags: int
    range: BitmapRange | None = None
    argsz: int = UNSET
    WIDTHS = widths(u32="argsz flags")

    def __post_init__(self) -> None:
        whole = c.BITMAP_RANGE_SIZE + self.range.bitmap.size if self.range else 0
        fill_unset(self, "argsz", min(c.DIRTY_PAGES_SIZE + whole, 0xFFFFFFFF))
        Message.__post_init__(self)
        require(self.flags in tuple(c.DirtyPagesFlags), self, f"flags {self.flags:#x} must be exactly one")
        wanted = self.flags == c.DirtyPagesFlags.GET_BITMAP
        require(wanted == (self.range is not None), self, "range must go with GET_BITMAP")


@dataclass(frozen=True, slots=True)
class DirtyPagesReply(Message):
    """To START and STOP: all at default, an empty body. To GET_BITMAP: the request's range and the
    bitmap, or neither of them when the request's argsz was too small."""

    flags: int = 0
    range: BitmapRange | None = None
    data: Payload = b""
    argsz: int = 0
    WIDTHS = widths(u32="argsz flags")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        require(self.flags in (0, c.DirtyPagesFlags.GET_BITMAP), self, f"flags {self.flags:#x}")
        require(bool(self.flags) or self.range is None, self, "range must go with GET_BITMAP")
        size = self.range.bitmap.size if self.range else 0
        require(len(self.data) == size, self, f"data has {len(self.data)} bytes, bitmap.size says {size}")
        if self.flags:
            fill(self, "argsz", c.DIRTY_PAGES_SIZE + (c.BITMAP_RANGE_SIZE + size if self.range else 0))


# 16 DEVICE_FEATURE: values.py has the structures of `data`
@dataclass(frozen=True, slots=True)
class DeviceFeatureRequest(Message):
    """`flags` is a DeviceFeature index with DeviceFeatureFlags; `argsz` what the reply body may be long."""

    flags: int
    data: Payload = b""
    argsz: int = UNSET
    WIDTHS = widths(u32="argsz flags")

    def __post_init__(self) -> None:
        fill_unset(self, "argsz", c.DEVICE_FEATURE_SIZE + len(self.data))
        Message.__post_init__(self)

    @property
    def feature(self) -> int:
        return self.flags & c.DEVICE_FEATURE_MASK


@dataclass(frozen=True, slots=True)
class DeviceFeatureReply(Message):
    """Who builds one may leave the data in several buffers: `data`, and what follows in `more`."""

    flags: int
    data: Payload = b""
    argsz: int = 0
    more: tuple[Payload, ...] = ()
    WIDTHS = widths(u32="argsz flags")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        fill(self, "argsz", c.DEVICE_FEATURE_SIZE + len(self.data) + sum(map(len, self.more)))

    @property
    def feature(self) -> int:
        return self.flags & c.DEVICE_FEATURE_MASK


# 17 MIG_DATA_READ, 18 MIG_DATA_WRITE
@dataclass(frozen=True, slots=True)
class MigDataReadRequest(Message):
    size: int
    argsz: int = UNSET
    WIDTHS = widths(u32="argsz size")

    def __post_init__(self) -> None:
        fill_unset(self, "argsz", min(c.MIG_DATA_SIZE + self.size, 0xFFFFFFFF))
        Message.__post_init__(self)


@dataclass(frozen=True, slots=True)
class MigDataReadReply(Message):
    """Fewer bytes than asked for: the end of the stream (in PRE_COPY: nothing more now).

    Who builds one may leave the data in several buffers: `data`, and what follows in `more`.
    """

    data: Payload
    argsz: int = 0
    more: tuple[Payload, ...] = ()
    WIDTHS = widths(u32="argsz")

    def __post_init__(self) -> None:
        Message.__post_init__(self)
        fill(self, "argsz", c.MIG_DATA_SIZE + self.size)

    @property
    def size(self) -> int:
        """Bytes of data."""
        return len(self.data) + sum(map(len, self.more))


@dataclass(frozen=True, slots=True)
class MigDataWriteRequest(Message):
    data: Payload
    argsz: int = UNSET
    WIDTHS = widths(u32="argsz")

    def __post_init__(self) -> None:
        fill_unset(self, "argsz", c.MIG_DATA_SIZE + len(self.data))
        Message.__post_init__(self)


@dataclass(frozen=True, slots=True)
class MigDataWriteReply(Message):
    pass
