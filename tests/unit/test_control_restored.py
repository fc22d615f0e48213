# SPDX-License-Identifier: BSD-3-Clause
"""A device that was loaded and stands still, while its new VMM is made to set it up as the old one had it."""

from pathlib import Path
from typing import Any

import pytest
import trio

from migration.control_bed import SMALL_RAM, copy, load, opened, save, serving
from vfio_user.client.config_space import CommandBits
from vfio_user.client.control import open_control
from vfio_user.client.fake_vmm import FakeVmm, open_vmm
from vfio_user.device_models.scratch import Scratch


async def finish_a_copy(vmm: FakeVmm) -> None:
    """Whose interrupt the guest has not served."""
    vmm.ram.write(0x1000, b"x" * 64)
    await vmm.write(0, 0xFE0, 0x1000, width=8)
    await vmm.write(0, 0xFE8, 0x2000, width=8)
    await vmm.write(0, 0xFF0, 64)
    await vmm.write(0, 0xFF8, 1)
    with trio.fail_after(5):
        while await vmm.read(0, 0xFFC) != 2:  # noqa: ASYNC110  # nobody tells
            await trio.sleep(0.001)


async def settle(vmm: FakeVmm) -> None:
    """As QEMU when its ports are written from outside: BARs sized and placed, command last, SET_IRQS anew."""
    await vmm.assign_bars()
    await vmm.config.write(0x3C, 0x0B, 1)
    await vmm.config.set_command(CommandBits.IO | CommandBits.MEMORY | CommandBits.BUS_MASTER)


@pytest.mark.parametrize("blank", [False, True])
async def test_intx_that_was_high_fires_once_after_the_resume(tmp_path: Path, blank: bool) -> None:
    async with (
        opened(tmp_path) as (_, here, vmm),
        serving(tmp_path, Scratch, "t") as served,
        open_control(served.control_path) as there,
        open_vmm(served.path, SMALL_RAM, start=False) as other,
    ):
        await finish_a_copy(vmm)
        await here.call("stop")
        await save(here, tmp_path / "f")
        saved = await here.call("configuration")
        await other.start_incoming()
        await there.call("stop")
        await load(there, tmp_path / "f")
        loaded = await there.call("configuration")
        assert loaded["space"] == saved["space"]
        assert loaded["intx"] == {"pin": 1, "level": True, "unanswered": False}
        if blank:
            await there.call("blank", on=True)
        await other.intx.enable()
        await settle(other)
        assert await other.read(0, 0xFFC) == (0 if blank else 2)
        assert other.intx.count == 0
        told = await there.call("configuration")
        assert [bar["address"] for bar in told["bars"]] == [bar["address"] for bar in saved["bars"]]
        assert (await there.call("state"))["bus_master"]
        await there.call("resume")
        await other.intx.wait()
        assert other.intx.count == 1
        assert await other.read(0, 0xFFC) == 2
        await other.write(0, 0xFFC, 2)
        await other.intx.acknowledge()
        await copy(other, 0, 0x3000, 64)


async def test_a_message_that_was_pending_comes_after_the_resume(tmp_path: Path) -> None:
    """MSI-X: what the guest had masked, and what could not be delivered, arrive with the new eventfds."""
    async with (
        opened(tmp_path) as (_, here, vmm),
        serving(tmp_path, Scratch, "t") as served,
        open_control(served.control_path) as there,
        open_vmm(served.path, SMALL_RAM, start=False) as other,
    ):
        await vmm.enable_msix(1)
        await vmm.msix.disable_vector(0)
        await finish_a_copy(vmm)
        await here.call("stop")
        await save(here, tmp_path / "f")
        msix: dict[str, Any] = (await here.call("configuration"))["msix"]
        assert (msix["enabled"], msix["masked"]) == (True, False)
        await other.start_incoming()
        await there.call("stop")
        await load(there, tmp_path / "f")
        await settle(other)
        await other.enable_msix(1)
        assert (await there.call("configuration"))["msix"] == msix
        assert other.msix.count == 0
        await there.call("resume")
        await other.msix.wait()
        assert other.msix.count == 1
