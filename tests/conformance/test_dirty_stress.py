# SPDX-License-Identifier: BSD-3-Clause
"""Reports race with writes: a copy that is kept by reports alone is equal to its source in the end.

The device is in a process of its own and writes all the time. The client asks in turn for whole regions and
for pieces, in pages of several sizes, takes a region or two neighbours away and gives them back, and copies
what is dirty while the device goes on. Then the device stops, and after the last report every page must be
the same. Three servers that lose pages show that this finds them.
"""

import fcntl
import mmap
import os
import random
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from conformance import wire
from conformance.dirtying import (
    START,
    STOP,
    dirty_pages,
    get_bitmap,
    logging_report,
    logging_start,
    logging_stop,
    unmap_v1,
)
from conformance.driving import PAGE, enable_bus_master
from conformance.raw import RawClient, connect
from conformance.scribbling import COUNT, ON, RANGES
from conformance.test_serve_process import serving
from migration.moving import SOAK, seeded

PAGES = 1024
PLACES = (0x10000, 0x10000 + PAGES * PAGE, 0x4000_0000, (1 << 64) - PAGES * PAGE)
"""Where the regions begin: two neighbours, one after a hole, and one at the end of the address space."""
ROUNDS = 24 * (50 if SOAK else 1)
SIZES = (0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 4, 9)
"""Of pages: 4 KiB times 2 to the power of one of these; none is as large as a region."""


class Region:
    """Guest memory of the source, and the copy of it."""

    def __init__(self, address: int, sealed: bool, stack: ExitStack) -> None:
        self.address, self.size = address, PAGES * PAGE
        self.fd = os.memfd_create("stress", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, self.fd)
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK if sealed else 0)
        self.source = stack.enter_context(mmap.mmap(self.fd, self.size))
        self.copied = bytearray(self.size)

    def copy(self, start: int, size: int) -> None:
        self.copied[start : start + size] = self.source[start : start + size]

    def different(self) -> list[int]:
        pages = range(0, self.size, PAGE)
        return [
            self.address + at for at in pages if self.source[at : at + PAGE] != self.copied[at : at + PAGE]
        ]


