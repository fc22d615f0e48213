# SPDX-License-Identifier: BSD-3-Clause
"""Two real devices of one VM, moved together: `scratch` rings the e1000's doorbell by DMA, for each frame.

The guest's driver never writes TDT itself. It lets `scratch` copy the new tail there, so each frame that
goes out has crossed from device to device; one that was lost on the way, or came to a card whose state had
been read, would stop the traffic.
"""

import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.moving import MEMORY, MOVES, Yard, open_yard, seeded, wait_until, watched
from migration.nic_guest import Load, Stand, open_stand, rewire
from migration.scratch_guest import ADDRESS, DONE, DOORBELL, LENGTH, STATUS
from vfio_user.client.attachment import Attachment
from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_hardware import Reg
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.fake_vmm import FakeVmm, VmmOptions
from vfio_user.client.guest import Guest, GuestDevice, open_guest
from vfio_user.client.memory import FIXED_SIZE, GuestRam
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits
from vfio_user.client.peers import join_peers
from vfio_user.client.switch import Switch, open_switch
from vfio_user.device_models.echo import Responder
from vfio_user.device_models.scratch import Scratch
from vfio_user.protocol.constants import MigrationState


class RemoteBell(E1000):
    """A driver whose transmit doorbell is rung by another device."""

    def __init__(self, nic: GuestDevice, ringer: GuestDevice) -> None:
        super().__init__(nic, ring=64)
        self._nic = nic
        self._ringer = ringer
        self._word = nic.ram.allocate(8)

    async def _ring_doorbell(self) -> None:
        ringer = self._ringer
        self._nic.ram.write(self._word, self._tx_tail.to_bytes(4, "little"))
        await ringer.write(0, ADDRESS, self._word, 8)
        await ringer.write(0, ADDRESS + 8, self._nic.bars[0].address + Reg.TDT, 8)
        await ringer.write(0, LENGTH, 4)
        await ringer.write(0, DOORBELL, 1)
        while (status := await ringer.read(0, STATUS)) != DONE:
            assert status in (0, 1)  # not failed
            await trio.sleep(0.0002)
        await ringer.write(0, STATUS, DONE)


@dataclass
class Machine:
    """The e1000 and the `scratch` on one memory. `late`: see `moving.watched`."""

    ram: GuestRam
    stand: Stand
    scratch: Attachment
    late: list[MigrationState]

    @property
    def vmms(self) -> tuple[FakeVmm, FakeVmm]:
        return self.stand.attachment.vmm, self.scratch.vmm

    async def arrive(self, switch: Switch, before: "Machine") -> None:
        """Both stand still: the network and the bus between the devices."""
        await rewire(switch, before.stand, self.stand)
        await join_peers(self.vmms)

    async def close(self) -> None:
        await self.scratch.close()
        await self.stand.close()


async def open_machine(
    yard: Yard, switch: Switch, number: int, stack: contextlib.ExitStack, *, incoming: bool
) -> Machine:
    late: list[MigrationState] = []
    ram = stack.enter_context(contextlib.closing(GuestRam(seals=FIXED_SIZE)))
    ram.add_file(MEMORY)
    stand = await open_stand(yard, switch, number, incoming=incoming, ram=ram, late=late)
    server = yard.serve(watched(Scratch, late))
    options = VmmOptions(memory=MEMORY, bar_window=0xE100_0000)
    scratch = await (yard.incoming if incoming else yard.start)(server, ram, options)
    return Machine(ram, stand, scratch, late)


@contextlib.asynccontextmanager
async def under_load(machine: Machine, chance: random.Random) -> AsyncIterator[tuple[Guest, Load]]:
    await join_peers(machine.vmms)
    async with open_guest(machine.vmms) as guest:
        nic = RemoteBell(*guest.devices)
        guest.start(nic.serve_interrupts)
        await guest.run(nic.start)
        load = Load(Traffic(nic, seed=chance.randrange(1 << 30), patience=15))
        await guest.run(load.traffic.resolve)
        guest.start(load.run)
        yield guest, load


async def move_around(folder: Path, moves: int, chance: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        async with open_yard(folder) as yard, open_switch(Responder().answer) as switch:
            here = await open_machine(yard, switch, 0, stack, incoming=False)
            async with under_load(here, chance) as (guest, load):
                for number in range(1, moves + 1):
                    there = await open_machine(yard, switch, number, stack, incoming=True)
                    await trio.sleep(chance.random() * 0.02)
                    options = Options("v2", "v2", switch=partial(there.arrive, switch, here))
                    limits = Limits(rounds=chance.randrange(3))
                    report = await migrate(here.vmms, there.vmms, guest=guest, limits=limits, options=options)
                    assert report.check().notes == ()
                    assert here.late == []
                    await here.close()
                    here, before = there, load.done
                    await wait_until(lambda before=before: load.done > before)  # type: ignore[misc]
                load.going = False
                await wait_until(lambda: load.ended)
                await guest.run(load.traffic.check_statistics)
            await here.close()


@pytest.mark.timeout(0)
async def test_a_scratch_rings_an_e1000_while_both_are_moved(tmp_path: Path) -> None:
    with seeded("peers") as chance:
        await move_around(tmp_path, MOVES, chance)
