# SPDX-License-Identifier: BSD-3-Clause
"""`blank`: a client's accesses to the BARs of a stopped device that the model never learns of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migration.control_bed import SMALL_RAM, Served, copy, load, opened, refused, save, serving, until
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.fake_vmm import FakeVmm, open_vmm
from vfio_user.device_models.device import Host
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Buffer, Region
from vfio_user.protocol import messages as m

CONFIG = 7


class Ticking(Region):
    """Each access leaves a trace, as a register that is cleared when it is read."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reads = self.writes = 0

    def read(self, offset: int, count: int) -> bytes:
        self.reads += 1
        return b"\xaa" * count

    def write(self, offset: int, data: Buffer) -> None:
        self.writes += 1


class Touchy(PciDevice):
    model = "touchy"
    summary = "counts what reaches it"
    identity = Identity(vendor_id=0x1234, device_id=0x0042, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: Host) -> None:
        self.memory, self.ports = Ticking(4096), Ticking(64)
        super().__init__(host, {0: Bar(self.memory), 1: Bar(self.ports, io=True)})


def trace(served: Served) -> tuple[int, int, int, int]:
    device = served.server.device
    assert isinstance(device, Touchy)
    return device.memory.reads, device.memory.writes, device.ports.reads, device.ports.writes


async def test_nothing_reaches_a_device_that_is_blank(tmp_path: Path) -> None:
    async with opened(tmp_path, Touchy) as (served, controller, vmm):
        assert await vmm.read(0, 8) == 0xAAAAAAAA
        await controller.call("stop")
        assert await vmm.read(0, 8) == 0xAAAAAAAA
        assert await controller.call("blank", on=True) == {"on": True}
        assert (await controller.call("state"))["blank"]
        before = trace(served)
        for width in (1, 2, 4, 8):
            assert await vmm.read(0, 8, width) == 0
            await vmm.write(0, 8, 1, width)
        assert await vmm.read(1, 0, 4) == 0
        await vmm.write(1, 0, 5)
        assert await vmm.client.region_read(0, 0, 4096) == bytes(4096)
        await vmm.client.region_write_multi([m.RegionWrite(0, 0, b"1234"), m.RegionWrite(8, 0, b"1234")])
        assert await vmm.config.read(0, 4) == 0x0042_1234
        assert trace(served) == before
        assert await controller.call("blank", on=False) == {"on": False}
        assert await vmm.read(0, 8) == 0xAAAAAAAA
        assert trace(served)[0] == before[0] + 1


async def _resume(controller: ControlClient, vmm: FakeVmm) -> None:
    assert await controller.call("resume") == {"running": True}


async def _client_reset(controller: ControlClient, vmm: FakeVmm) -> None:
    await vmm.client.reset()


async def _reset(controller: ControlClient, vmm: FakeVmm) -> None:
    assert await controller.call("reset") == {"running": True}


@pytest.mark.parametrize("end", [_resume, _client_reset, _reset])
async def test_what_ends_it(tmp_path: Path, end: Callable[[ControlClient, FakeVmm], Any]) -> None:
    async with opened(tmp_path, Touchy) as (_, controller, vmm):
        await controller.call("stop")
        await controller.call("blank", on=True)
        await end(controller, vmm)
        assert not (await controller.call("state"))["blank"]
        assert await vmm.read(0, 8) == 0xAAAAAAAA
        await controller.call("stop")
        assert await vmm.read(0, 8) == 0xAAAAAAAA


async def test_it_ends_with_the_client(tmp_path: Path) -> None:
    async with serving(tmp_path, Touchy) as served, open_control(served.control_path) as controller:
        async with open_vmm(served.path, SMALL_RAM):
            await controller.call("stop")
            await controller.call("blank", on=True)
        await until(controller, lambda state: not state["client"]["attached"])
        assert not served.server.host.blank


async def test_only_a_stopped_device_can_be_blank(tmp_path: Path) -> None:
    async with opened(tmp_path, Touchy) as (_, controller, vmm):
        with refused("stop it first"):
            await controller.call("blank", on=True)
        assert await controller.call("blank", on=False) == {"on": False}
        assert await vmm.read(0, 8) == 0xAAAAAAAA


async def test_an_unmask_is_heard_all_the_same(tmp_path: Path) -> None:
    """What it is for: a VMM without KVM lowers its pin at any access to a BAR. State is saved meanwhile."""
    async with opened(tmp_path) as (_, controller, vmm):
        await vmm.write(0, 0xFF0, 16)
        await vmm.write(0, 0xFF8, 1)
        await vmm.intx.wait()
        await controller.call("stop")
        await controller.call("blank", on=True)
        assert (await controller.call("configuration"))["intx"]["unanswered"]
        assert await vmm.read(0, 0xFFC) == 0
        await vmm.intx.acknowledge()
        assert (await controller.call("configuration"))["intx"] == {
            "pin": 1,
            "level": True,
            "unanswered": False,
        }
        assert not (await save(controller, tmp_path / "f"))["running"]
        assert (await controller.call("state"))["blank"]
        await load(controller, tmp_path / "f")
        await controller.call("resume")
        await vmm.intx.wait()
        assert await vmm.read(0, 0xFFC) == 2
        await vmm.write(0, 0xFFC, 2)
        await vmm.intx.acknowledge()
        await copy(vmm, 0, 0x1000, 16)
