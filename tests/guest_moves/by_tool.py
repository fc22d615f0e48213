# SPDX-License-Identifier: BSD-3-Clause
"""Moves of a `Moving` guest by `vfio_user.client.qemu_migration`."""

from collections.abc import Callable

import trio

from guest_moves.nic import note_move
from vfio_user.client.qemu.moving import Moving, Side
from vfio_user.client.qemu_migration.migrate import GuestMigration
from vfio_user.client.qemu_migration.report import Outcome, Progress, Report, Step
from vfio_user.client.qemu_migration.request import DeviceRequest, Limits, Request, Writes

Tell = Callable[[Progress], None]
PATIENT = Limits(stop=30.0, standstill=60.0)
"""On a loaded machine a server may take seconds to answer; what the limits end is for other tests."""


def request(
    moving: Moving, destination: Side, writes: Writes = Writes.AUTO, limits: Limits | None = None
) -> Request:
    """All devices of the guest; QEMU's stream over a UNIX socket of the destination."""
    source = moving.here
    return Request(
        str(source.qmp),
        str(destination.qmp),
        tuple(DeviceRequest(id, source.controls[id], destination.controls[id]) for id in source.controls),
        f"unix:{destination.folder / 'stream'}",
        limits or PATIENT,
        writes,
    )


async def move(
    moving: Moving,
    writes: Writes = Writes.AUTO,
    tell: Tell = lambda progress: None,
    destination: Side | None = None,
) -> Report:
    """To the other place; the guest must arrive."""
    destination = destination or await moving.prepare()
    begun = dict[Step, float]()

    def watch(progress: Progress) -> None:
        begun.setdefault(progress.step, trio.current_time())
        tell(progress)

    with trio.fail_after(180):
        report = await GuestMigration(request(moving, destination, writes), watch).run()
    assert report.outcome is Outcome.COMPLETED, str(report.failure)
    assert report.notes == ()
    await moving.moved(destination)
    await note_move(moving.guest, trio.current_time() - begun[Step.STOP])
    return report
