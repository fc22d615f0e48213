# SPDX-License-Identifier: BSD-3-Clause
"""A device writes all over 256 MiB of guest memory while the guest is moved: no page is stale afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from guest_moves.by_qemu import BANDWIDTH, PAGE, set_bandwidth
from guest_moves.by_tool import move
from guest_moves.counts import SOAK
from guest_moves.guest_programs import begin_scribbling, check_scribbling, scribble_options
from guest_moves.scribbler import PAGES
from vfio_user.client.background import background
from vfio_user.client.control import ControlClient, open_control
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.moving import Model, Moving, Place, Side, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu_migration.qmp import open_qmp
from vfio_user.client.qemu_migration.report import Progress, Report, Step
from vfio_user.client.qemu_migration.request import Writes

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(600)]

RATE = 100
"""MB/s: more than would be handed over by choice."""
SLOW = 16 << 20
"""Bytes a second that QEMU sends until the device has written to most of the memory."""
MARGIN = 8 << 20
"""Bytes that are written before the log is cleared for the first pass."""
MOST = PAGES // 2
"""Pages that the device has to write between the first pass and the stop."""
ROUNDS = 10 if SOAK else 1


async def test_no_page_is_stale(
    lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model, socket_folder: Path
) -> None:
    """By hand-over and, where the device writes too much for that, by write-through. A server that forgets
    what its device wrote leaves stale pages: the check can tell."""
    places = places_with_two_monitors(namespace, socket_folder)
    options = scribble_options(scribble)
    async with open_moving(lab, options, [scribbler], places) as moving:
        for _ in range(ROUNDS):
            report = await moved_whole(moving, RATE, Writes.HAND_OVER)
            assert (report.device_pages > MOST, report.message_writes) == (True, 0)
            report = await moved_whole(moving, RATE, Writes.AUTO)
            assert report.writes is Writes.WRITE_THROUGH
            by_message(report)
        await change_source(moving, "Unlogged")
        _, found = await moved(moving, RATE, Writes.HAND_OVER)
        assert found["stale"] > 500
        assert found["lost"] == 0


@pytest.mark.soak  # of the two ways one server that lies is enough
async def test_a_server_that_does_not_write_through(
    lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model, socket_folder: Path
) -> None:
    """But says so: the check can tell."""
    scribbler = replace(scribbler, name="guest_moves.scribbler:Unheeding")
    places = places_with_two_monitors(namespace, socket_folder)
    options = scribble_options(scribble)
    async with open_moving(lab, options, [scribbler], places) as moving:
        report, found = await moved(moving, RATE, Writes.WRITE_THROUGH)
        assert (report.devices[0].write_through, report.message_writes) == (True, 0)
        assert found["stale"] > 500
        assert found["lost"] == 0


async def moved_whole(moving: Moving, rate: int, writes: Writes) -> Report:
    report, found = await moved(moving, rate, writes)
    print(f"{writes}: {report.device_pages} pages, {report.message_bytes >> 20} MiB by message; {found}")
    assert (found["stale"], found["lost"]) == (0, 0)
    return report


def by_message(report: Report) -> None:
    """Each write is of another chunk, until all were written."""
    assert report.message_writes > 500
    assert report.message_bytes > MOST * PAGE
    assert report.device_pages < 500  # what it may have written before it was told to write through


async def moved(moving: Moving, rate: int, writes: Writes) -> tuple[Report, dict[str, int]]:
    """It goes on until the device has written to most of the memory since the first pass has begun."""
    await begin_scribbling(moving.guest, rate)
    await set_bandwidth(moving.here, SLOW)
    copying = trio.Event()

    def tell(progress: Progress) -> None:
        if progress.step is Step.PRECOPY:
            copying.set()

    async with background() as nursery:
        nursery.start_soon(hurry_once_written, moving.here, copying)
        report = await move(moving, writes, tell)
    return report, await check_scribbling(moving.guest)


async def hurry_once_written(source: Side, copying: trio.Event) -> None:
    await copying.wait()
    async with open_control(source.controls["scribbler"]) as control:
        begun = await bytes_written(control)
        while await bytes_written(control) - begun < MOST * PAGE + MARGIN:  # noqa: ASYNC110
            await trio.sleep(0.05)
    async with open_qmp(str(second_qmp(source.place))) as qmp:
        await qmp.execute("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH})


async def bytes_written(control: ControlClient) -> int:
    counters = (await control.call("state"))["counters"]
    return int(counters["dma_mapped_write_bytes"] + counters["dma_message_write_bytes"])


def places_with_two_monitors(namespace: Namespace, folder: Path) -> list[Place]:
    """The move has one of each QEMU's for itself."""
    places = []
    for name, place in zip("ab", one_host(namespace), strict=True):
        words = f"unix:{folder / name}.qmp,server=on,wait=off"
        places.append(replace(place, extra=[*place.extra, "-qmp", words]))
    return places


def second_qmp(place: Place) -> Path:
    return Path(place.extra[-1].removeprefix("unix:").partition(",")[0])


async def change_source(moving: Moving, name: str) -> None:
    """A move to a server of another kind."""
    (model,) = moving.models
    moving.models = [replace(model, name=f"guest_moves.scribbler:{name}")]
    await move(moving)


async def test_without_mapped_memory(
    lab: Lab, namespace: Namespace, scribble: Path, scribbler: Model, socket_folder: Path
) -> None:
    """QEMU makes each write itself, and knows."""
    places = places_with_two_monitors(namespace, socket_folder)
    options = replace(scribble_options(scribble), mapped=False, chipset="i440fx")
    async with open_moving(lab, options, [scribbler], places) as moving:
        for _ in range(ROUNDS):
            report = await moved_whole(moving, RATE, Writes.AUTO)
            by_message(report)
            assert report.device_pages == 0
