# SPDX-License-Identifier: BSD-3-Clause
"""The way back: a row for each step that a failed move has to undo, in the order in which they run.

Nothing here ever starts a guest on a guess. The destination's CPUs run only after `switch.start` has said so;
until then the source can have its guest back, even when QEMU has completed the migration.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from vfio_user.client.control import ControlLost
from vfio_user.client.qemu_migration.move import Move, MovingDevice, within
from vfio_user.client.qemu_migration.qemu_side import ENDED
from vfio_user.client.qemu_migration.qmp import QmpError, QmpLost
from vfio_user.client.qemu_migration.report import MoveError, Step, Where
from vfio_user.client.qemu_migration.trail import TROUBLE, reason
from vfio_user.protocol.json_rpc import RpcError

AGAIN = 0.05
"""Seconds between two questions on the way back, where no event tells."""
RESUME = 2.0
"""Seconds for a device of the source to go on; longer than a `stop` that is under way waits."""
RESET = 5.0
"""Seconds for a device of the destination to be reset: the source's guest runs by then, and a server that has
not answered is not waited for."""
RUNS_AGAIN = "the source's guest runs again"
END = 2.0
"""Seconds for the destination's QEMU to end; the guest may be standing still meanwhile."""


@dataclass(frozen=True, slots=True)
class Row:
    """`undoes`: it runs when this step was begun."""

    undoes: Step
    text: str
    run: Callable[[Move], Awaitable[None]]


async def _reach_servers(move: Move) -> None:
    """New connections where the old ones were lost, or a device that was stopped stays so. For a short time
    only; a server that is gone is told of where it is missed."""
    async with trio.open_nursery() as nursery:
        for device in move.devices:
            for control, where in ((device.source, Where.SOURCE), (device.destination, Where.DESTINATION)):
                if control.lost:
                    nursery.start_soon(_reach_server, move, device, where)


async def _reach_server(move: Move, device: MovingDevice, where: Where) -> None:
    with trio.move_on_after(RESUME), contextlib.suppress(ControlLost):
        await move.reconnect_server(device, where)


async def _stop_destinations(move: Move) -> None:
    """Their guest was to be started: they run already, and would beside the source's."""
    await move.each(lambda device: _stop_destination(move, device))


async def _stop_destination(move: Move, device: MovingDevice) -> None:
    """For a short time only, as the source's guest stands still. One without a VMM stops by itself, and the
    destination's QEMU is ended later."""
    why = f"no answer within {RESUME:g} s"
    with trio.move_on_after(RESUME):
        try:
            await device.destination.call("stop")
            await device.destination.call("reset")
            return
        except Exception as error:  # whatever it answers, the next rows have to run
            why = reason(error)
    move.trail.note(
        f"{device.id} may run at the destination, too ({why}), until that QEMU has ended: if it stays, end "
        f"the server of {device.wanted.destination}"
    )


async def _resume_sources(move: Move) -> None:
    await move.each(lambda device: _resume_source(move, device))


async def _resume_source(move: Move, device: MovingDevice) -> None:
    """For a short time only: QEMU's cancel comes after this, and without it the guest stands still."""
    with trio.move_on_after(RESUME) as scope:
        try:
            await _resume_until_running(device)
        except Exception as error:  # whatever it answers, the next rows have to run
            move.trail.note(f"{device.id} does not go on at the source: {reason(error)}")
    if scope.cancelled_caught:
        move.trail.note(f"{device.id} does not go on at the source: no answer within {RESUME:g} s")
        with trio.move_on_after(0), contextlib.suppress(*TROUBLE):
            await device.source.call("resume")  # sent, and not waited for: it finds this when it wakes


async def _resume_until_running(device: MovingDevice) -> None:
    """A `stop` that it had not answered may still be under way: ask until it says that it runs."""
    while True:
        await _cancel_transfer(device)
        await device.source.call("resume")
        state = await device.source.call("state")
        if state["running"] or not state["client"]["attached"]:
            return
        await trio.sleep(AGAIN)


async def _cancel_transfer(device: MovingDevice) -> None:
    with contextlib.suppress(RpcError):  # none is under way
        await device.source.call("cancel")


_REMAINS = (
    "the destination's QEMU was told to end, and has not answered: end it; the copy of the guest that it has "
    "never ran"
)
_ALONE = "the source's QEMU cannot be told: the destination was ended, so that its migration fails"
_STUCK = (
    "the source's guest stands still, and its QEMU cannot be told to go on: reach its monitor, and send "
    "migrate_cancel"
)


async def _reach_monitors(move: Move) -> None:
    """New connections where the old ones were lost. If the source's cannot be had, the destination ends:
    QEMU's migration then fails by itself; not if it waits for the word to go on."""
    for side in (move.source, move.destination):
        if side.lost():
            with contextlib.suppress(QmpLost):
                await move.reconnect(side)
    if move.source.lost() and move.trail.has(Step.PRECOPY):
        await _end_alone(move)


async def _end_alone(move: Move) -> None:
    """For a source that cannot be told."""
    await end_destination(move)
    move.trail.note(_STUCK if move.source.status == "pre-switchover" else _ALONE)


