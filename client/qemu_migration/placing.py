# SPDX-License-Identifier: BSD-3-Clause
"""The destination's QEMU learns where the BARs are before the guest stands still.

Each BAR that it maps costs QEMU some milliseconds, for it draws its map of memory anew. So it is told before
memory is copied, and once more only if the guest has changed something since. It is also the proof that QEMU
is connected to the very server that is named: what QEMU is told must arrive there.
"""

from vfio_user.client.qemu_migration.move import Move, MovingDevice
from vfio_user.client.qemu_migration.report import MoveError, Where
from vfio_user.client.qemu_migration.view import glance, has_bars, in_full, may_be_placed, place, places_alike


async def place_early(move: Move) -> None:
    """For all devices where it can be done; the guest runs on."""
    await move.each(lambda device: _place_early(move, device))


async def _place_early(move: Move, device: MovingDevice) -> None:
    view = await glance(move.source.qmp, device.source, device.id)
    if may_be_placed(view):
        async with move.destination.monitor:
            device.early = view
            await place(move.destination.qmp, view)
        if not await has_bars(device.destination, view):
            raise MoveError(
                f"{device.id}: the destination's QEMU does not use the server whose control socket is named",
                Where.DESTINATION,
            )


async def place_now(move: Move, device: MovingDevice) -> None:
    """The guest stands still, `device.view` is the last word, and the source sends nothing."""
    assert device.view is not None
    if device.early is not None and not places_alike(device.early, device.view):
        device.view, device.early = in_full(device.view), None
    if may_be_placed(device.view):
        if device.early is None:
            async with move.destination.monitor:
                await place(move.destination.qmp, device.view)
        device.placed = True
