# SPDX-License-Identifier: BSD-3-Clause
"""What both sides are at when a move has ended, in words, and what is left to be done by hand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from qemu.qmp import ConnectError

from vfio_user.client.control import ControlClient
from vfio_user.client.qemu_migration.answers import truth
from vfio_user.client.qemu_migration.move import Move
from vfio_user.client.qemu_migration.qemu_side import QemuSide
from vfio_user.client.qemu_migration.qmp import QmpLost, open_qmp
from vfio_user.client.qemu_migration.report import Where
from vfio_user.client.qemu_migration.request import Request
from vfio_user.client.qemu_migration.trail import NONSENSE, TROUBLE, reason
from vfio_user.client.qemu_migration.whose import Guest

ANSWER = 5.0
"""Seconds in which somebody has to answer what he is at."""

_STATES = {
    "running": "its guest runs",
    "paused": "its guest is paused",
    "postmigrate": "its guest has been moved away, and stands still: end this QEMU, never continue it",
    "inmigrate": "it waits for a guest",
    "finish-migrate": "its guest stands still, in the middle of a migration",
}


@dataclass(frozen=True, slots=True)
class DeviceStanding:
    """`runs` and `attached` (a VMM is connected): None when the server cannot be asked."""

    words: str
    runs: bool | None = None
    attached: bool | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """One side. `state`: QEMU's run state; None when it cannot be asked. `refused`: nobody is at its
    monitor's address any more; False when it is silent, serves another client, or is too far away."""

    qemu: str
    state: str | None
    devices: Mapping[str, DeviceStanding]
    refused: bool = False

    @property
    def gone(self) -> bool:
        """QEMU has ended, as far as can be told: by its monitor and by all of its servers. Neither alone says
        so: a QEMU leaves a server that it is at odds with, and a monitor may be behind a tunnel."""
        left = all(device.attached is False for device in self.devices.values())
        return self.state is None and self.refused and left

    def __str__(self) -> str:
        ended = ", and has left its servers: as far as can be told it has ended" if self.gone else ""
        return "; ".join((self.qemu + ended, *(f"{id} {one.words}" for id, one in self.devices.items())))


async def look(move: Move, side: QemuSide) -> Standing:
    """Bounded: whoever does not answer is left alone."""
    words, state, refused = await _look_at_qemu(side)
    ends = {
        device.id: device.source if side.where is Where.SOURCE else device.destination
        for device in move.devices
    }
    devices = {id: await _look_at_device(control) for id, control in ends.items()}
    return Standing(words, state, devices, refused)


async def _look_at_qemu(side: QemuSide) -> tuple[str, str | None, bool]:
    """Words, run state, and whether nobody is there."""
    with trio.move_on_after(ANSWER):
        try:
            state = await _run_state(side)
            return _STATES.get(state, f"its guest is in the state {state}"), state, False
        except TROUBLE as error:
            refused = isinstance(error, QmpLost) and _nobody_there(error)
            return f"QEMU cannot be asked ({reason(error)})", None, refused
    return f"QEMU does not answer within {ANSWER:g} s", None, False


async def _run_state(side: QemuSide) -> str:
    """Over a new connection when the old one has ended, which alone says little of QEMU."""
    try:
        return await side.run_state()
    except QmpLost:
        async with open_qmp(side.qmp.address, ANSWER / 2) as qmp:
            return str((await qmp.execute("query-status"))["status"])


def _nobody_there(error: QmpLost) -> bool:
    """Refused or ended, or the socket's file is gone. Not: no answer, no way there, no permission."""
    cause = error.__cause__.exc if isinstance(error.__cause__, ConnectError) else error.__cause__
    return isinstance(cause, ConnectionError | FileNotFoundError | EOFError)


async def _look_at_device(control: ControlClient) -> DeviceStanding:
    with trio.move_on_after(ANSWER):
        try:
            return _in_words(await control.call("state"))
        except NONSENSE as error:
            return DeviceStanding(f"is in a state that cannot be told ({reason(error)})")
        except TROUBLE as error:
            return DeviceStanding(f"is lost: its server cannot be asked ({reason(error)})")
    return DeviceStanding(f"has a server that does not answer within {ANSWER:g} s")


def _in_words(state: Mapping[str, Any]) -> DeviceStanding:
    running, attached = truth(state, "running"), truth(state, "client", "attached")
    words = "runs" if running else "stands still"
    return DeviceStanding(words if attached else f"{words}, and no VMM is connected to it", running, attached)


# By hand


@dataclass(frozen=True, slots=True)
class End:
    """`was_running`: the guest ran when the move began; `started`: the destination was told to start it;
    `owed`: lines for the source's monitor that put back what the move has set."""

    request: Request
    source: Standing
    destination: Standing
    was_running: bool = True
    started: bool = False
    owed: tuple[str, ...] = ()


