# SPDX-License-Identifier: BSD-3-Clause
"""Messages that a VMM took and had not delivered: `fired` of `configuration`, and the method `pend`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import SMALL_RAM, Served, ignore, load, opened, refused, save, serving, until
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.fake_vmm import FakeVmm, open_vmm
from vfio_user.device_models.device import Device, IrqIndex
from vfio_user.device_models.fake_host import FakeHost
from vfio_user.device_models.pci import Bar, Identity
from vfio_user.device_models.pci_device import PciDevice
from vfio_user.device_models.regions import Buffer, Region
from vfio_user.server.engines.libvfio_user_irqs import LibraryIrqs

FIRE = 0
"""In BAR 0: fires the vector that is written."""
VECTORS = 12


class Fire(Region):
    def __init__(self) -> None:
        super().__init__(16)
        self.device: Messages | None = None

    def read(self, offset: int, count: int) -> bytes:
        return bytes(count)

    def write(self, offset: int, data: Buffer) -> None:
        assert self.device is not None
        self.device.interrupts.notify(data[0])


class Messages(PciDevice):
    model = "messages"
    summary = "fires what it is told to"
    identity = Identity(vendor_id=0x1234, device_id=0x0043, class_code=0xFF0000)
    state_version = 1

    def __init__(self, host: Any) -> None:
        fire = Fire()
        super().__init__(host, {0: Bar(fire)}, msi_vectors=4, msix_vectors=VECTORS)
        fire.device = self


class Forgetful(Messages):
    """A model that keeps nothing pending, as the contract's own default."""

    model = "forgetful"

    def pend_irq(self, index: IrqIndex, vector: int) -> bool:
        return Device.pend_irq(self, index, vector)


async def fired(controller: ControlClient, name: str = "msix") -> int:
    told = await controller.call("configuration")
    return int.from_bytes(bytes.fromhex(told[name]["fired"]), "little")


@asynccontextmanager
async def arrived(
    folder: Path, state: Path, name: str
) -> AsyncIterator[tuple[Served, ControlClient, FakeVmm]]:
    """A device with a state, stopped, under a VMM that has no vector yet."""
    async with (
        serving(folder, Messages, name) as served,
        open_control(served.control_path) as controller,
        open_vmm(served.path, SMALL_RAM, start=False) as vmm,
    ):
        await vmm.start_incoming()
        await controller.call("stop")
        await load(controller, state)
        yield served, controller, vmm


async def count_of(vmm: FakeVmm, vector: int) -> int:
    """How often a vector has come, once all is done that was asked for before."""
    await vmm.config.read(0, 2)
    return vmm.msix.vectors[vector].count


async def test_what_was_fired_is_told_until_the_client_goes(tmp_path: Path) -> None:
    """A VMM disables an index to add vectors to it; what it keeps pending it keeps over that."""
    async with serving(tmp_path, Messages) as served, open_control(served.control_path) as controller:
        assert (await fired(controller), await fired(controller, "msi")) == (0, 0)
        async with open_vmm(served.path, SMALL_RAM) as vmm:
            await vmm.enable_msix(9)
            await vmm.msix.mask(5)
            for vector in (8, 1, 5, 10, 1):
                await vmm.write(0, FIRE, vector, 1)
            assert await fired(controller) == 1 << 8 | 1 << 1
            await vmm.msix.unmask(5)
            await vmm.grow_msix(10)
            assert (await fired(controller), await fired(controller, "msi")) == (1 << 8 | 1 << 5 | 1 << 1, 0)
            told = (await controller.call("configuration"))["msix"]
            assert len(told["fired"]) == 4
        await until(controller, lambda state: not state["client"]["attached"])
        assert await fired(controller) == 0


async def test_msi_too(tmp_path: Path) -> None:
    async with opened(tmp_path, Messages) as (_, controller, vmm):
        await vmm.enable_msi(4)
        await vmm.write(0, FIRE, 2, 1)
        assert (await fired(controller, "msi"), await fired(controller)) == (4, 0)
        await controller.call("stop")
        assert await controller.call("pend", index=1, vectors="0a") == {"pended": 2}
        await controller.call("resume")
        await vmm.config.read(0, 2)
        assert [event.count for event in vmm.msi.vectors] == [0, 1, 1, 1]


