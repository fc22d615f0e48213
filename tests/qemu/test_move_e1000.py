# SPDX-License-Identifier: BSD-3-Clause
"""A guest with our e1000 is moved to and fro under checked TCP both ways and pings: it hardly notices."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from guest_moves.announced import TIMES, Announcements, listening
from guest_moves.by_tool import move
from guest_moves.counts import MOVES, SOAK
from guest_moves.nic import (
    GUEST,
    HELD_WORDS,
    HOST,
    NIC,
    QUIET,
    check_self_test,
    complaints,
    interrupts_of_a_second,
    intx_held,
    transferring,
)
from guest_moves.pinger import INTERVAL, Pinger, pinging
from vfio_user.client.qemu.command import Chipset, MachineOptions
from vfio_user.client.qemu.lab import Lab
from vfio_user.client.qemu.machine import Machine
from vfio_user.client.qemu.moving import Moving, one_host, open_moving
from vfio_user.client.qemu.namespace import Namespace
from vfio_user.client.qemu.traffic import GUEST_FILES, bring_up
from vfio_user.client.qemu_migration.report import Progress, Report, Step
from vfio_user.client.qemu_migration.request import Writes

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(900)]

ALL_OF_A_HOLD = 4096
"""Descriptors for the frames of seconds in which the guest serves no interrupt: with 256 some would be lost
without a move, too."""
ON_THE_WAY = 3
"""Echoes that may be in a ring, or in the air, at the stop; besides, those that wait for a busy server."""


@dataclass(frozen=True)
class Shape:
    chipset: Chipset
    mapped: bool
    root_port: bool
    writes: Writes


SHAPES = {
    "q35": Shape("q35", True, False, Writes.HAND_OVER),
    "root-port": Shape("q35", True, True, Writes.WRITE_THROUGH),
    "i440fx": Shape("i440fx", False, False, Writes.AUTO),
}


def shapes(*quick: str) -> pytest.MarkDecorator:
    """All of them in the soak test; each is in one of the tests of `make test`."""
    names = list(SHAPES) if SOAK else quick
    return pytest.mark.parametrize("shape", [SHAPES[name] for name in names], ids=names)


def open_guest(
    lab: Lab, namespace: Namespace, shape: Shape, **options: Any
) -> AbstractAsyncContextManager[Moving]:
    machine = MachineOptions(
        shape.chipset,
        shape.mapped,
        memory_mib=192,
        **options,
    )
    places = one_host(namespace, f"{HOST}/24")
    return open_moving(lab, machine, [replace(NIC, root_port=shape.root_port)], places)


@dataclass
class Watch:
    """The network's side of moves."""

    pinger: Pinger
    announcements: Announcements
    marks: dict[Step, float] = field(default_factory=dict)

    def tell(self, progress: Progress) -> None:
        self.marks.setdefault(progress.step, trio.current_time())

    async def no_more_lost_than_downtime(self, report: Report, begun: float) -> None:
        """After a move that was begun then. Until the guest has announced itself, the bridge sends its frames
        to the source."""
        announced = await self.announcements.first_since(self.marks[Step.START])
        ended = await self.pinger.next_answer()
        await self.pinger.next_answer()
        down = report.downtime.total / 1000 + max(0, announced - self.marks[Step.FINISH])
        waiting = self.pinger.slowest(begun, self.marks[Step.STOP])
        lost = self.pinger.lost(begun, ended)
        before, after = self.pinger.lost(begun, self.marks[Step.STOP]), self.pinger.lost(announced, ended)
        print(f"{lost} lost in {down:.3f} s ({before} before, {after} after); {waiting:.3f} s before")
        assert lost <= (down + waiting) / INTERVAL + ON_THE_WAY


@contextlib.asynccontextmanager
async def watching(namespace: Namespace) -> AsyncIterator[Watch]:
    async with listening(namespace) as announcements, pinging(namespace, GUEST) as pinger:
        yield Watch(pinger, announcements)


