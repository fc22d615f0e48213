# SPDX-License-Identifier: BSD-3-Clause
"""Who has the guest, after `migrate-continue` was sent and before both sides have said that it is done.

The destination starts nothing by itself, and nobody has told it to: as long as the source answers, the guest
can go on there. So the destination gets a time in which to say that it has everything, and no more.
"""

import contextlib
from enum import Enum

import trio

from vfio_user.client.qemu_migration.move import Move
from vfio_user.client.qemu_migration.qemu_side import ENDED, QemuSide
from vfio_user.client.qemu_migration.qmp import QmpError, QmpLost
from vfio_user.client.qemu_migration.trail import TROUBLE, reason
from vfio_user.client.qemu_migration.way_back import AGAIN, cancel_qemu, end_destination

HEARING = 1.0
"""Seconds for the source's QEMU to say what it is at."""
ARRIVAL = 5.0
"""Seconds for the destination to say whether it has the guest. A QEMU that has lost a server is deaf."""


class Guest(Enum):
    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere"
    UNKNOWN = "unknown"


async def whose(move: Move) -> Guest:
    """Cancels what is not completed, and says where the guest can go on. It may run at
    the source, whose QEMU starts its CPUs by itself when a migration fails."""
    if await _source_hears(move):
        await cancel_qemu(move)
        if move.source.status != "completed":
            return Guest.SOURCE
        return Guest.DESTINATION if await _arrived(move) else Guest.SOURCE
    if await _arrived(move):
        return Guest.DESTINATION  # what has all of it was sent all of it: the source has nothing more to do
    if not await _source_lives(move):
        return Guest.NOWHERE
    await end_destination(move)
    return Guest.SOURCE


async def _source_hears(move: Move) -> bool:
    """Whether its monitor answers. A QEMU that is stuck in the middle of the last pages hears `yank` alone,
    which cuts the stream: its migration fails, and it goes on."""
    with trio.move_on_after(HEARING):
        return await _reached(move, move.source)
    with trio.move_on_after(HEARING), contextlib.suppress(QmpError, QmpLost):
        await move.source.qmp.execute_at_once("yank", instances=[{"type": "migration"}])
    with trio.move_on_after(ARRIVAL):
        return await _reached(move, move.source)
    move.trail.note("the source's QEMU does not answer, not even once its migration stream was cut")
    return False


async def _reached(move: Move, side: QemuSide) -> bool:
    """Whether its monitor answers, after a new connection if need be."""
    try:
        if side.lost():
            await move.reconnect(side)
        await side.query()
    except QmpLost:
        return False
    return True


async def _arrived(move: Move) -> bool:
    """Whether the destination has all of the guest, its devices' states too, and says so in time."""
    if not all(device.carrier.done.is_set() for device in move.devices):
        return False
    with trio.move_on_after(ARRIVAL):
        return await _received(move)
    move.trail.note(f"the destination's QEMU does not say within {ARRIVAL:g} s whether the guest arrived")
    return False


async def _received(move: Move) -> bool:
    """Whether its QEMU has all of it. Waits while it is still receiving."""
    if not await _reached(move, move.destination):
        return False
    try:
        while move.destination.status not in ENDED and move.destination.status in ("active", "device"):
            await move.destination.news(AGAIN)
            await move.destination.query()
    except QmpLost:
        return False
    return move.destination.status == "completed"


async def _source_lives(move: Move) -> bool:
    """By its servers: a QEMU that is gone has no connection to any of them. Not known means that it may."""
    lives = []
    for device in move.devices:
        try:
            state = await device.source.call("state")
            lives.append(bool(state["client"]["attached"]))
        except TROUBLE as error:
            lives.append(True)
            move.trail.note(f"{device.id}, the source's server: {reason(error)}")
    return any(lives)


async def runs_there(move: Move) -> bool | None:
    """After `cont` was sent to the destination without an answer: whether it runs; None: nobody can say."""
    if await _reached(move, move.destination):
        return await move.destination.run_state() == "running"
    return None  # a server without a VMM proves nothing: a QEMU that was dropped by one may run on
