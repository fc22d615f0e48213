# SPDX-License-Identifier: BSD-3-Clause
"""A guest with an e1000 under load, for moves that may fail: its network comes back with it."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from migration.fault_scene import Scene
from migration.moving import Yard, open_yard, wait_until
from migration.nic_guest import Load, Stand, open_stand
from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.switch import Switch, open_switch
from vfio_user.device_models.echo import Responder


@dataclass
class _Network:
    switch: Switch
    stands: int = 0


class NicScene(Scene):
    """The guest sends numbered datagrams and compares the answers."""

    load: Load

    def __init__(self, yard: Yard, network: _Network, here: Stand, guest: Guest) -> None:
        super().__init__(yard, here.server, here.attachment, guest)
        self._network = network
        self._stand = here
        self._next: Stand
        self._switched = False

    def done(self) -> int:
        return self.load.done

    async def new_destination(self) -> None:
        self._next = await new_stand(self.yard, self._network, incoming=True)
        self.there, self.destination = self._next.server, self._next.attachment

    async def switch(self) -> None:
        here, there = self._stand, self._next
        self._switched = True
        await self._network.switch.move(here.port, there.port, sent=here.sent, taken=here.taken, keep=True)

    async def switch_back(self) -> None:
        if self._switched:
            self._network.switch.move_back(self._stand.port, self._next.port)
        self._switched = False

    async def leave_source(self) -> None:
        await super().leave_source()
        self._stand.port.close()
        self._stand, self._switched = self._next, False

    async def finish(self) -> None:
        """Of a guest that still runs: all has come, and the card has counted on over all the servers."""
        self.load.going = False
        await wait_until(lambda: self.load.ended)
        await self.guest.run(self.load.traffic.check_statistics)


async def new_stand(yard: Yard, network: _Network, *, incoming: bool) -> Stand:
    network.stands += 1
    return await open_stand(yard, network.switch, network.stands, incoming=incoming)


@contextlib.asynccontextmanager
async def open_nic_scene(folder: Path, chance: Random, options: VmmOptions) -> AsyncIterator[NicScene]:
    async with open_yard(folder, options) as yard, open_switch(Responder().answer) as switch:
        network = _Network(switch)
        here = await new_stand(yard, network, incoming=False)
        async with open_guest([here.attachment.vmm]) as guest:
            scene = NicScene(yard, network, here, guest)
            nic = E1000(guest.devices[0], ring=chance.choice((16, 64, 256)))
            guest.start(scene.run_while_it_can, nic.serve_interrupts)
            await guest.run(nic.start)
            scene.load = load = Load(Traffic(nic, seed=chance.randrange(1 << 30), patience=15))
            await guest.run(load.traffic.resolve)
            guest.start(scene.run_while_it_can, load.run)
            await scene.guest_goes_on()
            await scene.new_destination()
            yield scene
