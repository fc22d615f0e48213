# SPDX-License-Identifier: BSD-3-Clause
"""What a device writes while a guest is moved: QEMU is told of every page, in either way and in both."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from guest_moves.fake_qemu import FakeQemu
from guest_moves.scene import Scene, opened_scene
from migration.control_bed import copy, listen, until
from vfio_user.client.qemu_migration.report import Outcome
from vfio_user.client.qemu_migration.request import Limits, Writes
from vfio_user.client.qemu_migration.writes import BUDGET_MS, PAGE_MS

PAGE = 4096
FIRST, LATER = 0x20, 0xF0
"""Pages that the device writes to: many before it writes through, and some after."""
MANY = int(BUDGET_MS / PAGE_MS) + 2


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(tmp_path) as scene:
        scene.writes, scene.limits = Writes.AUTO, Limits(timeout=10, stop=1, recovery=3)
        scene.source.may_switch = trio.Event()
        yield scene


async def test_a_device_that_begins_to_write_a_lot(scene: Scene) -> None:
    """Its log is handed over, for all that was in it, and what comes later goes by message."""
    vmm = scene.vmms[0]
    told = listen(vmm)

    async def write_a_lot(_qemu: FakeQemu) -> None:
        assert not (await scene.state(scene.here))["write_through"]
        await copy(vmm, 0, FIRST * PAGE, MANY * PAGE)
        assert told == []

    async def write_more(qemu: FakeQemu) -> None:
        await until(scene.here, lambda state: state["write_through"])
        await copy(vmm, 0, LATER * PAGE, 2 * PAGE)
        qemu.may_switch.set()

    async def both(qemu: FakeQemu) -> None:
        await write_a_lot(qemu)
        assert qemu._nursery is not None
        qemu._nursery.start_soon(write_more, qemu)

    scene.source.hooks["migrate"] = both
    report = await scene.move()
    assert report.outcome is Outcome.COMPLETED, report
    device = report.devices[0]
    assert (report.writes, device.write_through) == (Writes.WRITE_THROUGH, True)
    assert device.pages_handed_over == MANY
    assert (device.message_writes > 0, device.message_bytes) == (True, 2 * PAGE)
    pages = {place // PAGE for address, length in told for place in range(address, address + length, PAGE)}
    assert pages == {*range(FIRST, FIRST + MANY), LATER, LATER + 1}


async def test_what_is_written_after_the_last_look_is_counted(scene: Scene) -> None:
    """By message, all the time; the last look at the source's server was before the CPUs stood still."""
    vmm = scene.vmms[0]
    scene.writes = Writes.WRITE_THROUGH
    scene.source.may_switch.set()

    async def write(_qemu: FakeQemu) -> None:
        await copy(vmm, 0, FIRST * PAGE, 3 * PAGE)

    scene.source.hooks["migrate"] = write
    report = await scene.move()
    assert (report.device_pages, report.message_bytes) == (0, 3 * PAGE), report
