# SPDX-License-Identifier: BSD-3-Clause
"""Messages that move data: 9 to 12 and 15."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_user.protocol.values import Message, Payload, RegionWrite, require, widths


# 9 REGION_READ, 10 REGION_WRITE
@dataclass(frozen=True, slots=True)
class RegionReadRequest(Message):
    offset: int
    region: int
    count: int
    WIDTHS = widths(u32="region count", u64="offset")


@dataclass(frozen=True, slots=True)
class RegionReadReply(Message):
    offset: int
    region: int
    data: Payload
    WIDTHS = widths(u32="region", u64="offset")


@dataclass(frozen=True, slots=True)
class RegionWriteRequest(Message):
    offset: int
    region: int
    data: Payload
    WIDTHS = widths(u32="region", u64="offset")


@dataclass(frozen=True, slots=True)
class RegionWriteReply(Message):
    offset: int
    region: int
    count: int
    WIDTHS = widths(u32="region count", u64="offset")


# 11 DMA_READ, 12 DMA_WRITE: from the server to the client
@dataclass(frozen=True, slots=True)
class DmaReadRequest(Message):
    address: int
    count: int
    WIDTHS = widths(u64="address count")


@dataclass(frozen=True, slots=True)
class DmaReadReply(Message):
    address: int
    data: Payload
    WIDTHS = widths(u64="address")


@dataclass(frozen=True, slots=True)
class DmaWriteRequest(Message):
    address: int
    data: Payload
    WIDTHS = widths(u64="address")


@dataclass(frozen=True, slots=True)
class DmaWriteReply(Message):
    """None when the client left the body out, as QEMU does."""

    address: int | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        require((self.address is None) == (self.count is None), self, "address and count go together")
        for value in (self.address or 0, self.count or 0):
            require(not value >> 64, self, f"{value!r} is no unsigned number of 64 bits")


# 15 REGION_WRITE_MULTI
@dataclass(frozen=True, slots=True)
class RegionWriteMultiRequest(Message):
    writes: tuple[RegionWrite, ...]


@dataclass(frozen=True, slots=True)
class RegionWriteMultiReply(Message):
    wr_cnt: int
    WIDTHS = widths(u64="wr_cnt")
