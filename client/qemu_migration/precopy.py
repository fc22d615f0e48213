# SPDX-License-Identifier: BSD-3-Clause
"""The part of a move in which the guest runs: from the first question to QEMU's stop of the CPUs."""

from typing import Any

import trio

from vfio_user.client.qemu_migration.answers import MOST_PAGES, truth, whole
from vfio_user.client.qemu_migration.facts import DeviceFacts, Facts, ask_qemu
from vfio_user.client.qemu_migration.move import Move, MovingDevice, within
from vfio_user.client.qemu_migration.placing import place_early
from vfio_user.client.qemu_migration.preflight import find_reasons
from vfio_user.client.qemu_migration.report import MoveError, Progress, Refused, Step, Where
from vfio_user.client.qemu_migration.request import Writes
from vfio_user.client.qemu_migration.settings import Settings
from vfio_user.client.qemu_migration.together import side_by_side
from vfio_user.client.qemu_migration.view import ask_chipset
from vfio_user.client.qemu_migration.view import check as check_view
from vfio_user.client.qemu_migration.writes import LOOK_SECONDS, LOOKS, choose, horizon, too_many, written

LOOK_AGAIN = 0.2
"""Seconds between two looks at a migration that is under way."""
SWITCHED = "pre-switchover"
ANSWER = 5.0
"""Seconds for a server to say what it is at, before anything is touched: it does so at once, or is none."""


async def check(move: Move) -> None:
    """Refused, with all the reasons. Nothing is touched."""
    move.trail.begin(Step.CHECK)
    move.facts = facts = await _ask(move)
    if reasons := find_reasons(facts, move.request) + await _check_views(move, facts):
        raise Refused(reasons)
    move.was_running = facts.source.status == "running"
    for device, found in zip(move.devices, facts.devices, strict=True):
        device.model = str(found.source["model"])


async def _check_views(move: Move, facts: Facts) -> tuple[str, ...]:
    chipset = await ask_chipset(move.source.qmp)
    found = {device.id: check_view(device.source_configuration, chipset) for device in facts.devices}
    return tuple(f"{id}: {reason}" for id, reasons in found.items() for reason in reasons)


async def _ask(move: Move) -> Facts:
    source = await ask_qemu(move.source.qmp)
    destination = await ask_qemu(move.destination.qmp)
    return Facts(source, destination, tuple([await _ask_device(device) for device in move.devices]))


async def _ask_device(device: MovingDevice) -> DeviceFacts:
    states = [await _ask_server(device, where, "state") for where in _SIDES]
    configurations = [await _ask_server(device, where, "configuration") for where in _SIDES]
    return DeviceFacts(device.id, *states, *configurations)


_SIDES = (Where.SOURCE, Where.DESTINATION)


async def _ask_server(device: MovingDevice, where: Where, method: str) -> Any:
    """The device's own socket takes a connection too, and never answers."""
    here = where is Where.SOURCE
    control = device.source if here else device.destination
    path = device.wanted.source if here else device.wanted.destination
    complaint = (
        f"{device.id}: the {where.value}'s server ({path}) does not answer within {ANSWER:g} s: is it the "
        "control socket?"
    )
    return await within(ANSWER, control.call(method), complaint, where)


async def prepare(move: Move, nursery: trio.Nursery) -> None:
    """Everything that goes before QEMU's `migrate`; `nursery` carries the states."""
    trail, limits = move.trail, move.request.limits
    trail.begin(Step.RECEIVE)
    await move.each(lambda device: _stand_still(device, limits.stop))
    trail.begin(Step.LOG)
    await move.each(_start_log)
    trail.begin(Step.MEASURE)
    await _choose_writes(move)
    trail.begin(Step.STATE)
    for device in move.devices:
        nursery.start_soon(device.carrier.run)
    trail.begin(Step.SETTINGS)
    await _set(move)


async def _stand_still(device: MovingDevice, seconds: float) -> None:
    complaint = f"{device.id}: the destination's device does not stop"
    await within(seconds, device.destination.call("stop"), complaint, Where.DESTINATION)


async def _start_log(device: MovingDevice) -> None:
    await device.source.call("log-start", page_size=4096, lease=True)  # ends with us, however we end