async def _cancel(move: Move) -> None:
    """A QEMU that has lost a server hears nothing for seconds; it sees the destination's end as it sends."""
    limit = move.request.limits.recovery / 2
    try:
        await within(limit, cancel_qemu(move), f"not done within {limit:g} s", Where.SOURCE)
    except (QmpLost, MoveError):
        if not move.destination.lost():
            await _end_alone(move)
        raise


async def cancel_qemu(move: Move) -> None:
    """Returns once the source's migration has ended, one way or the other. QmpLost."""
    await move.source.query()
    if move.source.status not in ENDED and move.source.status != "none":
        await move.source.qmp.execute("migrate_cancel")
    while move.source.status not in ENDED and move.source.status != "none":
        await move.source.news(AGAIN)
        await move.source.query()


async def _run_source(move: Move) -> None:
    """QEMU starts the CPUs by itself when a migration fails; not when it has completed."""
    while move.was_running and (state := await move.source.run_state()) != "running":
        if state == "postmigrate":
            await end_destination(move)
            await _continue(move)
        elif state != "finish-migrate" and move.source.status in ENDED:
            await trio.sleep(AGAIN)
        await move.source.news(AGAIN)


async def _continue(move: Move) -> None:
    """A destination that has not ended may still hold the locks of disks that both have."""
    while True:
        ended = move.destination.lost()
        try:
            await move.source.qmp.execute("cont")
            return
        except QmpError:
            if ended:
                raise
        await trio.sleep(AGAIN)


async def end_destination(move: Move) -> None:
    """It has a copy of the guest, which has never run there, and starts by nobody's word but ours: a QEMU
    that does not end is no danger, and the source's guest does not wait for it."""
    assert not move.started
    move.destination.ending = True
    with trio.move_on_after(END) as scope:
        with contextlib.suppress(QmpLost):
            await move.destination.qmp.execute("quit")
        await move.destination.qmp.lost.wait()
    if scope.cancelled_caught:
        move.trail.note(_REMAINS)


async def _every(move: Move, work: Callable[[MovingDevice], Awaitable[object]]) -> None:
    """For each device, whatever became of the others; raises the first complaint at the end."""
    complaints = []
    for device in move.devices:
        try:
            await work(device)
        except Exception as error:  # it must not keep the next device's from being done
            complaints.append(f"{device.id}: {reason(error)}")
    if complaints:
        raise MoveError("; ".join(complaints))


async def _write_by_mapping(move: Move) -> None:
    async def write(device: MovingDevice) -> None:
        if device.write_through:
            await device.source.call("write-through", on=False)

    await _every(move, write)


async def _stop_logs(move: Move) -> None:
    await _every(move, lambda device: device.source.call("log-stop"))


async def put_back_settings(move: Move) -> None:
    """Of both QEMUs; one that has ended has none."""
    for settings, side in zip(move.settings, (move.source, move.destination), strict=False):
        if not side.lost() and not side.ending:
            ends = (QmpLost,) if side is move.destination else ()
            with contextlib.suppress(*ends):  # it may be about to end itself
                await settings.put_back()


async def _reset_destinations(move: Move) -> None:
    """As QEMU's own reset at its start left them; a state that was loaded must not come to life."""
    await _every(move, _reset_destination)


async def _reset_destination(device: MovingDevice) -> None:
    await within(RESET, device.destination.call("reset"), f"no answer within {RESET:g} s", Where.DESTINATION)


WAY_BACK: tuple[Row, ...] = (
    Row(Step.CONNECT, "reach servers whose connections were lost", _reach_servers),
    Row(Step.START, "stop and reset the destination's devices, which run already", _stop_destinations),
    Row(Step.STATE, "let the source's devices go on, before the CPUs do", _resume_sources),
    Row(Step.CONNECT, "reach monitors that were lost", _reach_monitors),
    Row(Step.PRECOPY, "cancel QEMU's migration, and wait for its end", _cancel),
    Row(Step.PRECOPY, "see that the source's CPUs run again", _run_source),
    Row(Step.MEASURE, "switch write-through off", _write_by_mapping),
    Row(Step.LOG, "forget the dirty logs", _stop_logs),
    Row(Step.RECEIVE, "reset the destination's devices", _reset_destinations),
    Row(Step.SETTINGS, "put back capabilities and parameters of both QEMUs", put_back_settings),
)


async def lead_back(move: Move) -> None:
    """Run the rows of what was begun. What one cannot do is noted, and the next one runs. They are told of
    while the guest runs; while it stands still, an output that takes nothing would hold it up."""
    stands_still = move.trail.has(Step.STOP) and move.was_running
    for row in WAY_BACK:
        if move.trail.has(row.undoes):
            if not stands_still:
                move.trail.lead_back(row.text)
            done = await attempt(move, row.text, row.run)
            if stands_still and row.run is _run_source:
                stands_still = False  # else nothing below can help it, and what is done should be seen
                if done:
                    move.mark("back")
                    move.trail.lead_back(RUNS_AGAIN)


async def attempt(move: Move, text: str, work: Callable[[Move], Awaitable[None]]) -> bool:
    """Whether it was done."""
    limit = move.request.limits.recovery
    with trio.move_on_after(limit):
        try:
            await work(move)
        except Exception as error:  # a fault of our own, too, must not keep the next row from running
            move.trail.note(f"way back, {text}: {reason(error)}")
            return False
        return True
    move.trail.note(f"way back, {text}: not done within {limit:g} s")
    return False
