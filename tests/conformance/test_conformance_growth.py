# SPDX-License-Identifier: BSD-3-Clause
"""A server does not grow: not with the clients that come and go, not with the memory that is mapped."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from conformance import wire
from conformance.driving import read_word
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
            for _ in range(CLIENTS):
                await visit(path, fd, event)
            await before.expect_unchanged()
    finally:
        os.close(event)
    assert child.counters()["clients_served"] == CLIENTS // 4 + CLIENTS


async def test_memory_that_is_mapped_and_unmapped(server: tuple[Path, Child]) -> None:
    path, child = server
    with GuestRam() as ram:
        fd = ram.add(0, 64 * PAGE).fd
        assert fd is not None
        async with connect(path) as raw:
            for i in range(MAPS // 4 + MAPS):
                if i == MAPS // 4:
                    before = Size(child.pid)
                address, pages = i % 50 * 64 * PAGE, i % 7 + 1  # sizes and places differ
                assert (await raw.call(wire.DMA_MAP, wire.dma_map(address, pages * PAGE), fds=[fd])).ok == b""
                assert (await raw.call(wire.DMA_UNMAP, wire.dma_unmap(address, pages * PAGE))).ok
            await before.expect_unchanged()
