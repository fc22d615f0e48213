# SPDX-License-Identifier: BSD-3-Clause
"""The dirty log in a controller's hands, and write-through."""

import errno
from pathlib import Path

import pytest

from migration.control_bed import (
    SMALL_RAM,
    copy,
    listen,
    opened,
    refused,
    serving,
    until,
)
from vfio_user.client.control import open_control
from vfio_user.client.errors import RemoteError
from vfio_user.client.fake_vmm import VmmOptions, open_vmm
from vfio_user.protocol import messages as m
from vfio_user.protocol.errors import DeviceError


async def test_the_log_is_reported_and_handed_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        told = listen(vmm)
        vmm.ram.write(0, bytes(range(256)) * 64)
        assert await controller.call("log-start") == {"page_size": 4096}
        await copy(vmm, 0, 0x10800, 0x2000)
        await copy(vmm, 0, 0x40000, 10)
        figures = (await controller.call("state"))["dirty_log"]
        assert figures == {
            "owner": "controller",
            "page_size": 4096,
            "pages": 4,
            "bytes": 0x4000,
            "lost": False,
        }
        report = await controller.call("log-report")
        assert report == {
            "pages": 4,
            "bytes": 0x4000,
            "ranges": [[0x10000, 0x3000], [0x40000, 0x1000]],
            "complete": True,
        }
        with refused("the device runs"):
            await controller.call("log-hand-over")
        stopped = await controller.call("stop", describe=True)
        assert stopped["dirty_log"] == figures
        assert stopped["configuration"] == await controller.call("configuration")
        before = vmm.ram.read(0, 1 << 20)
        result = await controller.call("log-hand-over")
        assert (result["pages"], result["bytes"]) == (4, 4)
        assert told == [(a, 1) for a in (0x10000, 0x11000, 0x12000, 0x40000)]
        assert vmm.ram.read(0, 1 << 20) == before
        assert (await controller.call("log-report"))["pages"] == 0
        served.server.host.table.find(0).dirty.mark(0x20000, 0x20000)  # type: ignore[union-attr]
        told.clear()
        result = await controller.call("log-hand-over", whole=True)
        assert (result["pages"], result["bytes"]) == (32, 0x20000)
        assert told == [(0x20000, 0x10000), (0x30000, 0x10000)]
        assert vmm.ram.read(0, 1 << 20) == before


async def test_a_hand_over_of_many_pages(tmp_path: Path) -> None:
    async with opened(tmp_path, options=VmmOptions(((0, 16 << 20),))) as (served, controller, _):
        await controller.call("log-start")
        await controller.call("stop")
        served.server.host.table.find(0).dirty.mark_all()  # type: ignore[union-attr]
        assert (await controller.call("log-hand-over"))["pages"] == 4096
        assert (await controller.call("log-report"))["pages"] == 0


async def test_what_the_client_refuses_stays_in_the_log(tmp_path: Path) -> None:
    async with opened(tmp_path) as (served, controller, vmm):
        await controller.call("log-start")
        await controller.call("stop")
        served.server.host.table.find(0).dirty.mark(0, 0x3000)  # type: ignore[union-attr]
        write = vmm.dma_write

        def refuse_one(address: int, data: m.Payload) -> None:
            if address == 0x1000:
                raise DeviceError("the bus master is off", errno.ENODEV)
            write(address, data)

        vmm.dma_write = refuse_one  # type: ignore[method-assign]
        with refused("1 writes failed.*ENODEV"):
            await controller.call("log-hand-over")
        assert (await controller.call("log-report"))["ranges"] == [[0x1000, 0x1000]]
        served.server.host.dma.enabled = False
        with refused("bus master is off"):
            await controller.call("log-hand-over")


async def test_the_log_has_one_owner(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        with refused("no controller has started"):
            await controller.call("log-report")
        for wrong in (5000, 2048, 0, -4096, 1 << 31):
            with refused("page_size: a power of two from 4096 to 1073741824"):
                await controller.call("log-start", page_size=wrong)
        await controller.call("log-start")
        assert await controller.call("log-start", page_size=4096) == {"page_size": 4096}
        with refused("a log with pages of 4096 bytes runs"):
            await controller.call("log-start", page_size=8192)
        with pytest.raises(RemoteError, match="EBUSY"):
            await vmm.client.dirty_pages_start()
        await controller.call("log-stop")
        await vmm.client.dirty_pages_start()
        for method in ("log-start", "log-stop"):
            with refused("the client"):
                await controller.call(method)
        assert (await controller.call("state"))["dirty_log"]["owner"] == "client"


async def test_a_report_that_clears(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        await controller.call("log-start", page_size=65536)
        await copy(vmm, 0, 0x10800, 10)
        assert (await controller.call("log-report", clear=True))["ranges"] == [[0x10000, 0x10000]]
        assert (await controller.call("log-report"))["pages"] == 0


async def test_write_through(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, controller, vmm):
        told = listen(vmm)
        vmm.ram.write(0, b"abcdefgh" * 1024)
        await controller.call("log-start")
        await copy(vmm, 0, 0x10000, 4096)
        assert told == []
        assert await controller.call("write-through", on=True) == {"on": True}
        await copy(vmm, 0, 0x20000, 4096)
        assert told == [(0x20000, 4096)]
        assert vmm.ram.read(0x20000, 4096) == b"abcdefgh" * 512
        assert (await controller.call("log-report"))["ranges"] == [[0x10000, 0x1000]]
        await controller.call("write-through", on=False)
        await copy(vmm, 0, 0x30000, 4096)
        assert told == [(0x20000, 4096)]


async def test_write_through_ends_with_the_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, open_control(served.control_path) as controller:
        with refused("no client"):
            await controller.call("write-through", on=True)
        async with open_vmm(served.path, SMALL_RAM):
            await controller.call("write-through", on=True)
        state = await until(controller, lambda state: not state["client"]["attached"])
        assert not state["write_through"]
