# SPDX-License-Identifier: BSD-3-Clause
"""The part of a move in which the guest stands still. Every round trip here is downtime: what can go side by
side does, and nothing is waited for by looking again and again."""

import time

from vfio_user.client.qemu_migration.answers import MOST_PAGES, pick, truth, whole
from vfio_user.client.qemu_migration.intx import lower_intx
from vfio_user.client.qemu_migration.move import Move, MovingDevice, within
from vfio_user.client.qemu_migration.placing import place_now
from vfio_user.client.qemu_migration.qmp import QmpLost
from vfio_user.client.qemu_migration.report import MoveError, Step, Where
from vfio_user.client.qemu_migration.together import side_by_side
from vfio_user.client.qemu_migration.view import ask_places, has_bars, is_placed, same_view, take_view
from vfio_user.client.qemu_migration.view import restore as restore_view

WAIT_MS = 1000
"""For DMA replies that QEMU owes when a device is stopped."""


async def stop_devices(move: Move) -> None:
    """The source's. Interrupts that they raise from now on are kept in their states."""
    move.trail.begin(Step.STOP)
    move.marks["still"] = (move.was_running and move.source.when("STOP")) or time.perf_counter()
    limit = move.request.limits.stop
    await move.each(lambda device: _stop(device, limit))
    move.mark("stopped")


async def _stop(device: MovingDevice, seconds: float) -> None:
    complaint = f"{device.id} does not stop within {seconds:g} s"
    with device.timed("stop"):
        call = device.source.call("stop", wait=WAIT_MS, describe=True)
        device.stopped = result = await within(seconds, call, complaint, Where.SOURCE)
    if truth(result, "running"):
        raise MoveError(f"{device.id} does not stop: it runs", Where.SOURCE)
    if owed := whole(result, "unanswered_dma"):
        raise MoveError(
            f"{device.id} does not stop: {owed} accesses to guest memory have no reply", Where.SOURCE
        )


async def hand_over(move: Move) -> None:
    """Logs to QEMU, INTx low, QEMU's view: everything that has to go before the last pages. The states are on
    their way meanwhile."""
    move.trail.begin(Step.HAND_OVER)
    await move.each(lambda device: _hand_over(move, device))
    move.mark("handed-over")


async def _hand_over(move: Move, device: MovingDevice) -> None:
    async with side_by_side() as nursery:
        nursery.start_soon(_hand_over_log, device)
        nursery.start_soon(_lower, move, device)
        nursery.start_soon(_take_view_and_place, move, device)


async def _hand_over_log(device: MovingDevice) -> None:
    dirty = _dirty_pages(device)
    if dirty == 0:
        return
    with device.timed("log"):
        result = await device.source.call("log-hand-over")
    device.pages_handed_over = whole(result, "pages", most=MOST_PAGES)
    if device.pages_handed_over < dirty:
        raise MoveError(
            f"{device.id}: {device.pages_handed_over} of {dirty} dirty pages were handed over", Where.SOURCE
        )


def _dirty_pages(device: MovingDevice) -> int:
    """In the log at the stop. MoveError when it is not the log that was started for this move any more: then
    none in it does not mean that none is dirty."""
    log = pick(device.stopped, "dirty_log")
    if pick(log, "owner") != "controller":
        raise MoveError(f"{device.id}: somebody has ended the dirty log", Where.SOURCE)
    if truth(log, "lost"):
        raise MoveError(
            f"{device.id}: its dirty log was lost with memory that the guest has removed", Where.SOURCE
        )
    return whole(log, "pages", most=MOST_PAGES)


async def _lower(move: Move, device: MovingDevice) -> None:
    with device.timed("intx"):
        device.intx_lowered = await lower_intx(device, move.source.qmp)


async def _take_view_and_place(move: Move, device: MovingDevice) -> None:
    with device.timed("view"):
        device.view = same_view(device.early, device.stopped["configuration"])
        if device.view is None:
            await _take_view(move, device)
    await place_now(move, device)


