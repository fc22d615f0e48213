# SPDX-License-Identifier: BSD-3-Clause
"""What both editions of the dirty log have in common, as tests: the module of each makes a class of them."""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest

from conformance import wire
from conformance.dirtying import SIZE, TOP, Guest, dirty_guest
from conformance.driving import PAGE, enable_bus_master, map_private, serve_dma, start_copy
from conformance.engines import Served
from conformance.raw import Answer, RawClient, connect


@dataclass(frozen=True, slots=True)
class Log:
    """The dirty log of one edition. `start` and `stop` look at the reply too; `ask` for a range of pages of
    4 KiB gives the answer, `dirty` the pages in it."""

    start: Callable[[RawClient], Awaitable[None]]
    stop: Callable[[RawClient], Awaitable[None]]
    ask: Callable[[RawClient, int, int], Awaitable[Answer]]
    dirty: Callable[[RawClient, int, int], Awaitable[set[int]]]


class DirtyLogTests:
    """A module that has a subclass `Test...` with its `log` runs them."""

    log: ClassVar[Log]

    @pytest.fixture
    async def guest(self, scratch: Served) -> AsyncIterator[Guest]:
        """One region of 16 pages at 0, logged."""
        async with dirty_guest(scratch.path) as guest:
            await guest.map(0, SIZE)
            await self.log.start(guest.raw)
            yield guest

    async def test_a_report_has_what_was_written_since_the_last_one(self, guest: Guest) -> None:
        await guest.write(3 * PAGE + 5)
        await guest.write(7 * PAGE - 1, 2)
        assert await self.log.dirty(guest.raw, 0, SIZE) == {3, 6, 7}
        assert await self.log.dirty(guest.raw, 0, SIZE) == set()
        await guest.write(3 * PAGE)
        assert await self.log.dirty(guest.raw, 0, SIZE) == {3}

    async def test_stop_ends_and_forgets(self, guest: Guest) -> None:
        await guest.write(2 * PAGE)
        for _ in range(2):
            await self.log.stop(guest.raw)
            assert (await self.log.ask(guest.raw, 0, SIZE)).errno == errno.EINVAL
        await guest.write(3 * PAGE)
        await self.log.start(guest.raw)
        assert await self.log.dirty(guest.raw, 0, SIZE) == set()

    async def test_stop_without_start_is_harmless(self, raw: RawClient) -> None:
        await self.log.stop(raw)

    @pytest.mark.parametrize("way", ["mapped", "file"])
    @pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 5 * PAGE])
    async def test_writes_to_memory_with_a_descriptor_are_logged(
        self, scratch: Served, way: str, length: int
    ) -> None:
        async with dirty_guest(scratch.path) as guest:
            await guest.map(0, SIZE, way)
            await self.log.start(guest.raw)
            await guest.write(2 * PAGE + 9, length)
            assert await self.log.dirty(guest.raw, 0, SIZE) == set(range(2, 2 + (9 + length - 1) // PAGE + 1))

    async def test_writes_by_message_are_not_logged(self, scratch: Served) -> None:
        """The client makes them itself, and knows."""
        async with connect(scratch.path) as raw:
            await map_private(raw, 0, SIZE)
            await enable_bus_master(raw)
            await self.log.start(raw)
            await start_copy(raw, 0, 3 * PAGE, 8)
            await serve_dma(raw, bytearray(SIZE), 2)
            assert await self.log.dirty(raw, 0, SIZE) == set()

    async def test_a_region_that_comes_while_pages_are_logged(self, guest: Guest) -> None:
        await guest.map(1 << 30, 4 * PAGE)
        await guest.write((1 << 30) + 2 * PAGE)
        assert await self.log.dirty(guest.raw, 1 << 30, 4 * PAGE) == {2}

    async def test_a_range_may_span_regions_and_holes(self, scratch: Served) -> None:
        async with dirty_guest(scratch.path) as guest:
            for first, count in ((0, 3), (3, 2), (9, 4), (40, 100)):
                await guest.map(first * PAGE, count * PAGE)
            await self.log.start(guest.raw)
            written = {0, 2, 3, 4, 9, 12, 40, 64, 71, 139}
            for page in written:
                await guest.write(page * PAGE)
            assert await self.log.dirty(guest.raw, 0, 200 * PAGE) == written
            assert await self.log.dirty(guest.raw, 0, 200 * PAGE) == set()

    async def test_where_nothing_is_mapped_nothing_is_dirty(self, guest: Guest) -> None:
        assert await self.log.dirty(guest.raw, 1 << 40, 64 * PAGE) == set()
        assert await self.log.dirty(guest.raw, TOP, PAGE) == set()

    async def test_the_last_page_of_the_address_space(self, guest: Guest) -> None:
        await guest.map(TOP - PAGE, 2 * PAGE)
        await guest.write(TOP)
        assert await self.log.dirty(guest.raw, TOP - 3 * PAGE, 4 * PAGE) == {3}

    async def test_a_reset_leaves_the_log_as_it_is(self, guest: Guest) -> None:
        """It belongs to the client's memory, not to the device; a guest may well reboot while it is moved."""
        await guest.write(2 * PAGE)
        assert (await guest.raw.call(wire.RESET)).ok == b""
        await enable_bus_master(guest.raw)
        await guest.write(5 * PAGE)
        assert await self.log.dirty(guest.raw, 0, SIZE) == {2, 5}

    async def test_logging_ends_with_the_client(self, scratch: Served) -> None:
        async with dirty_guest(scratch.path) as guest:
            await guest.map(0, SIZE)
            await self.log.start(guest.raw)
            await guest.write(0)
        async with dirty_guest(scratch.path) as guest:
            await guest.map(0, SIZE)
            assert (await self.log.ask(guest.raw, 0, SIZE)).errno == errno.EINVAL
            await guest.write(PAGE)
            await self.log.start(guest.raw)
            assert await self.log.dirty(guest.raw, 0, SIZE) == set()
