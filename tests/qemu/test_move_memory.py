# SPDX-License-Identifier: BSD-3-Clause
"""A device writes all over 256 MiB of guest memory while the guest is moved: no page is stale afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest

from guest_moves.by_tool import move
from guest_moves.counts import SOAK
from guest_moves.guest_programs import begin_scribbling, check_scribbling, scribble_options
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, Moving, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu_migration.report import Report
from vfio_user.client.qemu_migration.request import Writes

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

SLOW, FAST = 15, 100
"""MB/s: a few thousand pages for the hand-over, and more than would be handed over."""
ROUNDS = 10 if SOAK else 1


async def test_no_page_is_stale(lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model) -> None:
    """By hand-over and, where the device writes too much for that, by write-through. A server that forgets
    what its device wrote leaves stale pages: the check can tell."""
    places, options = one_host(namespace), scribble_options(scribble)
    async with open_moving(lab, options, [scribbler], places) as moving:
        for _ in range(ROUNDS):
            report = await moved_under_writes(moving, SLOW, Writes.HAND_OVER)
            assert report.device_pages > 500
            report = await moved_under_writes(moving, FAST, Writes.AUTO)
            assert report.writes is Writes.WRITE_THROUGH
        await forgetful_source(moving)
        _, found = await moved(moving, SLOW, Writes.HAND_OVER)
        assert found["stale"] > 500
        assert found["lost"] == 0


async def moved_under_writes(moving: Moving, rate: int, writes: Writes) -> Report:
    report, found = await moved(moving, rate, writes)
    assert (found["stale"], found["lost"]) == (0, 0)
    assert found["pages"] > 2000
    return report


async def moved(moving: Moving, rate: int, writes: Writes) -> tuple[Report, dict[str, int]]:
    await begin_scribbling(moving.guest, rate)
    report = await move(moving, writes)
    return report, await check_scribbling(moving.guest)


async def forgetful_source(moving: Moving) -> None:
    """A move to a server that will forget."""
    (model,) = moving.models
    moving.models = [replace(model, name="guest_moves.scribbler:Unlogged")]
    await move(moving)


async def test_without_mapped_memory(
    lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model
) -> None:
    """QEMU makes each write itself, and knows."""
    places, options = one_host(namespace), replace(scribble_options(scribble), mapped=False, chipset="i440fx")
    async with open_moving(lab, options, [scribbler], places) as moving:
        for _ in range(ROUNDS):
            report = await moved_under_writes(moving, SLOW, Writes.AUTO)
            assert report.device_pages == 0
