# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's view of a device restored at the destination of a move by QEMU; without it the device is dead.

Only the view is tested here: no device writes memory while the guest moves.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from guest_moves import by_tool
from guest_moves.by_qemu import held_before_switchover
from guest_moves.vectors import (
    FIRE,
    GUEST,
    HELD,
    MARK,
    NOBODYS,
    PENDING,
    SILENT,
    Guest,
    model,
    require_marks,
    require_vectors,
    set_up,
    use_vectors,
)
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.qemu.command import Chipset, MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, Moving, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu_migration.qmp import Qmp, open_qmp
from vfio_user.client.qemu_migration.view import (
    CannotRestore,
    View,
    ask_chipset,
    ask_places,
    check,
    restore,
    take_view,
)
from vfio_user.device_models.device import IrqIndex

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

FUNCTION_0 = ("-device", "virtio-rng-pci,bus=pcie.0,addr=4.0,multifunction=on")


async def carry(source: ControlClient, destination: ControlClient, path: Path) -> None:
    with path.open("wb") as file:
        await source.call("save", fd=file.fileno())
    await destination.call("stop")
    with path.open("rb") as file:
        await destination.call("load", fd=file.fileno())


@dataclass(slots=True)
class Move:
    """A move as it stands when QEMU has done its part: the destination is paused."""

    qmp: Qmp
    control: ControlClient
    view: View


@contextlib.asynccontextmanager
async def moved(moving: Moving) -> AsyncIterator[Move]:
    """In the block QEMU has moved the guest and the device's state is at the destination; after it the guest
    goes on there."""
    source, destination = moving.here, await moving.prepare()
    async with (
        open_control(source.controls["dev"]) as here,
        open_control(destination.controls["dev"]) as there,
    ):
        async with held_before_switchover(source, destination) as (qmp, _):
            await here.call("stop")
            assert check(await here.call("configuration"), await ask_chipset(qmp)) == []
            before = await here.call("configuration")
            view = await take_view(qmp, await ask_places(qmp), before, "dev")
            assert await here.call("configuration") == before
            await carry(here, there, source.folder / "state")
        async with open_qmp(str(destination.qmp)) as qmp:
            yield Move(qmp, there, view)
            await there.call("resume")
            await qmp.execute("cont")
    await moving.moved(destination)


async def move(moving: Moving) -> None:
    async with moved(moving) as done:
        await restore(done.qmp, done.control, "dev", done.view)


@contextlib.asynccontextmanager
async def guest_with(
    lab: Lab, namespace: Namespace, device: Model, **options: Any
) -> AsyncIterator[tuple[Moving, Guest]]:
    places = one_host(namespace)
    async with open_moving(lab, replace(GUEST, **options), [device], places) as moving:
        yield moving, await set_up(moving.guest)


async def require_refusals(qmp: Qmp, control: ControlClient, view: View) -> None:
    places, configuration = await ask_places(qmp), await control.call("configuration")
    for id in ("other", ""):
        with pytest.raises(CannotRestore, match="no PCI device with the id"):
            await take_view(qmp, places, configuration, id)
    elsewhere = replace(view, regions={**view.regions, 0: 0x1000})
    with pytest.raises(CannotRestore, match="BAR 0 was mapped at 0x1000, and is at"):
        await restore(qmp, control, "dev", elsewhere)


async def test_without_it_the_device_is_dead_and_with_it_goes_on(lab: Lab, namespace: Namespace) -> None:
    async with guest_with(lab, namespace, model()) as (moving, guest):
        await use_vectors(guest)
        before = await guest.space()
        async with moved(moving) as done:
            view = done.view
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() != before
        with pytest.raises(AssertionError):
            await require_marks(guest)
        with pytest.raises(AssertionError):
            await require_vectors(guest, 2)
        side = moving.here
        async with open_qmp(str(side.qmp)) as qmp, open_control(side.controls["dev"]) as control:
            await qmp.execute("stop")
            assert view.masked == (PENDING, SILENT, HELD)
            assert view.owed == {IrqIndex.MSI: 0, IrqIndex.MSIX: 1 << HELD}
            await control.call("stop")
            await restore(qmp, control, "dev", view)
            await control.call("resume")
            await require_refusals(qmp, control, view)
            await qmp.execute("cont")
        assert await guest.space() == before
        await require_marks(guest)
        await require_vectors(guest)


async def test_i440fx_and_a_device_without_bus_master_or_memory(lab: Lab, namespace: Namespace) -> None:
    """The table comes back also when the guest has taken memory and bus master from the device."""
    async with guest_with(lab, namespace, model(), chipset="i440fx") as (moving, guest):
        for command in (7, 3, 0):
            await use_vectors(guest)
            await guest.configure(f"COMMAND={command:x}")
            before = await guest.space()
            await move(moving)
            guest = replace(guest, machine=moving.guest)
            assert await guest.space() == before
            await guest.configure("COMMAND=7")
            await require_marks(guest)
            await require_vectors(guest)


async def test_behind_a_root_port_with_an_extended_space(lab: Lab, namespace: Namespace) -> None:
    async with guest_with(lab, namespace, model("Express", root_port=True)) as (moving, guest):
        await use_vectors(guest)
        await guest.configure("108.l=12345678", "CAP_EXP+8.w=0a5f")
        before = await guest.space()
        assert "\n100: 0b 00 01 00 01 00 00 01 78 56 34 12" in before
        await move(moving)
        await by_tool.move(moving)  # on, with what is pending
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() == before
        await require_marks(guest)
        await require_vectors(guest)


async def test_a_second_function_with_msi_and_then_asleep(lab: Lab, namespace: Namespace) -> None:
    async with guest_with(lab, namespace, model(addr="4.1"), extra=FUNCTION_0) as (moving, guest):
        await guest.configure(f"CAP_MSI+4.l={NOBODYS:x}", "CAP_MSI+c.w=1230", "CAP_MSI+2.w=21")
        before = await guest.space()
        await move(moving)
        await by_tool.move(moving)
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() == before
        await require_marks(guest)
        await guest.write((guest.bars[0] + FIRE, 2))
        await guest.require_words({NOBODYS: 0x1232})
        await guest.configure("CAP_PM+4.w=3")
        asleep, mark = await guest.space(), await guest.words(guest.bars[0] + MARK)
        assert mark != [0xCAFE]
        await move(moving)
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() == asleep
        assert await guest.words(guest.bars[0] + MARK) == mark
        await guest.configure("CAP_PM+4.w=0")
        await require_marks(guest)


E1000 = Model("e1000", "dev", ["--net", "echo"])
REGISTERS = (
    "lspci -xxx -d 8086:100e; ethtool -d eth0 | grep -E '^0x0....: (CTRL|STATUS|RCTL|RDLEN|TCTL|TDLEN)'"
)


@pytest.mark.parametrize("chipset", ["q35", "i440fx"])
async def test_a_card_with_its_driver(lab: Lab, namespace: Namespace, chipset: Chipset) -> None:
    options = MachineOptions(chipset, memory_mib=128)
    async with open_moving(lab, options, [E1000], one_host(namespace)) as moving:
        await moving.guest.check("ip address add 10.0.2.15/24 dev eth0; ip link set eth0 up")
        await moving.guest.check("ping -c 2 -i 0.2 -W 5 10.0.2.2", timeout=60)
        before = await moving.guest.check(REGISTERS)
        await move(moving)
        assert await moving.guest.check(REGISTERS) == before
        await moving.guest.check("ping -c 2 -i 0.2 -W 5 10.0.2.2", timeout=60)
        assert "Reset" not in await moving.guest.kernel_log()
