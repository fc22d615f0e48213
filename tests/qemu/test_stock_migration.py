# SPDX-License-Identifier: BSD-3-Clause
"""QEMU alone moves a guest with a vfio-user device: it says that all is well, and the guest is corrupt.

This is what `vfio-user migrate` is for. Should a QEMU come that fails this test, look what it does.
"""

from pathlib import Path

import pytest

from guest_moves.by_qemu import different_pages, held_before_switchover
from guest_moves.guest_programs import begin_scribbling, scribble_options
from guest_moves.scribbler import HUGE, PIECES
from vfio_user.client.control import open_control
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu_migration.qmp import open_qmp

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

RATE = 50
REGISTER = (
    "devmem $(($(head -n 1 /sys/bus/pci/devices/$(cat /tmp/scribbler)/resource | cut -d ' ' -f 1) + 8))"
)


async def test_it_corrupts_the_guest_and_says_nothing(
    lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model
) -> None:
    places, options = one_host(namespace), scribble_options(scribble)
    async with open_moving(lab, options, [scribbler], places) as moving:
        pieces = await begin_scribbling(moving.guest, RATE)
        assert len(set(pieces)) == PIECES
        assert int(await moving.guest.check(REGISTER), 16) == RATE
        source, destination = moving.here, await moving.prepare()
        async with (
            held_before_switchover(source, destination),
            open_control(source.controls[scribbler.id]) as control,
        ):
            # Kind to QEMU: what the device wrote before this moment should be there.
            await control.call("stop")
        stale = different_pages(source.machine, destination.machine)
        # What the CPUs wrote is the same at both, and of what the device wrote a good part is not.
        assert {place // HUGE * HUGE for place in stale} <= set(pieces)
        assert len(stale) > 1000
        async with open_qmp(str(destination.qmp)) as qmp:
            assert (await qmp.execute("query-status"))["status"] == "paused"
            await qmp.execute("cont")
        await moving.moved(destination)
        assert int(await moving.guest.check(REGISTER), 16) != RATE
        assert "error" not in moving.guest.qemu_log().lower().replace("error recovery", "")