@contextlib.asynccontextmanager
async def nothing() -> AsyncIterator[None]:
    yield


@shapes("q35", "i440fx")
async def test_to_and_fro(lab: Lab, namespace: Namespace, shape: Shape) -> None:
    async with open_guest(lab, namespace, shape, files=GUEST_FILES) as moving:
        await bring_up(moving.guest, f"{GUEST}/24")
        await moving.guest.check("dmesg -c")
        await move_to_and_fro(moving, namespace, shape, nothing)


async def move_to_and_fro(
    moving: Moving,
    namespace: Namespace,
    shape: Shape,
    around: Callable[[], AbstractAsyncContextManager[None]],
) -> list[Report]:
    reports = []
    async with watching(namespace) as watch:
        async with transferring(moving, namespace, MOVES + 1) as transfers:
            for _ in range(MOVES):
                destination = await moving.prepare()
                watch.marks.clear()
                begun = trio.current_time()
                async with around():
                    report = await move(moving, shape.writes, watch.tell, destination)
                await watch.no_more_lost_than_downtime(report, begun)
                reports.append(report)
        assert min(transfers.rounds) > MOVES
        await check_announcements(moving.guest, watch.announcements)
    await check_afterwards(moving.guest)
    return reports


async def check_announcements(guest: Machine, found: Announcements) -> None:
    """Five for each move, within 0.8 s."""
    own = bytes.fromhex((await guest.check("cat /sys/class/net/eth0/address")).replace(":", ""))
    with trio.fail_after(20):
        while len(found.times) < MOVES * TIMES:  # noqa: ASYNC110 - the last ones are on their way
            await trio.sleep(0.05)
    await trio.sleep(0.1)
    assert (found.bad, found.senders) == ([], [own] * MOVES * TIMES)


async def check_afterwards(guest: Machine) -> None:
    """Nothing runs any more: whatever a move has spoilt shows now. The driver looks every two seconds for
    frames that were sent more than a second ago."""
    await guest.check("sleep 2")
    assert await interrupts_of_a_second(guest) <= QUIET
    assert complaints(await guest.kernel_log()) == []
    await check_self_test(guest)


@contextlib.asynccontextmanager
async def open_held_guest(lab: Lab, namespace: Namespace, shape: Shape, hold: Path) -> AsyncIterator[Moving]:
    files: Mapping[str, bytes | Path] = {**GUEST_FILES, "usr/bin/hold": hold}
    async with open_guest(lab, namespace, shape, cpus=2, kernel_words=HELD_WORDS, files=files) as moving:
        await bring_up(moving.guest, f"{GUEST}/24")
        await moving.guest.check(f"ethtool -G eth0 rx {ALL_OF_A_HOLD} && dmesg -c")
        yield moving


@shapes("root-port")
async def test_with_intx_held_high(lab: Lab, namespace: Namespace, shape: Shape, hold: Path) -> None:
    async with open_held_guest(lab, namespace, shape, hold) as moving:
        reports = await move_to_and_fro(moving, namespace, shape, lambda: intx_held(moving))
        assert all(report.devices[0].intx_lowered for report in reports)


@pytest.mark.soak  # what the test above would see is seen there
async def test_a_line_that_is_left_high_is_noticed(
    lab: Lab, namespace: Namespace, hold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lowering the pin before the switch."""

    async def forget(_device: object, _qmp: object) -> bool:
        return False

    monkeypatch.setattr("vfio_user.client.qemu_migration.switch.lower_intx", forget)
    async with open_held_guest(lab, namespace, SHAPES["root-port"], hold) as moving:
        destination = await moving.prepare()
        async with pinging(namespace, GUEST), intx_held(moving):
            await move(moving, destination=destination)
        assert await interrupts_of_a_second(moving.guest) > QUIET or complaints(
            await moving.guest.kernel_log()
        )