class Copier:
    """Asks for reports and copies what they say."""

    def __init__(self, raw: RawClient, regions: Sequence[Region], numbers: random.Random) -> None:
        self.raw = raw
        self.regions = regions
        self.numbers = numbers
        self.copied_pages = 0

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def report(self, address: int, size: int, page_size: int) -> bytes:
        raise NotImplementedError

    async def unmap(self, address: int, size: int) -> None:
        """Take one region away, or several at once, and copy what they had dirty."""
        raise NotImplementedError

    async def map(self, region: Region) -> None:
        body = wire.dma_map(region.address, region.size)
        assert (await self.raw.call(wire.DMA_MAP, body, fds=[region.fd])).ok == b""

    def ranges(self) -> Iterator[tuple[int, int]]:
        """All of memory: the two neighbours in one range or in uneven pieces, the others each by itself."""
        first = self.regions[0].address
        yield from self._pieces(first, 2 * PAGES * PAGE)
        for region in self.regions[2:]:
            yield from self._pieces(region.address, region.size)

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        cuts = {0, size, *(self.numbers.randrange(1, size // PAGE) * PAGE for _ in range(3))}
        places = sorted(cuts if self.numbers.random() < 0.5 else {0, size})
        for low, high in pairwise(places):
            yield address + low, high - low

    async def round(self) -> None:
        for address, size in self.ranges():
            page_size = PAGE << self.numbers.choice(SIZES)
            self.take(address, size, page_size, await self.report(address, size, page_size))

    def take(self, address: int, size: int, page_size: int, bitmap: bytes) -> None:
        for number in _set_bits(bitmap):
            start = address + number * page_size
            self.copy(start, min(page_size, address + size - start))

    def copy(self, address: int, size: int) -> None:
        """A range of memory without holes."""
        self.copied_pages += size // PAGE
        for region in self.regions:
            low = max(address, region.address)
            high = min(address + size, region.address + region.size)
            if low < high:
                region.copy(low - region.address, high - low)


class V1(Copier):
    async def start(self) -> None:
        assert (await dirty_pages(self.raw, START)).ok == b""

    async def stop(self) -> None:
        assert (await dirty_pages(self.raw, STOP)).ok == b""

    async def report(self, address: int, size: int, page_size: int) -> bytes:
        return (await get_bitmap(self.raw, address, size, page_size)).ok[40:]

    async def unmap(self, address: int, size: int) -> None:
        page_size = PAGE << self.numbers.choice(SIZES)
        reply = (await unmap_v1(self.raw, address, size, page_size)).ok
        self.take(address, size, page_size, reply[40:])


class V2(Copier):
    """Tracks in pages of 8 KiB, so that reports are coarser and finer; an unmap is found in later reports."""

    async def start(self) -> None:
        assert (await logging_start(self.raw, 2 * PAGE)).ok

    async def stop(self) -> None:
        assert (await logging_stop(self.raw)).ok

    async def report(self, address: int, size: int, page_size: int) -> bytes:
        return (await logging_report(self.raw, address, size, page_size)).ok[32:]

    async def unmap(self, address: int, size: int) -> None:
        assert (await self.raw.call(wire.DMA_UNMAP, wire.dma_unmap(address, size))).ok


def _set_bits(bitmap: bytes) -> Iterable[int]:
    for place, byte in enumerate(bitmap):
        while byte:
            yield 8 * place + (byte & -byte).bit_length() - 1
            byte &= byte - 1


@asynccontextmanager
async def scribbler(path: Path, kind: str, seed: int) -> AsyncIterator[RawClient]:
    with serving(f"conformance.scribbling:{kind}", "--socket-path", path, "--set", f"seed={seed}"):
        async with connect(path) as raw:
            await enable_bus_master(raw)
            yield raw


@contextmanager
def memory() -> Iterator[list[Region]]:
    """The third region is reached by file, the others are mapped."""
    with ExitStack() as stack:
        yield [Region(address, number != 2, stack) for number, address in enumerate(PLACES)]


async def panel_write(raw: RawClient, offset: int, data: bytes) -> None:
    assert (await raw.call(wire.REGION_WRITE, wire.region_write(0, offset, data))).ok


async def differences(
    path: Path, edition: type[Copier], kind: str, seed: int
) -> tuple[list[int], int, Copier]:
    """Pages that differ in the end, how many writes there were, and who copied."""
    numbers = random.Random(seed)
    with memory() as regions:
        async with scribbler(path, kind, seed) as raw:
            copier = edition(raw, regions, numbers)
            for region in regions:
                await copier.map(region)
            places = b"".join(struct.pack("<QQ", region.address, region.size) for region in regions)
            await panel_write(raw, RANGES, places)
            await copier.start()
            await panel_write(raw, ON, b"\1")
            for number in range(ROUNDS):
                await copier.round()
                if number % 6 == 3:
                    gone = regions[:2] if number % 12 == 3 else [numbers.choice(regions)]
                    await copier.unmap(gone[0].address, len(gone) * PAGES * PAGE)
                    for region in gone:
                        await copier.map(region)
            await panel_write(raw, ON, b"\0")
            await copier.round()
            await copier.stop()
            reply = await raw.call(wire.REGION_READ, wire.region_read(0, COUNT, 8))
            written = int.from_bytes(reply.ok[16:], "little")
        return [page for region in regions for page in region.different()], written, copier


EDITIONS: dict[str, type[Copier]] = {"v1": V1, "v2": V2}


@pytest.mark.timeout(0 if SOAK else 180)
@pytest.mark.parametrize("edition", EDITIONS)
async def test_no_page_is_lost(tmp_path: Path, edition: str) -> None:
    with seeded(f"dirty pages {edition}") as chance:
        seed = chance.getrandbits(32)
        wrong, written, copier = await differences(tmp_path / "sock", EDITIONS[edition], "Scribbler", seed)
        assert not wrong, f"{len(wrong)} pages differ, the first at {wrong[0]:#x}"
        assert written > 84 * ROUNDS, "the device has been at work all the time"
        assert copier.copied_pages < 0.9 * ROUNDS * len(PLACES) * PAGES, "and not every page was always dirty"


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("kind", ["Unmarked", "Late", "Greedy"])
async def test_a_server_that_loses_pages_is_found_out(tmp_path: Path, edition: str, kind: str) -> None:
    wrong, written, _ = await differences(tmp_path / "sock", EDITIONS[edition], kind, 1)
    assert written > 2_000
    assert wrong