async def test_a_pended_vector_fires_once_at_the_second_host_after(tmp_path: Path) -> None:
    """Signalled to the first VMM, which had it masked; masked still while the second has it."""
    async with opened(tmp_path, Messages) as (_, controller, vmm):
        await vmm.enable_msix(VECTORS)
        await vmm.write(0, FIRE, 9, 1)
        await controller.call("stop")
        assert await fired(controller) == 1 << 9
        await save(controller, tmp_path / "1")
    async with arrived(tmp_path, tmp_path / "1", "t") as (_, controller, vmm):
        assert await controller.call("pend", vectors="0002") == {"pended": 1}
        await vmm.enable_msix(4)
        await controller.call("resume")
        assert await fired(controller) == 0
        await controller.call("stop")
        await save(controller, tmp_path / "2")
    async with arrived(tmp_path, tmp_path / "2", "u") as (_, controller, vmm):
        await vmm.enable_msix(4)
        await controller.call("resume")
        await vmm.grow_msix(VECTORS)
        assert await count_of(vmm, 9) == 1
        await vmm.grow_msix(VECTORS)
        await controller.call("stop")
        await controller.call("resume")
        assert await count_of(vmm, 9) == 0  # new eventfds, and nothing is owed
        assert await fired(controller) == 1 << 9


async def test_a_vector_that_can_be_delivered_fires_with_the_resume(tmp_path: Path) -> None:
    async with opened(tmp_path, Messages) as (_, controller, vmm):
        await vmm.enable_msix(VECTORS)
        await controller.call("stop")
        assert await controller.call("pend", index=2, vectors="0108") == {"pended": 2}
        assert await controller.call("pend", index=2, vectors="01") == {"pended": 1}
        assert await count_of(vmm, 0) == 0
        await controller.call("resume")
        assert (await count_of(vmm, 0), await count_of(vmm, 11), await count_of(vmm, 1)) == (1, 1, 0)


async def test_a_reset_forgets_what_is_owed(tmp_path: Path) -> None:
    async with opened(tmp_path, Messages) as (_, controller, vmm):
        await controller.call("stop")
        await controller.call("pend", vectors="01")
        await controller.call("reset")
        await vmm.enable_msix(VECTORS)
        assert await count_of(vmm, 0) == 0


async def test_what_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, Messages) as (_, controller, vmm):
        with refused("no controller has stopped the device"):
            await controller.call("pend", vectors="01")
        await controller.call("stop")
        with refused("there are 12 of MSIX"):
            await controller.call("pend", vectors="0110")
        with refused("there are 4 of MSI"):
            await controller.call("pend", index=1, vectors="10")
        for wrong in ({"vectors": ""}, {"vectors": "00" * 257}, {"vectors": [1]}, {"vectors": "1"}, {}):
            with refused("vectors: 1 to 256 bytes"):
                await controller.call("pend", **wrong)
        for index in (0, 3, "2"):
            with refused("index: a number from 1 to 2"):
                await controller.call("pend", index=index, vectors="01")
        await controller.call("resume")
        await vmm.enable_msix(VECTORS)
        assert await count_of(vmm, 0) == 0


async def test_not_while_a_state_comes_in(tmp_path: Path) -> None:
    """It would be overwritten."""
    reader, writer = os.pipe()
    async with opened(tmp_path, Messages) as (_, controller, _), trio.open_nursery() as nursery:
        await controller.call("stop")
        nursery.start_soon(partial(ignore, controller, "load", reader))
        await until(controller, lambda state: state["transfer"])
        with refused("a load is under way"):
            await controller.call("pend", vectors="01")
        await controller.call("cancel")
    os.close(reader)
    os.close(writer)


async def test_a_model_that_keeps_nothing_pending(tmp_path: Path) -> None:
    async with opened(tmp_path, Forgetful) as (_, controller, _):
        await controller.call("stop")
        with refused("a device of the model forgetful keeps no message pending"):
            await controller.call("pend", vectors="01")
        assert await controller.call("pend", vectors="00") == {"pended": 0}


@pytest.mark.parametrize("index", [IrqIndex.MSI, IrqIndex.MSIX])
def test_the_model_shows_it_as_pending_and_fires_it_once(index: IrqIndex) -> None:
    host = FakeHost()
    device = host.device = Messages(host)
    host.enabled_irqs, host.masked = {index}, {(index, 3)}
    assert device.pend_irq(index, 3)
    assert device.regions[1].read(2048, 2) == (b"\x08\0" if index is IrqIndex.MSIX else b"\0\0")
    host.unmask(index, 3)
    host.unmask(index, 3)
    assert host.fired == [(index, 3)]


def test_the_librarys_engine_remembers_too() -> None:
    ready: set[int] = set()
    irqs = LibraryIrqs(ready.__contains__, {IrqIndex.MSIX: 4}, lambda index, vector: None)
    assert not irqs.trigger(IrqIndex.MSIX, 2)
    assert irqs.fired_vectors(IrqIndex.MSIX) == 0
    ready |= {0, 2}
    assert irqs.trigger(IrqIndex.MSIX, 2)
    assert irqs.trigger(IrqIndex.MSIX, 0)
    assert (irqs.fired_vectors(IrqIndex.MSIX), irqs.fired_vectors(IrqIndex.MSI)) == (5, 0)
    irqs.release()
    assert irqs.fired_vectors(IrqIndex.MSIX) == 0