async def _choose_writes(move: Move) -> None:
    writes = move.request.writes
    if writes is Writes.AUTO:
        for _ in range(LOOKS):
            await move.each(lambda device: _look(move, device))
            await trio.sleep(LOOK_SECONDS)
        assert move.facts is not None
        source = move.facts.source
        seconds = horizon(source.memory, int(source.parameters.get("max-bandwidth", 0)))
        writes = choose(writes, [device.growth for device in move.devices], seconds)
    if writes is Writes.WRITE_THROUGH:
        await move.each(_write_through)


async def _write_through(device: MovingDevice) -> None:
    device.write_through = True
    await device.source.call("write-through", on=True, lease=True)


async def _look(move: Move, device: MovingDevice) -> None:
    """What the source's server says of its log and its writes."""
    state = await device.source.call("state")
    if not truth(state, "client", "attached"):
        raise MoveError(f"{device.id}: QEMU has left the source's server", Where.SOURCE)
    device.growth.add(move.trail.seconds, whole(state, "dirty_log", "pages", most=MOST_PAGES))
    device.written = written(state)
    if state["transfer"] is not None:
        device.carrier.bytes = whole(state, "transfer", "bytes")


async def _set(move: Move) -> None:
    assert move.facts is not None
    source = Settings(move.source, move.facts.source)
    destination = Settings(move.destination, move.facts.destination)
    move.settings += [source, destination]
    await source.set_capabilities({"events": True, "pause-before-switchover": True})
    await destination.set_capabilities({"events": True})
    if move.request.limits.downtime is not None:
        await source.set_parameters({"downtime-limit": move.request.limits.downtime})


async def copy(move: Move) -> None:
    """QEMU's copying, until it has stopped the CPUs. MoveError when it ends otherwise."""
    assert move.facts is not None
    await move.destination.qmp.execute("stop")  # as with -S: without it QEMU would start the CPUs by itself
    await place_early(move)
    if move.facts.destination.migration.get("status") != "setup":  # else it listens already, at its own URI
        await move.destination.qmp.execute("migrate-incoming", uri=move.request.uri)
    move.trail.begin(Step.PRECOPY)
    await move.each(_forget)
    move.mark("migrate")
    await move.source.qmp.execute("migrate", uri=move.request.uri)
    async with side_by_side() as nursery:
        nursery.start_soon(_watch, move)
        await move.source.until(SWITCHED)
        nursery.cancel_scope.cancel()  # an answer that nobody waits for any more would be downtime


async def _forget(device: MovingDevice) -> None:
    """QEMU's first pass reads every page after this: what was written before needs no log."""
    await device.source.call("log-report", clear=True)
    device.written_before = written(await device.source.call("state"))


async def _watch(move: Move) -> None:
    while True:
        await _look_at_all(move)
        await trio.sleep(LOOK_AGAIN)


async def _look_at_all(move: Move) -> None:
    answer = await move.source.query()
    await _look_at_cpus(move)
    await move.each(lambda device: _look(move, device))
    pages = sum(device.growth.pages for device in move.devices)
    if move.request.writes is Writes.AUTO and too_many(pages):
        await move.each(_write_through_late)
    ram = answer.get("ram", {})
    move.ram.append((move.trail.seconds, ram))
    move.trail.tell(
        Progress(
            Step.PRECOPY,
            0.0,
            sent=ram.get("transferred", 0),
            left=ram.get("remaining", 0),
            total=ram.get("total", 0),
            passes=ram.get("dirty-sync-count", 0),
            device_pages=pages,
            state=sum(device.carrier.bytes for device in move.devices),
            write_through=any(device.write_through for device in move.devices),
        )
    )


async def _look_at_cpus(move: Move) -> None:
    """Somebody may pause the guest meanwhile, or let it go on: so it arrives."""
    state = await move.source.run_state()
    if state in ("running", "paused"):
        move.was_running = state == "running"


async def _write_through_late(device: MovingDevice) -> None:
    """What is in the log stays there, for the hand-over; nothing more gets in."""
    if not device.write_through and device.growth.pages:
        await _write_through(device)