async def _take_view(move: Move, device: MovingDevice) -> None:
    """QEMU needs milliseconds to say where everything is: it is asked once for all devices, if at all."""
    qmp = move.source.qmp
    async with move.source.monitor:
        move.places = move.places or await ask_places(qmp)
        device.view = await take_view(qmp, move.places, device.stopped["configuration"], device.id)


async def last_pass(move: Move) -> None:
    """From here on QEMU alone decides who has the guest (`whose`). The devices' states arrive meanwhile, too:
    without them the source gets its guest back, which QEMU allows until the other one is started."""
    move.trail.begin(Step.LAST_PASS)
    move.continued = True
    await move.source.qmp.execute("migrate-continue", state="pre-switchover")
    try:
        await _completed(move)
    except QmpLost:
        # A monitor that is lost says nothing of the guest: who has it turns on the states as well.
        await _finish_states(move)
        raise
    await _finish_states(move)
    move.mark("completed")


async def _completed(move: Move) -> None:
    """QEMU's own estimate may be wrong, but not by seconds: then the other side, or the way to it, hangs."""
    seconds = move.request.limits.standstill
    most = seconds + 2 * _downtime_limit(move)
    complaint = f"QEMU has not sent the last pages within {most:g} s"
    await within(most, move.source.until("completed"), complaint, Where.SOURCE)
    complaint = f"the destination's QEMU has not taken the last pages within {seconds:g} s"
    await within(seconds, move.destination.until("completed"), complaint, Where.DESTINATION)


def _downtime_limit(move: Move) -> float:
    """Seconds that QEMU may take for the last pages, by its own reckoning."""
    assert move.facts is not None
    wanted = move.request.limits.downtime
    return (whole(move.facts.source.parameters, "downtime-limit") if wanted is None else wanted) / 1000


async def _finish_states(move: Move) -> None:
    seconds = move.request.limits.standstill
    late = f"the devices' states have not arrived {seconds:g} s after all else"
    arrivals = move.each(lambda device: _finish_state(move, device))
    await within(seconds, arrivals, late, Where.DESTINATION)


async def _finish_state(move: Move, device: MovingDevice) -> None:
    await device.carrier.done.wait()
    device.ms["state"] = (device.carrier.ended - move.marks["stopped"]) * 1000


async def restore(move: Move) -> None:
    """QEMU's own view of the devices, at the destination, where it could not be given to it before."""
    move.trail.begin(Step.RESTORE)
    await move.each(lambda device: _restore(move, device))
    move.mark("restored")


async def _restore(move: Move, device: MovingDevice) -> None:
    if not device.placed:
        await _restore_view(move, device)


async def _restore_view(move: Move, device: MovingDevice) -> None:
    assert device.view is not None
    async with move.destination.monitor:
        await restore_view(move.destination.qmp, device.destination, device.id, device.view)


async def start(move: Move) -> None:
    """The devices fire what is due; then the CPUs go on, where they ran."""
    move.trail.begin(Step.START)
    await move.each(lambda device: _resume(move, device))
    if move.was_running:
        move.started = True
        await move.destination.qmp.execute("cont")
    move.mark("running")


async def _resume(move: Move, device: MovingDevice) -> None:
    """All requests are on their way at once. QEMU has restored registers of the server that it is connected
    to: if they are not those of the state that was loaded here, this is another one."""
    assert device.view is not None
    async with side_by_side() as nursery:
        nursery.start_soon(device.destination.call, "resume")
        if device.placed:
            nursery.start_soon(_check_place, move, device)
        alike = await has_bars(device.destination, device.view)
    if not alike:
        reason = (
            f"{device.id}: the destination's server has other BARs: is it another device's control socket?"
        )
        raise MoveError(reason, Where.DESTINATION)


async def _check_place(move: Move, device: MovingDevice) -> None:
    """What QEMU was told before it had the guest should stand; else it is told again."""
    assert device.view is not None
    if not await is_placed(move.destination.qmp, device.id, device.view):
        if device.view.address_register is None:
            await _take_view(move, device)
        await device.destination.call("stop")
        await _restore_view(move, device)
        await device.destination.call("resume")
