# SPDX-License-Identifier: BSD-3-Clause
"""QEMU's view of a device restored at the destination of a move by QEMU; without it the device is dead.

Only the view is tested here: no device writes memory while the guest moves.
"""

import contextlib
import os
import re
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from guest_moves.by_qemu import held_before_switchover
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.qemu.command import Chipset, MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.moving import Model, Moving, Side, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu_migration.qmp import Qmp, open_qmp
from vfio_user.client.qemu_migration.view import View, ask_chipset, check, restore, snapshot

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(120)]

HERE = str(Path(__file__).parent)
NOBODYS = 0x0A00_0000
"""Guest memory that its kernel has been told not to use: vectors point there."""
GUEST = MachineOptions(memory_mib=192, kernel_words="mem=128M nodrivers")
VECTORS, FIRE, MARK, NOTE = 16, 0x0, 0x8, 0x4
PENDING, SILENT = 3, 4
"""A vector that is masked and was fired, and one that is masked."""


@dataclass(frozen=True, slots=True)
class Case:
    chipset: Chipset
    root_port: bool = False
    addr: str = ""
    extra: tuple[str, ...] = ()
    model: str = "Vectors"
    writes: tuple[str, ...] = field(default=())
    """More of what the guest writes to the configuration space (setpci)."""

    def options(self) -> MachineOptions:
        return replace(GUEST, chipset=self.chipset, extra=self.extra)

    def device(self) -> Model:
        environment = os.environ | {"PYTHONPATH": HERE}
        return Model(
            f"models_msix:{self.model}",
            "dev",
            root_port=self.root_port,
            addr=self.addr,
            environment=environment,
        )


FUNCTION_0 = ("-device", "virtio-rng-pci,bus=pcie.0,addr=4.0,multifunction=on")
CASES = {
    "q35": Case("q35"),
    "i440fx": Case("i440fx"),
    "root port": Case("q35", root_port=True),
    "second function": Case("q35", addr="4.1", extra=FUNCTION_0),
}


@dataclass(frozen=True, slots=True)
class Guest:
    """The device as the guest's shell reaches it."""

    machine: Machine
    place: str
    bars: tuple[int, ...]

    async def words(self, *addresses: int) -> list[int]:
        reads = "; ".join(f"devmem {address:#x}" for address in addresses)
        return [int(line, 16) for line in (await self.machine.check(reads)).split()]

    async def write(self, *pairs: tuple[int, int]) -> None:
        await self.machine.check(" && ".join(f"devmem {place:#x} 32 {value:#x}" for place, value in pairs))

    async def space(self) -> str:
        return await self.machine.check(f"lspci -xxxx -s {self.place}")

    async def note(self, value: int | None = None) -> int:
        """The word at an I/O port, written first."""
        port = self.bars[2] + NOTE
        if value is not None:
            text = "".join(f"\\x{byte:02x}" for byte in value.to_bytes(4, "little"))
            await self.machine.check(f"printf '{text}' | dd of=/dev/port bs=4 seek={port} oflag=seek_bytes")
        read = f"dd if=/dev/port bs=4 count=1 skip={port} iflag=skip_bytes 2>/dev/null | od -An -tx4"
        return int(await self.machine.check(read), 16)

    async def fired(self, *vectors: int) -> dict[int, int]:
        """Fires vectors; what came of them."""
        await self.write(*((self.bars[0] + FIRE, vector) for vector in vectors))
        values = await self.words(*(NOBODYS + 4 * vector for vector in vectors))
        return dict(zip(vectors, values, strict=True))

    async def forget(self) -> None:
        await self.write(*((NOBODYS + 4 * vector, 0) for vector in range(VECTORS)))


async def find(machine: Machine) -> Guest:
    path = await machine.check("dirname $(grep -l 0x5c7b /sys/bus/pci/devices/*/device)")
    place = path.strip().rpartition("/")[2]
    rows = (await machine.check(f"cat {path.strip()}/resource")).splitlines()[:6]
    return Guest(machine, place, tuple(int(row.split()[0], 16) for row in rows))