def advise(end: End, guest: Guest) -> tuple[str, ...]:
    """What the user has to do now, in this order; nothing when all is as it should be. Pure."""
    return tuple(_ADVICE[guest](end))


def _at_source(end: End) -> Iterator[str]:
    if not end.destination.gone:
        yield (
            f"end the destination's QEMU ({end.request.destination_qmp}) if it is still there, and never "
            "continue it: it has a copy of the guest at most, which has not run"
        )
    yield from _mend_devices(end.source, {one.id: one.source for one in end.request.devices})
    yield from _run_by_hand(end)
    yield from _put_back_by_hand(end)


def _mend_devices(standing: Standing, controls: Mapping[str, Path]) -> Iterator[str]:
    """Nothing of a QEMU that is gone."""
    for id, path in () if standing.gone else controls.items():
        yield from _mend_device(id, path, standing.devices[id])


def _mend_device(id: str, path: Path, found: DeviceStanding) -> Iterator[str]:
    if found.runs is None:
        yield (
            f"look for the server of {id}: if it lives, `vfio-user ctl {path} resume`; if not, the "
            "device is lost to this guest, which goes on without it"
        )
    elif not found.attached:  # QEMU does not connect again
        yield (
            f"QEMU has left the server of {id}: the device is lost to this guest until this QEMU is ended "
            "and started anew"
        )
    elif not found.runs:
        yield f"`vfio-user ctl {path} resume`: {id} stands still"


def _run_by_hand(end: End) -> Iterator[str]:
    address, state = end.request.source_qmp, end.source.state
    if end.source.gone:
        yield _ENDED.format("source", end.request.source_qmp)
    elif state is None:
        yield _REACH_SOURCE.format(address)
    elif end.was_running and state != "running":
        yield _TO_RUN.get(state, _TO_RUN[""]).format(address, state)


_REACH_SOURCE = (
    "reach the source's monitor ({}), `info status`: running needs nothing; at postmigrate `cont`, once the "
    "destination's QEMU is gone; else `migrate_cancel`"
)
_ENDED = (
    "as far as can be told the {0}'s QEMU ({1}) has ended, and the guest with it; see that no process of "
    "either QEMU is left, and only then start the guest anew: two of it must never run"
)
_TO_RUN = {
    "postmigrate": "`cont` in the source's monitor ({}), once the destination's QEMU is gone",
    "finish-migrate": "`migrate_cancel` in the source's monitor ({}): its guest stands still",
    "": "`cont` in the source's monitor ({}), if it was not you who has brought the guest into the state {}",
}
"""By the source's run state."""


def _at_destination(end: End) -> Iterator[str]:
    if not end.source.gone:
        yield f"end the source's QEMU ({end.request.source_qmp}); never continue it"
    yield from _mend_devices(end.destination, {one.id: one.destination for one in end.request.devices})
    if end.destination.gone:
        yield _ENDED.format("destination", end.request.destination_qmp)


def _nowhere(end: End) -> Iterator[str]:
    yield f"end the destination's QEMU ({end.request.destination_qmp}): it has not got all of the guest"
    if end.source.gone:
        yield _ENDED.format("source", end.request.source_qmp)
    else:
        yield (
            f"the guest is lost if the source's QEMU ({end.request.source_qmp}) has ended: look for its "
            "process. Only when it is gone start the guest anew"
        )
        for device in end.request.devices:
            yield f"if it lives, `vfio-user ctl {device.source} resume`"
        yield f"if it lives, {_REACH_SOURCE.format(end.request.source_qmp)}"


def _nobody_knows(end: End) -> Iterator[str]:
    """As after a move that was killed (docs/qemu-migration.md)."""
    told = "was told" if end.started else "was not told"
    yield (
        f"nobody can say where the guest is; the destination's QEMU ({end.request.destination_qmp}) {told} "
        "to start it. `info status` in its monitor: at running the guest is there; end the source's QEMU, "
        "and leave out the rest"
    )
    yield "else end the destination's QEMU, and see that it is gone: two of the guest must never run"
    for device in end.request.devices:
        yield f"then `vfio-user ctl {device.source} resume`"
    yield f"then {_REACH_SOURCE.format(end.request.source_qmp)}"
    yield from _put_back_by_hand(end)


def _put_back_by_hand(end: End) -> Iterator[str]:
    for line in () if end.source.gone else end.owed:
        yield f"`{line}` in the source's monitor ({end.request.source_qmp}), as it was before the move"


_ADVICE: Mapping[Guest, Callable[[End], Iterator[str]]] = {
    Guest.SOURCE: _at_source,
    Guest.DESTINATION: _at_destination,
    Guest.NOWHERE: _nowhere,
    Guest.UNKNOWN: _nobody_knows,
}
