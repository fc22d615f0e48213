# SPDX-License-Identifier: BSD-3-Clause
"""Guest memory that the scratch device makes dirty, and the questions about it in raw messages."""

import contextlib
import os
import struct
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from conformance import wire
from conformance.driving import DONE, PAGE, enable_bus_master, finished, start_copy
from conformance.moving import GET, LOGGING_REPORT, LOGGING_START, LOGGING_STOP, SET, feature
from conformance.raw import Answer, RawClient, connect
from vfio_user.client.memory import FIXED_SIZE, GuestRam, RamRange

START, STOP, GET_BITMAP = 1, 2, 4
TOP = (1 << 64) - PAGE
SIZE = 16 * PAGE
TIB = 1 << 40
SOURCE = 1 << 50
"""Where the device copies from: a page that it can only read."""
WAYS = {"mapped": (True, FIXED_SIZE), "file": (True, 0), "message": (False, 0)}


class Guest:
    """A client with guest memory; `write` lets the device write."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self._memories: list[GuestRam] = []

    async def map(self, address: int, size: int, way: str = "mapped", *, writable: bool = True) -> GuestRam:
        """Memory of its own for each region, which may so come and go."""
        ram = GuestRam(shared=WAYS[way][0], seals=WAYS[way][1])
        self._memories.append(ram)
        assert (await self.map_again(ram.add(address, size, writable=writable))).ok == b""
        return ram

    async def map_again(self, memory: RamRange) -> Answer:
        fds = () if memory.fd is None else (memory.fd,)
        body = wire.dma_map(memory.address, memory.size, memory.offset, memory.flags)
        return await self.raw.call(wire.DMA_MAP, body, fds=fds)

    async def map_sparse(self, address: int, size: int) -> None:
        """A region of a file without content, as large as one likes."""
        fd = os.memfd_create("conformance", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            assert (await self.raw.call(wire.DMA_MAP, wire.dma_map(address, size), fds=[fd])).ok == b""
        finally:
            os.close(fd)

    async def write(self, address: int, length: int = 8) -> None:
        """The device writes `length` bytes, and is done with it."""
        await start_copy(self.raw, SOURCE, address, length)
        assert await finished(self.raw) == DONE

    async def unmap(self, address: int, size: int) -> None:
        assert (await self.raw.call(wire.DMA_UNMAP, wire.dma_unmap(address, size))).ok

    def close(self) -> None:
        while self._memories:
            self._memories.pop().close()


@contextlib.asynccontextmanager
async def dirty_guest(path: Path, capabilities: dict[str, object] | None = None) -> AsyncIterator[Guest]:
    """A client of the scratch device, which may write at once."""
    async with connect(path, negotiated=False) as raw:
        await raw.negotiate(capabilities)
        guest = Guest(raw)
        try:
            await guest.map(SOURCE, 64 * PAGE, writable=False)
            await enable_bus_master(raw)
            yield guest
        finally:
            guest.close()


def pages(bitmap: bytes) -> set[int]:
    """Bit n, little-endian, is page n."""
    return {n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1}


def rounded(size: int, page_size: int) -> int:
    """The length in bytes of a bitmap: whole u64."""
    return -(-size // (64 * page_size)) * 8


# v1


async def dirty_pages(raw: RawClient, flags: int, argsz: int = 8) -> Answer:
    return await raw.call(wire.DIRTY_PAGES, struct.pack("=II", argsz, flags))


def get_bitmap_body(
    address: int, size: int, pgsize: int = PAGE, length: int | None = None, argsz: int | None = None
) -> bytes:
    length = rounded(size, pgsize) if length is None else length
    argsz = 40 + length if argsz is None else argsz
    return struct.pack("=IIQQQQ", argsz & 0xFFFFFFFF, GET_BITMAP, address, size, pgsize, length)


async def get_bitmap(
    raw: RawClient, address: int, size: int, pgsize: int = PAGE, **rest: int | None
) -> Answer:
    return await raw.call(wire.DIRTY_PAGES, get_bitmap_body(address, size, pgsize, **rest))


async def dirty_v1(raw: RawClient, address: int, size: int, pgsize: int = PAGE) -> set[int]:
    """The dirty pages of a range; the rest of the reply must be the request's."""
    reply = (await get_bitmap(raw, address, size, pgsize)).ok
    assert reply[:40] == get_bitmap_body(address, size, pgsize)
    assert len(reply) == 40 + rounded(size, pgsize)
    return pages(reply[40:])


async def unmap_v1(
    raw: RawClient,
    address: int,
    size: int,
    pgsize: int = PAGE,
    length: int | None = None,
    argsz: int | None = None,
    flags: int = wire.UNMAP_BITMAP,
) -> Answer:
    length = rounded(size, pgsize) if length is None else length
    argsz = 40 + length if argsz is None else argsz
    body = wire.dma_unmap(address, size, flags, argsz) + struct.pack("=QQ", pgsize, length)
    return await raw.call(wire.DMA_UNMAP, body)


# v2


async def logging_start(
    raw: RawClient, page_size: int = PAGE, ranges: Iterable[tuple[int, int]] = (), count: int | None = None
) -> Answer:
    packed = b"".join(struct.pack("=QQ", *one) for one in ranges)
    number = len(packed) // 16 if count is None else count
    data = struct.pack("=QII", page_size, number, 0) + packed
    return await feature(raw, SET | LOGGING_START, data, 8 + len(data))


async def logging_stop(raw: RawClient) -> Answer:
    return await feature(raw, SET | LOGGING_STOP, b"", 8)


async def logging_report(
    raw: RawClient, address: int, length: int, page_size: int = PAGE, argsz: int | None = None
) -> Answer:
    data = struct.pack("=QQQ", address, length, page_size)
    room = 32 + (rounded(length, page_size) if page_size else 0)
    return await feature(raw, GET | LOGGING_REPORT, data, min(room, 0xFFFFFFFF) if argsz is None else argsz)


async def dirty_v2(raw: RawClient, address: int, length: int, page_size: int = PAGE) -> set[int]:
    """The dirty pages of a range; the rest of the reply must be the request's."""
    reply = (await logging_report(raw, address, length, page_size)).ok
    size = 32 + rounded(length, page_size)
    assert reply[:32] == struct.pack("=IIQQQ", size, GET | LOGGING_REPORT, address, length, page_size)
    assert len(reply) == size
    return pages(reply[32:])