async def set_up(machine: Machine, command: int = 7) -> Guest:
    """The guest's side: device on, marks in its registers, 16 vectors that write to memory."""
    guest = await find(machine)
    await machine.check(f"echo 1 > /sys/bus/pci/devices/{guest.place}/enable")
    await machine.check(f"setpci -s {guest.place} COMMAND=7 CACHE_LINE_SIZE=10 INTERRUPT_LINE=5a")
    table = guest.bars[3]
    for vector in range(VECTORS):
        entry = struct.pack("<QII", NOBODYS + 4 * vector, 0x1000 + vector, vector in (PENDING, SILENT))
        words = struct.unpack("<4I", entry)
        await guest.write(*((table + 16 * vector + 4 * n, word) for n, word in enumerate(words)))
    await machine.check(f"setpci -s {guest.place} CAP_MSIX+2.w=8000")
    await guest.write((guest.bars[0] + MARK, 0xCAFE))
    assert await guest.note(0xBEEF) == 0xBEEF
    assert await guest.fired(0, PENDING, VECTORS - 1) == {0: 0x1000, PENDING: 0, VECTORS - 1: 0x100F}
    await guest.forget()
    await machine.check(f"setpci -s {guest.place} COMMAND={command}")
    return guest


async def require_working(guest: Guest) -> None:
    """All that `set_up` has left is there, and works."""
    assert await guest.words(guest.bars[0] + MARK) == [0xCAFE]
    assert await guest.note() == 0xBEEF
    assert await guest.fired(0, 1, SILENT, VECTORS - 1) == {0: 0x1000, 1: 0x1001, SILENT: 0, 15: 0x100F}
    table = guest.bars[3]
    assert await guest.words(table + 16 * PENDING + 12) == [1]
    await guest.write((table + 16 * PENDING + 12, 0))
    assert await guest.words(NOBODYS + 4 * PENDING) == [0x1000 + PENDING]


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
async def moved(moving: Moving, id: str = "dev") -> AsyncIterator[Move]:
    """In the block QEMU has moved the guest and the device's state is at the destination; after it the guest
    goes on there."""
    source, destination = moving.here, await moving.prepare()
    async with (
        open_control(source.controls[id]) as here,
        open_control(destination.controls[id]) as there,
    ):
        async with held_before_switchover(source, destination) as (qmp, _):
            await here.call("stop")
            assert check(await here.call("configuration"), await ask_chipset(qmp)) == []
            view = await snapshot(qmp, here, id)
            await carry(here, there, source.folder / "state")
        async with open_qmp(str(destination.qmp)) as qmp:
            yield Move(qmp, there, view)
            await there.call("resume")
            await qmp.execute("cont")
    await moving.moved(destination)


@contextlib.asynccontextmanager
async def guest_with(lab: Lab, namespace: Namespace, case: Case) -> AsyncIterator[Moving]:
    async with open_moving(lab, case.options(), [case.device()], one_host(namespace)) as moving:
        yield moving


def ports_of(side: Side) -> str:
    return side.machine.qemu_log()


@pytest.mark.parametrize("name", CASES)
async def test_the_device_goes_on(lab: Lab, namespace: Namespace, name: str) -> None:
    async with guest_with(lab, namespace, CASES[name]) as moving:
        guest = await set_up(moving.guest)
        before = await guest.space()
        assert re.search(r"^10: ", before, re.MULTILINE)
        async with moved(moving) as move:
            await restore(move.qmp, move.control, "dev", move.view)
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() == before
        await require_working(guest)


async def test_without_it_the_device_is_dead(lab: Lab, namespace: Namespace) -> None:
    async with guest_with(lab, namespace, CASES["q35"]) as moving:
        guest = await set_up(moving.guest)
        before = await guest.space()
        async with moved(moving):
            pass
        guest = replace(guest, machine=moving.guest)
        assert await guest.space() != before
        with pytest.raises(AssertionError):
            await require_working(guest)
