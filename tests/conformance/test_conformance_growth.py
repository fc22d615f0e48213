# SPDX-License-Identifier: BSD-3-Clause
"""A server does not grow: not with the clients that come and go, not with the memory that is mapped."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conformance import wire
from conformance.dirtying import START, dirty_pages
from conformance.driving import DONE, enable_bus_master, finished, read_word, start_copy
from conformance.holdings import expect_holdings, holdings
from conformance.limits import require_library
from conformance.nursery import Child, Order, Zygote
from conformance.raw import connect
from conformance.sizes import Size
from vfio_user.cli.engines import ENGINES
from vfio_user.client.memory import GuestRam
from vfio_user.device_models.scratch import Scratch
from vfio_user.server.engines.engine import Settings

PAGE = 4096
CLIENTS, MAPS = 1000, 10_000
USED = 8
"""Of so many mappings one is also read and written, by the device."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=ENGINES)
def server(request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path) -> Iterator[tuple[Path, Child]]:
    """A server in a process of its own, whatever its engine: its socket, and its control."""
    if request.param == "libvfio-user":
        require_library()
    path = tmp_path / "s"
    order = Order(request.param, Scratch, path, tmp_path / "log", (), Settings(spin_us=0), life=280)
    with closing(zygote.fork(order)) as child:
        yield path, child


async def visit(path: Path, fd: int, event: int) -> None:
    """A client with memory and an interrupt."""
    async with connect(path) as raw:
        assert (await raw.call(wire.DMA_MAP, wire.dma_map(0, 16 * PAGE), fds=[fd])).ok == b""
        body = wire.set_irqs(wire.INTX, wire.DATA_EVENTFD | wire.TRIGGER, 0, 1)
        assert (await raw.call(wire.SET_IRQS, body, fds=[event])).ok == b""
        assert await read_word(raw, 0) == 0


async def test_clients_that_come_and_go(server: tuple[Path, Child]) -> None:
    path, child = server
    alone = holdings(child.pid)
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with GuestRam() as ram:
            fd = ram.add(0, 16 * PAGE).fd
            assert fd is not None
            for _ in range(CLIENTS // 4):
                await visit(path, fd, event)
            await expect_holdings(child.pid, alone)  # it has seen the last one leave
            before = Size(child.pid)
            for number in range(CLIENTS):
                if number == CLIENTS // 2:
                    before.half()
                await visit(path, fd, event)
            await before.expect_unchanged()
    finally:
        os.close(event)
    assert child.counters()["clients_served"] == CLIENTS // 4 + CLIENTS


async def test_memory_that_is_mapped_used_and_unmapped(
    server: tuple[Path, Child], request: pytest.FixtureRequest
) -> None:
    path, child = server
    apart = request.node.callspec.params["server"] == "libvfio-user"
    with GuestRam() as ram:
        fd = ram.add(0, 64 * PAGE).fd
        assert fd is not None
        async with connect(path) as raw:
            await enable_bus_master(raw)
            if not apart:  # the library loses a bitmap with each region that goes: libvfio-user.supp
                assert (await dirty_pages(raw, START)).ok == b""
            for i in range(MAPS // 4 + MAPS):
                if i == MAPS // 4:
                    before = Size(child.pid)
                if i == MAPS // 4 + MAPS // 2:
                    before.half()
                address, pages = i % 50 * 64 * PAGE, i % 7 + 1  # sizes and places differ
                assert (await raw.call(wire.DMA_MAP, wire.dma_map(address, pages * PAGE), fds=[fd])).ok == b""
                if not i % USED:
                    await start_copy(raw, address, address + (pages - 1) * PAGE + 8, 8)
                    assert await finished(raw) == DONE
                assert (await raw.call(wire.DMA_UNMAP, wire.dma_unmap(address, pages * PAGE))).ok
            await before.expect_unchanged()
