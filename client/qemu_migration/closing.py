# SPDX-License-Identifier: BSD-3-Clause
"""The end of a move: what is put away, and what is told."""

import itertools

import trio

from vfio_user.client.qemu_migration.move import Move, MovingDevice
from vfio_user.client.qemu_migration.report import Downtime, Failure, Outcome, Report, Round, Step
from vfio_user.client.qemu_migration.request import Writes
from vfio_user.client.qemu_migration.standing import ANSWER, End, advise, look
from vfio_user.client.qemu_migration.trail import NONSENSE, TROUBLE, reason
from vfio_user.client.qemu_migration.way_back import attempt, put_back_settings
from vfio_user.client.qemu_migration.whose import Guest
from vfio_user.client.qemu_migration.writes import written
from vfio_user.protocol.json_rpc import REFUSED, RpcError


async def finish(move: Move) -> None:
    """The guest runs at the destination: it announces itself, the source's logs end. Mishaps are noted."""
    move.trail.begin(Step.FINISH)
    await attempt(move, "announce", lambda move: move.each(_announce))
    await attempt(move, "end the logs", lambda move: move.each(_end_log))
    await attempt(move, "count what was written", lambda move: move.each(_count))
    await attempt(move, "put back the settings", put_back_settings)


async def _announce(device: MovingDevice) -> None:
    try:
        await device.destination.call("announce")
    except RpcError as error:
        if error.code != REFUSED:  # it is no network card, or has no address yet
            raise


async def _end_log(device: MovingDevice) -> None:
    if device.write_through:
        await device.source.call("write-through", on=False)
    await device.source.call("log-stop")


async def _count(device: MovingDevice) -> None:
    """All of it: the last look was before the stop."""
    device.written = written(await device.source.call("state"))


# The report


async def write_report(move: Move, outcome: Outcome, failure: Failure | None, guest: Guest) -> Report:
    completed = outcome is Outcome.COMPLETED
    ram, qemu_downtime = await _figures(move, completed)
    trail = move.trail
    source, destination = await look(move, move.source), await look(move, move.destination)
    owed = move.settings[0].owed if move.settings else ()
    end = End(move.request, source, destination, move.was_running, move.started, owed)
    return Report(
        outcome=outcome,
        guest=guest.value,
        source=str(source),
        destination=str(destination),
        seconds=trail.seconds,
        writes=_writes(move),
        rounds=_rounds_if_told(move),
        downtime=_downtime(move) if completed else Downtime(),
        stood_still=0.0 if completed else _stood_still(move),
        qemu_downtime=qemu_downtime,
        devices=tuple(device.report() for device in move.devices),
        ram=ram,
        samples=tuple(trail.samples),
        failure=failure,
        notes=tuple(trail.notes),
        by_hand=advise(end, guest),
    )


def _writes(move: Move) -> Writes:
    through = any(device.write_through for device in move.devices)
    return Writes.WRITE_THROUGH if through else Writes.HAND_OVER


async def _figures(move: Move, completed: bool) -> tuple[dict[str, int], float]:
    """QEMU's last account; what was seen of it when it is gone. Of a move that failed it ends no pass."""
    with trio.move_on_after(ANSWER):
        try:
            answer = await move.source.query()
            ram = dict(answer.get("ram", {}))
            if ram and completed:
                seconds = _at(move, "completed") / 1000 or move.trail.seconds
                move.ram.append((seconds, ram))
            return ram, float(answer.get("downtime", 0))
        except TROUBLE:
            pass
    return dict(move.ram[-1][1]) if move.ram else {}, 0.0


def _rounds_if_told(move: Move) -> tuple[Round, ...]:
    try:
        return tuple(_rounds(move))
    except NONSENSE as error:
        move.trail.note(f"QEMU's figures cannot be used: {reason(error)}")
        return ()


def _rounds(move: Move) -> list[Round]:
    """From what QEMU said while it copied: its counter of passes tells them apart."""
    looked = itertools.groupby(move.ram, lambda look: max(1, look[1].get("dirty-sync-count", 0)))
    lasts = [list(looks)[-1] for _, looks in looked]
    rounds, at, pages, sent = [], _at(move, "migrate"), 0, 0
    still = _at(move, "still")
    for number, (seconds, ram) in enumerate(lasts, 1):
        total, bytes_ = ram.get("normal", 0) + ram.get("duplicate", 0), ram.get("transferred", 0)
        stopped = 0 < still < seconds * 1000
        end = seconds * 1000
        running = min(max(0.0, still - at), end - at) if stopped else end - at
        rounds.append(Round(number, at, end - at, total - pages, bytes_ - sent, stopped, running))
        at, pages, sent = end, total, bytes_
    return rounds


def _at(move: Move, mark: str) -> float:
    """Milliseconds since the start."""
    return move.trail.since_start(move.marks[mark]) if mark in move.marks else 0.0


def _stood_still(move: Move) -> float:
    """By QEMU's word that the CPUs run again; when that was missed, by when it was asked for."""
    begin, end = move.marks.get("still"), move.source.when("RESUME")
    if begin is not None and end is not None and end > begin:
        return (end - begin) * 1000
    return move.between("still", "back")


def _downtime(move: Move) -> Downtime:
    return Downtime(
        stop=move.between("still", "stopped"),
        hand_over=move.between("stopped", "handed-over"),
        last_pass=move.between("handed-over", "completed"),
        restore=move.between("completed", "restored"),
        start=move.between("restored", "running"),
    )
