# SPDX-License-Identifier: BSD-3-Clause
"""An e1000 moved from server to server while frames flow, over every pair of protocols.

The guest numbers its datagrams and looks at every answer; the wire is a switch that knows what each device
has taken. So a frame that is lost, or comes twice, or is changed, ends the test. Others come unasked, while
the guest stands still, and are numbered too: more than the answers that it may be waiting for.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from migration.moving import MEMORY, MOVES, WAYS, open_yard, seeded, wait_until
from migration.nic_guest import WINDOW, Load, Stand, open_stand, rewire
from vfio_user.client.drivers.e1000 import E1000
from vfio_user.client.drivers.e1000_traffic import Traffic
from vfio_user.client.fake_vmm import VmmOptions
from vfio_user.client.guest import Guest, open_guest
from vfio_user.client.migration.migrate import Options, migrate
from vfio_user.client.migration.report import Limits, Progress, Step
from vfio_user.client.switch import Switch, open_switch
from vfio_user.device_models.echo import Responder

UNASKED = 2 * WINDOW
"""Frames that come while a device stands still; some more at the steps around it."""
STOPPED = (Step.PAUSE, Step.STOP, Step.STATE, Step.LOAD, Step.SWITCH, Step.START)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shared", [True, False], ids=["mapped", "by message"])
@pytest.mark.parametrize(("source", "destination"), WAYS)
async def test_it_is_moved_under_load(tmp_path: Path, source: str, destination: str, shared: bool) -> None:
    with seeded(f"e1000 {source} {destination} {shared}") as chance:
        vmm_options = VmmOptions(memory=MEMORY, shared=shared, resample=chance.random() < 0.5)
        async with open_yard(tmp_path, vmm_options) as yard, open_switch(Responder().answer) as switch:
            here = await open_stand(yard, switch, 0, incoming=False)
            async with open_guest([here.attachment.vmm]) as guest:
                nic = E1000(guest.devices[0], ring=chance.choice((16, 64, 256)))
                guest.start(nic.serve_interrupts)
                await guest.run(nic.start)
                load = Load(Traffic(nic, seed=chance.randrange(1 << 30), patience=15))
                await guest.run(load.traffic.resolve)
                guest.start(load.run)
                for number in range(1, MOVES + 1):
                    there = await open_stand(yard, switch, number, incoming=True)
                    await trio.sleep(chance.random() * 0.02)
                    unasked = partial(send_unasked, switch, load.traffic, chance)
                    await move(guest, switch, here, there, Options(source, destination), chance, unasked)
                    await here.close()
                    here, before = there, load.done
                    await wait_until(lambda before=before: load.done > before)  # type: ignore[misc]
                load.going = False
                await wait_until(lambda: load.ended)
                await guest.run(load.traffic.last_beacons)
                assert load.traffic.beacons >= MOVES * UNASKED
                # The card has counted on over all the servers; and nothing was dropped or done twice.
                await guest.run(load.traffic.check_statistics)


def send_unasked(switch: Switch, traffic: Traffic, chance: random.Random, now: Progress) -> None:
    """The network does not know that the guest stands still."""
    if now.step in STOPPED:
        for _ in range(UNASKED if now.step is Step.STATE else chance.randrange(8)):
            switch.send(traffic.beacon())


async def move(
    guest: Guest,
    switch: Switch,
    here: Stand,
    there: Stand,
    options: Options,
    chance: random.Random,
    progress: Callable[[Progress], None],
) -> None:
    """With the settings that chance gives; the memories must have been equal."""
    options = replace(options, irqs_first=chance.random() < 0.5, switch=lambda: rewire(switch, here, there))
    limits = Limits(rounds=chance.randrange(4))
    vmms = here.attachment.vmm, there.attachment.vmm
    report = (await migrate(*vmms, guest=guest, limits=limits, options=options, progress=progress)).check()
    assert report.notes == ()
    assert report.verified_pages == sum(size for _, size in MEMORY) // 4096
