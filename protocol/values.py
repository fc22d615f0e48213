# SPDX-License-Identifier: BSD-3-Clause
"""Values inside messages, and the base class that checks every field when a value is built.

A field that does not fit its width raises `LocalProtocolError`; `layouts.parse` turns that into
`RemoteProtocolError`, for there it is the peer who is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from vfio_user.protocol import constants as c
from vfio_user.protocol.errors import LocalProtocolError

Payload: TypeAlias = bytes | bytearray | memoryview


class Structure:
    """Something with fields of fixed width. `WIDTHS` gives the width in bits of each number."""

    __slots__ = ()
    WIDTHS: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        for name, bits in self.WIDTHS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value >> bits:
                raise LocalProtocolError(
                    f"{type(self).__name__}.{name}: {value!r} is no unsigned number of {bits} bits"
                )


class Message(Structure):
    """The body of a request or a reply."""

    __slots__ = ()


def widths(**groups: str) -> dict[str, int]:
    return {name: int(key[1:]) for key, names in groups.items() for name in names.split()}


def require(condition: bool, where: Structure, reason: str) -> None:
    if not condition:
        raise LocalProtocolError(f"{type(where).__name__}: {reason}")


def fill(message: Message, name: str, value: int) -> None:
    if not getattr(message, name):
        object.__setattr__(message, name, value)


UNSET = -1
"""For a number that a peer may also send as 0, which then means 0."""


def fill_unset(message: Message, name: str, value: int) -> None:
    if getattr(message, name) == UNSET:
        object.__setattr__(message, name, value)


@dataclass(frozen=True, slots=True)
class Bitmap(Structure):
    """Page size in bytes, and size in bytes of the bitmap (v1 specification: "VFIO Bitmap Format")."""

    pgsize: int
    size: int
    WIDTHS = widths(u64="pgsize size")


@dataclass(frozen=True, slots=True)
class BitmapRange(Structure):
    """`size` bytes from `iova` (v1 specification: "VFIO Bitmap Range Format"; on the wire 32 bytes)."""

    iova: int
    size: int
    bitmap: Bitmap
    WIDTHS = widths(u64="iova size")


@dataclass(frozen=True, slots=True)
class SparseMmapArea(Structure):
    """A part of the region that may be mapped, in bytes from the region's start."""

    offset: int
    size: int
    WIDTHS = widths(u64="offset size")


@dataclass(frozen=True, slots=True)
class SparseMmapCapability(Structure):
    areas: tuple[SparseMmapArea, ...]

    @property
    def wire_size(self) -> int:
        return 16 + 16 * len(self.areas)


@dataclass(frozen=True, slots=True)
class TypeCapability(Structure):
    """Names a device specific region, as the migration region (type 3, subtype 1) of v1."""

    type: int
    subtype: int
    WIDTHS = widths(u32="type subtype")

    @property
    def wire_size(self) -> int:
        return 16


@dataclass(frozen=True, slots=True)
class OtherCapability(Structure):
    """A capability that this package has no structure for; `data` follows the capability header."""

    id: int
    version: int
    data: bytes = b""
    WIDTHS = widths(u16="id version")

    def __post_init__(self) -> None:
        Structure.__post_init__(self)
        known = (c.RegionInfoCap.SPARSE_MMAP, c.RegionInfoCap.TYPE)
        require(self.id not in known or self.version != 1, self, f"id {self.id} has a class of its own")

    @property
    def wire_size(self) -> int:
        return 8 + len(self.data)


RegionCapability: TypeAlias = SparseMmapCapability | TypeCapability | OtherCapability


@dataclass(frozen=True, slots=True)
class Ioeventfd(Structure):
    """A write to this part of the region signals the eventfd at `fd_index` of the reply's fds."""

    offset: int
    size: int
    fd_index: int
    flags: int = 0
    datamatch: int = 0
    WIDTHS = widths(u32="fd_index flags", u64="offset size datamatch")


@dataclass(frozen=True, slots=True)
class Ioregionfd(Structure):
    offset: int
    size: int
    fd_index: int
    flags: int = 0
    user_data: int = 0
    WIDTHS = widths(u32="fd_index flags", u64="offset size user_data")


@dataclass(frozen=True, slots=True)
class IoeventfdShadow(Structure):
    """An ioeventfd whose last written value is in shared memory (libvfio-user's extension)."""

    offset: int
    size: int
    fd_index: int
    flags: int = 0
    shadow_mem_fd_index: int = 0
    shadow_offset: int = 0
    datamatch: int = 0
    WIDTHS = widths(u32="fd_index flags shadow_mem_fd_index", u64="offset size shadow_offset datamatch")


SubRegion: TypeAlias = Ioeventfd | Ioregionfd | IoeventfdShadow


@dataclass(frozen=True, slots=True)
class RegionWrite(Structure):
    """One of several writes: at most 8 bytes (specification: "Single Device Write Format")."""

    offset: int
    region: int
    data: bytes
    WIDTHS = widths(u32="region", u64="offset")

    def __post_init__(self) -> None:
        Structure.__post_init__(self)
        require(len(self.data) <= c.MAX_WRITE_MULTI_DATA, self, f"data has {len(self.data)} bytes, not 0-8")


# Structures of DEVICE_FEATURE's data
@dataclass(frozen=True, slots=True)
class FeatureMigration(Structure):
    """`flags` is MigrationFlags (specification: "VFIO_DEVICE_FEATURE_MIGRATION")."""

    flags: int
    WIDTHS = widths(u64="flags")


@dataclass(frozen=True, slots=True)
class FeatureMigState(Structure):
    """A MigrationState, or a number that is none (specification: "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE")."""

    device_state: int
    data_fd: int = 0
    WIDTHS = widths(u32="device_state data_fd")


@dataclass(frozen=True, slots=True)
class DmaLoggingRange(Structure):
    iova: int
    length: int
    WIDTHS = widths(u64="iova length")


@dataclass(frozen=True, slots=True)
class DmaLoggingControl(Structure):
    """No ranges: log every write (specification: "VFIO_DEVICE_FEATURE_DMA_LOGGING_START")."""

    page_size: int
    ranges: tuple[DmaLoggingRange, ...] = ()
    WIDTHS = widths(u64="page_size")


@dataclass(frozen=True, slots=True)
class DmaLoggingReport(Structure):
    """`bitmap` is empty in a request; bit n, little-endian, is page n from `iova`."""

    iova: int
    length: int
    page_size: int
    bitmap: Payload = b""
    WIDTHS = widths(u64="iova length page_size")


@dataclass(frozen=True, slots=True)
class Header(Structure):
    """`size` counts the header too; `error` is an errno, valid with FLAG_ERROR (specification: "Header")."""

    message_id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0
    WIDTHS = widths(u16="message_id command", u32="size flags error")
