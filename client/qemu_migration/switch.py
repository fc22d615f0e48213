# SPDX-License-Identifier: BSD-3-Clause
"""The part of a move in which the guest stands still. Every round trip here is downtime: what can go side by
side does, and nothing is waited for by looking again and again."""

import time
from collections.abc import Mapping
from typing import Any

from vfio_user.client.qemu_migration.intx import lower_intx
from vfio_user.client.qemu_migration.move import Move, MovingDevice, within
from vfio_user.client.qemu_migration.placing import place_now
from vfio_user.client.qemu_migration.report import MoveError, Step, Where
from vfio_user.client.qemu_migration.together import side_by_side
from vfio_user.client.qemu_migration.view import has_bars, is_placed, snapshot
from vfio_user.client.qemu_migration.view import restore as restore_view

WAIT_MS = 1000
"""For DMA replies that QEMU owes when a device is stopped."""


async def stop_devices(move: Move) -> None:
    """The source's. Interrupts that they raise from now on are kept in their states."""
    move.trail.begin(Step.STOP)
    move.marks["still"] = move.source.when("STOP") or time.perf_counter()
    limit = move.request.limits.stop
    await move.each(lambda device: _stop(device, limit))
    move.mark("stopped")


async def _stop(device: MovingDevice, seconds: float) -> None:
    complaint = f"{device.id} does not stop within {seconds:g} s"
    with device.timed("stop"):
        result = await within(seconds, device.source.call("stop", wait=WAIT_MS), complaint, Where.SOURCE)
    if result["running"] or result["unanswered_dma"]:
        raise MoveError(f"{device.id} does not stop: {_why(result)}", Where.SOURCE)


def _why(result: Mapping[str, Any]) -> str:
    return (
        f"{result['unanswered_dma']} accesses to guest memory have no reply"
        if not result["running"]
        else "it runs"
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
        nursery.start_soon(_snapshot_and_place, move, device)


async def _hand_over_log(device: MovingDevice) -> None:
    with device.timed("log"):
        result = await device.source.call("log-hand-over")
    device.pages_handed_over = int(result["pages"])


async def _lower(move: Move, device: MovingDevice) -> None:
    with device.timed("intx"):
        device.intx_lowered = await lower_intx(device, move.source.qmp)


async def _snapshot_and_place(move: Move, device: MovingDevice) -> None:
    async with move.source.monitor:
        with device.timed("view"):
            device.view = await snapshot(move.source.qmp, device.source, device.id)
    await place_now(move, device)


async def last_pass(move: Move) -> None:
    """From here on QEMU alone decides who has the guest (`whose`). The devices' states arrive meanwhile, too:
    without them the source gets its guest back, which QEMU allows until the other one is started."""
    move.trail.begin(Step.LAST_PASS)
    move.continued = True
    await move.source.qmp.execute("migrate-continue", state="pre-switchover")
    await move.source.until("completed")
    await move.destination.until("completed")
    seconds = move.request.limits.standstill
    late = f"the devices' states have not arrived {seconds:g} s after all else"
    arrivals = move.each(lambda device: _finish_state(move, device))
    await within(seconds, arrivals, late, Where.DESTINATION)
    move.mark("completed")


async def _finish_state(move: Move, device: MovingDevice) -> None:
    await device.carrier.done.wait()
    device.ms["state"] = (device.carrier.ended - move.marks["stopped"]) * 1000


async def restore(move: Move) -> None:
    """QEMU's own view of the devices, at the destination."""
    move.trail.begin(Step.RESTORE)
    await move.each(lambda device: _restore(move, device))
    move.mark("restored")


async def _restore(move: Move, device: MovingDevice) -> None:
    assert device.view is not None
    qmp = move.destination.qmp
    if device.placed and await is_placed(qmp, device.id, device.view):
        return
    async with move.destination.monitor:
        await restore_view(qmp, device.destination, device.id, device.view)


async def start(move: Move) -> None:
    """The devices fire what is due; then the CPUs go on, where they ran."""
    move.trail.begin(Step.START)
    await move.each(lambda device: _resume(move, device))
    if move.was_running:
        move.started = True
        await move.destination.qmp.execute("cont")
    move.mark("running")


async def _resume(move: Move, device: MovingDevice) -> None:
    """Both requests are on their way at once. QEMU has restored registers of the server that it is connected
    to: if they are not those of the state that was loaded here, this is another one."""
    assert device.view is not None
    async with side_by_side() as nursery:
        nursery.start_soon(device.destination.call, "resume")
        alike = await has_bars(device.destination, device.view)
    if not alike:
        reason = (
            f"{device.id}: the destination's server has other BARs: is it another device's control socket?"
        )
        raise MoveError(reason, Where.DESTINATION)
